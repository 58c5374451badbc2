"""`dlm-tune convert`: what it writes, what it says, and which keys do nothing."""

import re

import pytest
import torch
from safetensors.torch import save_file

from dlm_tune import load_model
from dlm_tune.cli import main
from tests.models.layouts import config_json, logits_of
from tests.models.test_convert import NUM_TOKENS, save_causal
from tests.models.test_smdm import HEADS, plain_tokenizer, smdm_tensors


def test_a_causal_checkpoint_is_converted(tmp_path, capsys):
    source = save_causal(tmp_path / "ar", vocab_size=NUM_TOKENS)
    out = tmp_path / "out"
    command = ["convert", "--model_name_or_path", str(source), "--output_dir", str(out), "--dtype", "bfloat16"]
    command += ["--mask_token", "<M>", "--mask_embedding", "<|dlm_pad|>", "--logits_shift", "false"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"embedding rows +128, before 103$", printed, re.MULTILINE)
    assert re.search(r"mask token +<M>, id 103, embedding: row of '<\|dlm_pad\|>'$", printed, re.MULTILINE)
    assert re.search(r"logits shift +no:", printed)
    assert "qwen3, " in printed
    assert "bfloat16" in printed
    model = load_model(out, dtype="auto")
    assert (model.dtype, model.config.logits_shift, model.config.mask_token_id) == (torch.bfloat16, False, NUM_TOKENS)
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite", "true"]) == 0


def test_a_checkpoint_of_smdm_is_converted(tmp_path, capsys):
    save_file(smdm_tensors(HEADS), tmp_path / "mdm.safetensors")
    plain_tokenizer().save_pretrained(tmp_path / "words")
    command = ["convert", "--source", "smdm", "--model_name_or_path", str(tmp_path / "mdm.safetensors")]
    command += ["--tokenizer_name_or_path", str(tmp_path / "words"), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 2
    assert "give its number of heads as num_heads" in capsys.readouterr().err
    assert main([*command, "--num_heads", str(HEADS)]) == 0
    assert "logits shift    no" in capsys.readouterr().out
    assert config_json(tmp_path / "out")["num_attention_heads"] == HEADS
    assert logits_of(load_model(tmp_path / "out"), torch.tensor([[5, 6]])).isfinite().all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_heads", "4"], "num_heads = 4 has no effect with source: hf"),
        (["--architecture", "Diff_LLaMA_6M"], "no effect with source: hf"),
        (["--tokenizer_name_or_path", "words"], "no effect with source: hf"),
        (["--source", "smdm", "--mask_token", "<M>"], "mask_token = '<M>' has no effect with source: smdm"),
        (["--source", "smdm", "--logits_shift", "true"], "no effect with source: smdm"),
        (["--source", "smdm"], "tokenizer_name_or_path is missing"),
        (["--source", "gguf"], "source"),
        (["--dtype", "auto"], "dtype"),
        (["--use_peft", "true"], "use_peft"),
    ],
)
def test_keys_that_do_nothing_are_refused(flags, message, tmp_path, capsys):
    command = ["convert", "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out"), *flags]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert main(["convert"]) == 2
    error = capsys.readouterr().err
    assert "model_name_or_path is missing" in error
    assert "output_dir is missing" in error
