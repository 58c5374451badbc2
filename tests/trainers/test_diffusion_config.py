import math

import pytest

from dlm_tune.trainers import DiffusionConfig


def config(**arguments):
    return DiffusionConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none", **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be honoured"),
        ({"loss_type": "dft"}, "loss_type='dft' cannot be honoured"),
        ({"packing_strategy": "wrapped"}, "packing_strategy='wrapped' cannot be honoured"),
        ({"packing": True, "max_length": None}, "packing needs max_length"),
        ({"eval_packing": True, "eos_policy": "pad_to_max"}, "eos_policy='pad_to_max' fills rows to the longest"),
        ({"packing": True, "train_sampling_strategy": "group_by_length"}, "does not go with packing=True"),
        ({"packing": True, "train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance' does not go"),
        (
            {"eval_packing": True, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length' does not go with eval_packing=True",
        ),
        (
            {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}},
            "dataset_kwargs={'skip_prepare_dataset': True} would leave out packing",
        ),
        ({"loss_weighting": "snr"}, "loss_weighting='snr' is unknown: choose one of nelbo, uniform, cart"),
        ({"cart_geometric_p": 0.3}, "cart_geometric_p=0.3 has no effect with loss_weighting='nelbo'"),
        ({"cart_geometric_p": 1.0, "loss_weighting": "cart"}, "cart_geometric_p=1.0 must lie between 0 and 1"),
        (
            {"noise_schedule_power": 2.0, "noise_schedule": "linear"},
            "noise_schedule_power=2.0 has no effect with noise_schedule='linear'",
        ),
        ({"noise_schedule_power": 0.0, "noise_schedule": "polynomial"}, "noise_schedule_power=0.0 must be above 0"),
        (
            {"noise_schedule_power": math.nan, "noise_schedule": "polynomial"},
            "noise_schedule_power=nan must be above 0 and finite",
        ),
        ({"random_length_probability": 1.5}, "random_length_probability=1.5 must lie between 0 and 1"),
        ({"padding_free": True}, "padding_free=True cannot be honoured"),
        ({"truncation_mode": "keep_end"}, "rows are never cut silently; choose with `overlong_rows`"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False cannot be honoured"),
        ({"trust_remote_code": True}, "remote code is never executed"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True cannot be honoured"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True cannot be honoured"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter=True cannot be honoured"),
        ({"noise_schedule": "sine"}, "noise_schedule='sine' is unknown: choose one of linear"),
        ({"masking": "half"}, "masking='half' is unknown: choose one of exact_count, bernoulli"),
        ({"timestep_sampling": "sobol"}, "timestep_sampling='sobol' is unknown"),
        ({"loss_normalization": "batch"}, "loss_normalization='batch' is unknown: choose one of tokens, sequences"),
        ({"eos_policy": "many"}, "eos_policy='many' is unknown"),
        ({"invalid_rows": "keep"}, "invalid_rows='keep' is unknown: choose one of error, drop"),
        ({"overlong_rows": "cut"}, "overlong_rows='cut' is unknown"),
        ({"noise_epsilon": 1e-3}, "noise_epsilon=0.001 has no effect with masking='exact_count'"),
        ({"noise_epsilon": 2.0, "masking": "bernoulli"}, "noise_epsilon=2.0 must lie between 0 and 1"),
        ({"block_length": 32, "eos_policy": "one"}, "block_length=32 has no effect with eos_policy='one'"),
        ({"eos_policy": "pad_to_block"}, "eos_policy='pad_to_block' needs block_length"),
        ({"eos_policy": "pad_to_block", "block_length": 0}, "block_length=0 must be at least 1"),
        ({"eval_noise_samples": 0}, "eval_noise_samples=0 must be at least 1"),
        ({"overlong_rows": "drop", "max_length": None}, "overlong_rows='drop' has no effect with max_length=None"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, words):
    with pytest.raises(ValueError, match="1 problem in DiffusionConfig") as error:
        config(**arguments)
    assert words in str(error.value)


def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError, match="3 problems in DiffusionConfig"):
        config(padding_free=True, masking="half", block_length=8, eos_policy="none")


def test_defaults():
    assert config().noise_epsilon is None
    assert config(masking="bernoulli").noise_epsilon == 1e-3
    assert config(masking="bernoulli", noise_epsilon=0.01).noise_epsilon == 0.01
    assert config().logging_nan_inf_filter is False
