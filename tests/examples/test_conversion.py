"""The conversion experiments: glosses of a hand-made dictionary, the autoregressive loss, a smoke run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples/conversion"
NOUNS = """  1 This software and database is being provided to you | the LICENSEE
00000001 05 n 01 cat 0 001 @ 00000002 n 0000 | a small Animal that purrs; "the cat | sat"
00000002 05 n 01 dog 0 000 | an animal's kin, that barks (loudly) in the night and runs after cats all day
00000003 05 n 01 hound 0 000 | a small animal that purrs
00000004 18 n 01 baker 0 000 | someone who bakes
00000005 18 n 01 elf 0 000 | an elf
"""


def load_script(name: str):
    """A script by its path: other examples have a run.py too; `ar_model` is imported by its name."""
    spec = importlib.util.spec_from_file_location(
        name if name == "ar_model" else f"conversion_{name}", FOLDER / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ar_model = load_script("ar_model")


def test_glosses_of_a_dictionary(tmp_path):
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/data.noun").write_text(NOUNS)
    training, held_out = ar_model.read_glosses(ar_model.find_nouns(tmp_path))
    # once each; too long and too short ones, and the licence, are left out
    assert sorted([*training, *held_out]) == ["a small animal that purrs", "someone who bakes"]
    with pytest.raises(SystemExit, match="there is no file data"):
        ar_model.find_nouns(tmp_path / "none")


def test_the_autoregressive_loss_is_transformers_own():
    tokenizer = ar_model.character_tokenizer()
    model = ar_model.untrained_model(tokenizer, seed=0).eval()
    glosses = ["a small animal that purrs", "someone who bakes"]
    losses = ar_model.token_losses(model, tokenizer, glosses)
    assert len(losses) == sum(len(gloss) + 1 for gloss in glosses)
    alone = []
    for gloss in glosses:
        ids = tokenizer(ar_model.BOS + gloss + ar_model.EOS, return_tensors="pt").input_ids
        assert ids.shape[1] == len(gloss) + 2
        with torch.no_grad():
            alone.append(model(input_ids=ids, labels=ids).loss * (len(gloss) + 1))
    assert losses.sum().item() == pytest.approx(sum(alone).item(), rel=1e-5)


def test_smoke_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra `guidance`")
    run, plot = load_script("run"), load_script("plot")
    words = ["small", "animal", "person", "bakes", "in the night", "that runs", "of a kind", "house"]
    lines = [
        f"0 05 n 01 x 0 000 | the {first} {second} {third}" for first in words for second in words for third in words
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    results = tmp_path / "nelbo.jsonl"
    flags = f"--wordnet {tmp_path} --results_file {results} --output_dir {tmp_path / 'out'} --seeds 0 --ar_steps 2"
    flags += " --num_steps 2 --eval_steps 2 --annealing_steps 2 --arms scratch shift_annealing"
    monkeypatch.setattr(sys, "argv", ["run.py", *flags.split()])
    run.main()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["arm"] for row in rows if "command" in row] == ["scratch", "shift_annealing"]
    held_out = {(row["arm"], row["attention"], row["step"]): row["nelbo"] for row in rows if "attention" in row}
    assert len(held_out) == 6
    assert held_out["shift_annealing", "full", 2] < held_out["shift_annealing", "full", 0]
    assert held_out["scratch", "full", 0] != held_out["shift_annealing", "full", 0]
    shares = [
        row["right_context"] for row in rows if row["arm"] == "shift_annealing" and row.get("kind") == "training"
    ]
    assert shares == [0.5, 1.0]
    run.main()
    assert len(results.read_text().splitlines()) == len(rows), "what is finished is not done again"
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results_file", str(results), "--output_dir", str(tmp_path)])
    capsys.readouterr()
    plot.main()
    assert "| `shift_annealing` | 1 |" in capsys.readouterr().out
    assert "AR weights, shift, annealing" in (tmp_path / "conversion-nelbo.svg").read_text()
