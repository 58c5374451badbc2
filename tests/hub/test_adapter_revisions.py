"""An adapter remembers the revision of its base, and is found by its name on the Hub."""

import json

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from trl import ModelConfig

from dlm_tune import load_model
from dlm_tune.commands.adapter import adapter_config, earlier_adapter
from dlm_tune.commands.checkpoint import load_checkpoint
from dlm_tune.models import write_adapter_facts
from dlm_tune.models.adapters import complete_peft_config
from tests.models.test_loading import logits_of
from tests.tiny_models import save_tiny_checkpoint

TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def test_the_base_is_loaded_at_the_revision_of_training(hub, tmp_path):
    api = HfApi()
    api.create_repo("user/base")
    for seed in (1, 2):  # main moves on
        folder = save_tiny_checkpoint(tmp_path / f"base{seed}", seed=seed)
        api.upload_folder(repo_id="user/base", folder_path=folder)
        if seed == 1:
            api.create_tag("user/base", tag="v1")
    model = load_model("user/base", revision="v1")
    adapted = get_peft_model(model, complete_peft_config(LoraConfig(r=2, init_lora_weights=False), model)).eval()
    expected = logits_of(adapted, TOKENS)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    write_adapter_facts(adapter, model.config)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("user/base", "v1")
    assert torch.equal(logits_of(load_model(adapter), TOKENS), expected)
    arguments = ModelConfig(model_name_or_path=str(adapter))
    loaded, tokenizer = load_checkpoint(arguments, is_trainable=True)
    assert torch.equal(logits_of(loaded, TOKENS), expected)
    assert len(tokenizer) <= 128
    api.create_repo("user/adapter")
    api.upload_folder(repo_id="user/adapter", folder_path=adapter)
    arguments = ModelConfig(model_name_or_path="user/adapter")
    assert earlier_adapter(arguments) is not None
    assert adapter_config(arguments).r == 2
    assert earlier_adapter(ModelConfig(model_name_or_path="user/base")) is None
    loaded, _ = load_checkpoint(arguments, is_trainable=True)
    assert torch.equal(logits_of(loaded, TOKENS), expected)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
