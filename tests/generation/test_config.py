"""Every fault of the options is reported, at once, with field, value and remedy."""

import pytest

from dlm_tune.generation import DiffusionGenerationConfig


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"block_length": 24},
            ["block_length=24", "max_new_tokens=128", "block_length=16 or 32, or max_new_tokens=120"],
        ),
        ({"block_length": 500}, ["block_length=500", "block_length=128, or max_new_tokens=500"]),
        ({"block_length": 0}, ["block_length=0", "null"]),
        ({"max_new_tokens": 0}, ["max_new_tokens=0", "1 or more"]),
        ({"steps": 3}, ["steps=3", "4 blocks", "steps=4 or more"]),
        ({"steps": "many"}, ["steps='many'", "integer"]),
        ({"steps": 2.5}, ["steps=2.5", "integer"]),
        (
            {"remasking": "low_confidnce"},
            ["'low_confidnce'", "'margin' or 'random'", "Did you mean 'low_confidence'?"],
        ),
        ({"confidence_from": "both"}, ["'both'", "'predictive' or 'sampled'"]),
        ({"temperature": -1.0}, ["temperature=-1.0", "0 for greedy"]),
        ({"temperature": float("nan")}, ["temperature=nan"]),
        ({"temperature": "hot"}, ["temperature='hot'", "a number"]),
        ({"stop_at_eos": "no"}, ["stop_at_eos='no'", "true or false"]),
        ({"suppress_tokens": [1, -2]}, ["suppress_tokens=[1, -2]", "token ids"]),
        ({"eos_token_ids": 7}, ["eos_token_ids=7", "list"]),
        ({"suppress_eos": True, "suppress_eos_confidence": True}, ["no effect", "Set one"]),
        ({"guidance_scale": float("inf")}, ["guidance_scale=inf", "finite"]),
        ({"guidance_scale": "strong"}, ["guidance_scale='strong'", "a number"]),
        ({"guidance_batching": 2}, ["guidance_batching=2", "true or false"]),
        ({"guidance_schedule": "liner"}, ["'liner'", "Did you mean 'linear'?"]),
        ({"guidance_schedule": "interval", "guidance_interval": [0.5]}, ["guidance_interval=[0.5]", "two numbers"]),
        ({"guidance_schedule": "interval", "guidance_interval": [0.5, 0.5]}, ["0 <= start < end <= 1"]),
        ({"guidance_schedule": "interval", "guidance_interval": [0.5, 1.5]}, ["guidance_interval=[0.5, 1.5]"]),
        (
            {"guidance_scale": 1.0, "guidance_interval": [0.2, 0.8]},
            ["guidance_interval=[0.2, 0.8] has no effect", "guidance_schedule='interval'"],
        ),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match="1 problem in DiffusionGenerationConfig") as caught:
        DiffusionGenerationConfig(**options)
    for word in words:
        assert word in str(caught.value)


def test_all_faults_are_reported_together():
    with pytest.raises(ValueError, match="3 problems in DiffusionGenerationConfig") as caught:
        DiffusionGenerationConfig(block_length=24, remasking="best", temperature=-2.0)
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("block_length", [None, 1, 32, 128])
def test_good_options(block_length):
    config = DiffusionGenerationConfig(block_length=block_length, temperature=1, seed=-3)
    assert config.num_blocks == 128 // (block_length or 128)
