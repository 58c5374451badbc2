"""Prompts from files, and guidance from the command line."""

import json

import pytest

from dlm_tune.cli import main
from dlm_tune.commands.arguments import GenerateArguments
from dlm_tune.commands.generate import read_prompts
from dlm_tune.generation import config_for_tokenizer, decode_completion, generate, pad_prompts, tokenize_prompt
from dlm_tune.generation.config import DiffusionGenerationConfig
from dlm_tune.models import load_model, load_tokenizer
from tests.tiny_models import save_tiny_checkpoint

SAMPLER = {"max_new_tokens": 8, "block_length": 4, "steps": 8}


def test_only_line_feeds_separate_prompts(tmp_path):
    """JSON and text may hold U+2028, U+0085 or a form feed; Windows writes a byte order mark and CRLF."""
    prompts = ["one\u2028line", "two\x85lines", "three"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts), "utf-8")
    assert read_prompts(GenerateArguments(prompts_file=str(rows))) == prompts
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufeffone\x0cline\r\n\r\ntwo\r\n".encode())
    assert read_prompts(GenerateArguments(prompts_file=str(text))) == ["one\x0cline", "two"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), seed=3)


def run(checkpoint, tmp_path, prompts, **options):
    """Completions of the command."""
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    keys = {
        "model_name_or_path": checkpoint,
        "prompts_file": rows,
        "output_file": output,
        "use_cpu": True,
        "batch_size": 2,
        "stop_at_eos": "false",
    }
    flags = [str(word) for name, value in {**keys, **SAMPLER, **options}.items() for word in (f"--{name}", str(value))]
    status = main(["generate", *flags])
    return [json.loads(line)["completion"] for line in output.read_text().splitlines()] if status == 0 else None


@pytest.mark.parametrize("is_batched", [True, False])
def test_guidance_and_a_negative_prompt(checkpoint, tmp_path, capsys, is_batched):
    """The negative prompt is a user's turn where the prompt is one; the cost says that rows were computed twice."""
    model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
    config = DiffusionGenerationConfig(**SAMPLER, guidance_scale=1.5, stop_at_eos=False)
    config = config_for_tokenizer(config, tokenizer, model)
    text = "not this"
    prompts = ["abc", [{"role": "user", "content": "def"}], "a longer prompt"]
    negative = [text, [{"role": "user", "content": text}], text]
    for given in (None, negative):
        expected = []
        for row, prompt in enumerate(prompts):
            ids = pad_prompts([tokenize_prompt(tokenizer, prompt)], tokenizer.pad_token_id)[0]
            other = {}
            if given:
                other["negative_input_ids"] = pad_prompts([tokenize_prompt(tokenizer, given[row])], 0)[0]
            new = generate(model, ids, None, config, **other).sequences[0, ids.shape[1] :].tolist()
            expected.append(decode_completion(tokenizer, new, config.eos_token_ids))
        options = {"negative_prompt": text} if given else {}
        found = run(
            checkpoint, tmp_path, prompts, guidance_scale=1.5, guidance_batching=str(is_batched).lower(), **options
        )
        assert found == expected
    assert found != run(checkpoint, tmp_path, prompts)
    costs = [line for line in capsys.readouterr().out.splitlines() if "forward passes" in line]
    passes = 16 if is_batched else 32
    assert f"{passes} forward passes of 48 rows" in costs[0]
    assert "16 forward passes of 24 rows" in costs[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative_prompt": "x"}, "negative_prompt has no effect with guidance_scale=0"),
        ({"guidance_schedule": "linear"}, "guidance_schedule='linear' has no effect with guidance_scale=0"),
        ({"guidance_scale": 1, "guidance_interval": "[0.2, 0.8]"}, "no effect with guidance_schedule='constant'"),
        ({"guidance_scale": 1, "guidance_schedule": "interval"}, "needs guidance_interval"),
        (
            {"guidance_scale": 1, "guidance_schedule": "interval", "guidance_interval": "[0.9, 1]"},
            "guidance_interval=[0.9, 1] holds none of the 8 steps, which begin at committed shares of 0, 0.125,",
        ),
        (
            {"guidance_scale": 1, "guidance_schedule": "linear", "steps": 1, "block_length": 8},
            "guidance_schedule='linear' guides no step: w is 0 in the first step",
        ),
    ],
)
def test_guidance_without_effect_is_refused_before_anything_loads(tmp_path, capsys, options, words):
    assert run(tmp_path / "no such model", tmp_path, ["a"], **options) is None
    assert words in capsys.readouterr().err


def test_an_interval_is_read(checkpoint, tmp_path):
    options = {"guidance_scale": 2, "guidance_schedule": "interval", "guidance_interval": "[0.25, 0.5]"}
    assert run(checkpoint, tmp_path, ["abc"], **options) != run(checkpoint, tmp_path, ["abc"])


def test_prompts_that_cannot_guide_are_refused_unless_there_is_another(checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, ["", "", ""], guidance_scale=1) is None
    assert "guidance_scale=1 cannot guide: the prompts are empty" in capsys.readouterr().err
    assert len(run(checkpoint, tmp_path, ["", "", "abc"], guidance_scale=1)) == 3
    assert len(run(checkpoint, tmp_path, ["", "", ""], guidance_scale=1, negative_prompt="abc")) == 3


def test_prompts_that_fill_the_model_can_only_be_shortened(checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path, ["a" * 600]) is None
    message = capsys.readouterr().err
    assert message.rstrip().endswith("Shorten the prompts.")
