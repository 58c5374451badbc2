"""Options of `eval` that are checked before anything loads."""

import pytest

from dlm_tune.commands.arguments import EvalArguments
from dlm_tune.commands.evaluate import generation_config
from dlm_tune.recipe import Recipe


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"guidance_scal": 1.0}, "guidance_scal"),
        ({"guidance_schedule": "linear"}, "guidance_schedule='linear' has no effect with guidance_scale=0"),
        ({"guidance_scale": 1, "guidance_schedule": "interval"}, "needs guidance_interval"),
    ],
)
def test_generation_options_without_effect_are_refused(generation, words):
    with pytest.raises(ValueError, match=words):
        generation_config(EvalArguments(generation=generation), Recipe((), {}))


def test_generation_options_guide():
    options = {"guidance_scale": 1, "guidance_schedule": "interval", "guidance_interval": [0.2, 0.8]}
    config = generation_config(EvalArguments(generation=options), Recipe((), {}))
    assert (config.guidance_scale, config.guidance_interval) == (1, [0.2, 0.8])
