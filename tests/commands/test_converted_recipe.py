"""The memory that the recipe for converted models states is what `inspect --estimate` computes from the config."""

import json
import re

import pytest
from transformers import Qwen3Config

from dlm_tune.cli import main
from dlm_tune.shipped import shipped_root
from tests.tiny_models import tiny_tokenizer


@pytest.mark.slow
def test_stated_memory_is_the_estimate(tmp_path, capsys):
    recipe = (shipped_root() / "recipes" / "qwen3-0.6b" / "pretrain" / "converted.yaml").read_text()
    config = Qwen3Config(  # as published for Qwen3-0.6B-Base, and as `convert` writes it but for the ids
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        is_causal=False,
        logits_shift=True,
        mask_token_id=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    config.save_pretrained(tmp_path / "model")
    tiny_tokenizer("Dream").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 80), ("test", 8)):
        row = json.dumps({"text": "a" * 2047}) + "\n"
        (tmp_path / "data" / f"{split}.jsonl").write_text(count * row)
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    flags += ["--dataset_config", "null", "--dataset_train_split", "train", "--test_split_size", "4"]
    flags += ["--dataset_num_proc", "null"]
    assert main(["inspect", "--estimate", "true", "--config", "qwen3-0.6b/pretrain/converted", *flags]) == 0
    printed = capsys.readouterr().out
    assert "596,049,920 parameters" in printed
    names = ("weights", "weights in autocast's type", "gradients", "optimiser state", "activations", "LM head")
    for name in (*names, "tensors together"):
        found = float(re.search(rf"^  {name} +([\d.]+)", printed, re.MULTILINE)[1])
        stated = float(re.search(rf"^#   {name}(?:,| of| on)? .* ([\d.]+)$", recipe, re.MULTILINE)[1])
        assert found == pytest.approx(stated, abs=0.05), name
    assert float(re.search(r"^  all +([\d.]+)", printed, re.MULTILINE)[1]) < 22
