"""What the verbs load."""

import json
from types import SimpleNamespace

import pytest
import torch
from trl import ModelConfig

from dlm_tune.commands.checkpoint import find_base, quantization


def test_quantisation_keys_are_honoured():
    arguments = ModelConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True, bnb_4bit_quant_storage="bfloat16"
    )
    config = quantization(arguments, torch.float32)
    assert config.bnb_4bit_quant_type == "fp4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_storage == torch.bfloat16
    assert config.bnb_4bit_compute_dtype == torch.float32
    assert quantization(ModelConfig(load_in_8bit=True), None) == "8bit"
    assert quantization(ModelConfig(), None) is None
    assert quantization(SimpleNamespace(load_in_4bit=True, load_in_8bit=False), None) == "4bit"


def test_adapter_of_a_base_that_was_moved_names_the_remedy(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./gone/model"}))
    with pytest.raises(
        ValueError, match=r"adapter of \./gone/model, which does not exist .* --model_name_or_path BASE"
    ):
        find_base(str(tmp_path), None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "organisation/model"}))
    assert find_base(str(tmp_path), None) == ("organisation/model", str(tmp_path))
