"""The memory that the QLoRA recipes state is what `inspect --estimate` computes from the published configs."""

import json
import re

import pytest

from dlm_tune.cli import main
from dlm_tune.models import DreamConfig, LLaDAConfig
from dlm_tune.shipped import shipped_root
from tests.tiny_models import tiny_tokenizer

TOKEN_IDS = {"mask_token_id": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # of the tiny tokenizer
CONFIGS = {
    "llada-8b": lambda: LLaDAConfig(**TOKEN_IDS),
    "dream-7b": lambda: DreamConfig(
        hidden_size=3584,
        num_hidden_layers=28,
        max_window_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        max_position_embeddings=131072,
        **TOKEN_IDS,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", CONFIGS)
def test_stated_memory_is_the_estimate(model, tmp_path, capsys):
    recipe = (shipped_root() / "recipes" / model / "sft" / "qlora.yaml").read_text()
    max_length = int(re.search(r"^max_length: (\d+)", recipe, re.MULTILINE)[1])
    CONFIGS[model]().save_pretrained(tmp_path / "model")
    tiny_tokenizer("llada" if model == "llada-8b" else "Dream").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a" * (max_length - 60)}]
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(2 * (json.dumps({"messages": messages}) + "\n"))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    assert main(["inspect", "--estimate", "--debug", "--config", f"{model}/sft/qlora", *flags]) == 0
    printed = capsys.readouterr().out

    def figure(name: str) -> float:
        return float(re.search(rf"^  {name} +([\d.]+)", printed, re.MULTILINE)[1])

    def stated(name: str) -> float:
        return float(re.search(rf"^#   {name}.* ([\d.]+)$", recipe, re.MULTILINE)[1])

    for term, line in {
        "weights": "weights",
        "optimiser state": "optimiser state",
        "gradients": "gradients",
        "activations": "layer inputs kept",
        "tensors together": "tensors together",
    }.items():
        assert figure(term) == pytest.approx(stated(line), abs=0.02)
    assert figure("all") < 23
