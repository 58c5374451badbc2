"""The facts of the families agree with the models they are about."""

from pathlib import Path

import pytest
import torch

from dlm_tune.models import FAMILIES, end_of_turn_ids, load_model
from tests.models.test_loading import DECODERS, save_decoder
from tests.tiny_models import save_tiny_checkpoint, tiny_tokenizer


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora_targets_are_all_linear_layers_but_the_head(model_type: str, tmp_path: Path) -> None:
    save = save_decoder if model_type in DECODERS else save_tiny_checkpoint
    model = load_model(save(tmp_path, model_type))
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(FAMILIES[model_type].lora_target_modules) == linear - {"lm_head"}
    assert model.config.logits_shift is FAMILIES[model_type].logits_shift


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_end_of_turn_is_found_in_the_vocabulary(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    assert end_of_turn_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(FAMILIES[family].end_of_turn_token)}
