"""What `inspect` prints, against the definitions; recipes that it must not trip over."""

import re

import pytest
import torch

from dlm_tune.cli import main
from dlm_tune.commands.inspect_batch import noise_bucket, token_kinds
from dlm_tune.diffusion import NoisyBatch
from dlm_tune.trainers.statistics import NUM_BUCKETS, row_statistics
from tests.test_recipes_shipped import write_rows
from tests.tiny_models import EOS_ID, save_tiny_checkpoint, tiny_tokenizer


def test_recipe_that_evaluates_and_keeps_the_best_checkpoint(tmp_path, capsys):
    save_tiny_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "data", "pairs")
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset_name: {tmp_path}/data\noutput_dir: {tmp_path}/run\n"
        "max_steps: 4\nsave_strategy: steps\nsave_steps: 2\neval_strategy: steps\neval_steps: 2\nuse_cpu: true\n"
        "load_best_model_at_end: true\nmetric_for_best_model: eval_nelbo\nsave_total_limit: 1\n"
    )
    assert main(["inspect", "--debug", "--config", str(tmp_path / "recipe.yaml"), "--rows", "1"]) == 0
    assert "row" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# Figures that a person can check by hand


def workspace(tmp_path, **settings):
    """A recipe on 24 rows `past of w7: ` -> `w7ed`, 12 rows a step in two microbatches."""
    save_tiny_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "data", "pairs")
    keys = {
        "model_name_or_path": f"{tmp_path}/model",
        "dataset_name": f"{tmp_path}/data",
        "output_dir": f"{tmp_path}/run",
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "max_length": 64,
        "use_cpu": "true",
        "save_strategy": '"no"',
        "eos_policy": "one",
        "noise_schedule": "linear",
        **settings,
    }
    (tmp_path / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return str(tmp_path / "recipe.yaml")


ROW = re.compile(
    r"row (?P<index>\d+): (?:columns (?P<first>\d+)-(?P<last>\d+), )?t (?P<t>[\d.]+), weight (?P<weight>[\d./e-]+), "
    r"denominator (?P<denominator>\d+), (?P<masked>\d+) of (?P<targets>\d+) targets masked, (?P<tokens>\d+) tokens\n"
    r"  (?P<text>.*)\n(?:  weights: (?P<weights>.*)\n)?"
)


def inspect_rows(capsys, recipe, *flags):
    assert main(["inspect", "--debug", "--config", recipe, "--rows", "99", "--token_weights", *flags]) == 0
    printed = capsys.readouterr().out
    rows = [match.groupdict() for match in ROW.finditer(printed)]
    assert rows
    for row in rows:
        row["weights"] = [float(weight) for weight in re.findall(r"\[.\S*\] ([\d.e-]+)", row["weights"] or "")]
        assert len(row["weights"]) == int(row["masked"])
    return printed, rows


def cart_weights(text: str) -> list[float]:
    """Dream's weights with p = 0.3, straight from the marked text: every character is one token."""
    text = re.sub(r"(EOS|FILL)(?:x(\d+))?", lambda match: "." * int(match[2] or 1), re.sub(r"PAD(x\d+)?", "", text))
    visible = []
    inside = False
    for character in text:
        inside = (inside or character == "[") and character != "]"
        if character not in "[]{}":
            visible.append(not inside)
    return [
        sum(0.3 * 0.7 ** (abs(n - m) - 1) for m, seen in enumerate(visible) if seen) / 2
        for n, own in enumerate(visible)
        if not own
    ]


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("weighting", ["nelbo", "uniform", "cart"])
def test_printed_weights_and_denominators_give_the_loss(tmp_path, capsys, weighting, normalization, packing):
    """Each printed figure against its definition, computed from the other figures and the marked text."""
    recipe = workspace(tmp_path, loss_weighting=weighting, loss_normalization=normalization, packing=packing)
    _, rows = inspect_rows(capsys, recipe)
    num_targets = sum(int(row["targets"]) for row in rows)
    for row in rows:
        targets, masked = int(row["targets"]), int(row["masked"])
        expected = {
            "nelbo": [targets / masked] * masked,
            "uniform": [1.0] * masked,
            "cart": cart_weights(row["text"]),
        }[weighting]
        assert row["weights"] == pytest.approx(expected, rel=1e-3)
        summary = [float(value) for value in row["weight"].split("/")]
        spread = [min(expected), sum(expected) / masked, max(expected)]
        assert summary == pytest.approx(spread if len(summary) == 3 else [spread[1]], rel=1e-3)
        assert int(row["denominator"]) == (num_targets if normalization == "tokens" else targets * len(rows))
    if weighting == "nelbo":
        total = sum(sum(row["weights"]) / int(row["denominator"]) for row in rows)
        assert total == pytest.approx(1, rel=1e-3), "a model with the same loss at every token gets that loss"


def test_packed_documents_fill_their_sequences_without_overlap(tmp_path, capsys):
    printed, rows = inspect_rows(capsys, workspace(tmp_path, packing="true", per_device_train_batch_size=2))
    headers = re.findall(
        r"microbatch (\d+), sequence (\d+): (\d+) documents, (\d+) of (\d+) columns \(([\d.]+)%\)", printed
    )
    assert [header[:2] for header in headers] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert sum(int(header[2]) for header in headers) == len(rows)
    remaining = iter(rows)
    for _, _, documents, tokens, length, percent in headers:
        end = -1
        for row in (next(remaining) for _ in range(int(documents))):
            assert int(row["first"]) == end + 1
            end = int(row["last"])
            assert end - int(row["first"]) + 1 == int(row["tokens"])
        assert end + 1 == int(tokens) <= int(length)
        assert float(percent) == pytest.approx(100 * int(tokens) / int(length), abs=0.05)
    tokens, positions, share = re.search(r"positions: (\d+) of (\d+) hold tokens \(([\d.]+)%\)", printed).groups()
    assert int(tokens) == sum(int(row["tokens"]) for row in rows)
    assert float(share) == pytest.approx(100 * int(tokens) / int(positions), abs=0.05)
    assert "PAD" not in printed.split("\n\n", 1)[1]


def test_buckets_add_up(tmp_path, capsys):
    printed, rows = inspect_rows(capsys, workspace(tmp_path, loss_weighting="uniform"))
    table = re.findall(r"^ +(\d+)-(\d+) % +(\d+) +(\d+) +([\d.]+)%$", printed, re.MULTILINE)
    assert [(int(low), int(high)) for low, high, *_ in table] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    all_masked = sum(int(row["masked"]) for row in rows)
    for low, high, num_rows, masked, share in table:
        fractions = [int(row["masked"]) / int(row["targets"]) for row in rows]
        chosen = [
            int(row["masked"])
            for row, fraction in zip(rows, fractions, strict=True)
            if int(low) <= 100 * fraction < int(high) or fraction == 1 == int(high) / 100
        ]
        assert (int(num_rows), int(masked)) == (len(chosen), sum(chosen))
        assert float(share) == pytest.approx(100 * sum(chosen) / all_masked, abs=0.06), "weights are all 1 / targets"


def test_kinds_of_tokens_of_a_shortened_row():
    tokenizer = tiny_tokenizer()
    a = tokenizer.convert_tokens_to_ids("a")
    batch = {
        "input_ids": torch.tensor([[a, a, EOS_ID, EOS_ID, EOS_ID, EOS_ID], [a, a, a, a, EOS_ID, EOS_ID]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]),
        "target_mask": torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool),
        "eos_padding_mask": torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool),
    }
    masked = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    batch["noisy"] = NoisyBatch(batch["input_ids"], masked, torch.ones(2), torch.zeros(2))
    assert token_kinds(batch, 0, tokenizer) == ["prompt", "masked", "eos", "fill", "masked_fill", "padding"]
    assert token_kinds(batch, 1, tokenizer) == ["masked", "target", "cut", "cut", "padding", "padding"]


def test_buckets_are_those_of_the_training_log():
    num_targets = torch.tensor([4, 4, 4, 4, 9, 1, 0])
    num_masked = torch.tensor([1, 2, 3, 4, 2, 1, 0])
    assert noise_bucket(num_masked, num_targets).tolist() == [1, 2, 3, 3, 0, 3, 0]
    target_mask = torch.arange(9)[None] < num_targets[:, None]
    masked = torch.arange(9)[None] < num_masked[:, None]
    noisy = NoisyBatch(torch.zeros(7, 9), masked, torch.ones(7), torch.zeros(7))
    nll = torch.ones(int(masked.sum()))
    counts = row_statistics(nll, nll > 0, noisy, target_mask)[:, -NUM_BUCKETS:]  # masked tokens by bucket
    assert [row.argmax().item() for row in counts[:-1]] == noise_bucket(num_masked, num_targets).tolist()[:-1]


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
def test_hidden_prompts_and_the_denominator_of_each_part(tmp_path, capsys, normalization):
    """Of 12 rows 4 are unpaired: their prompts stand in parentheses, and each part has a denominator of its own."""
    (tmp_path / "text.txt").write_text("".join(f"{letter * 9}\n" for letter in "abcdefgh"))
    recipe = workspace(
        tmp_path,
        unpaired_dataset=tmp_path / "text.txt",
        unpaired_fraction=1 / 3,
        loss_normalization=normalization,
    )
    assert main(["inspect", "--debug", "--config", recipe, "--rows", "12", "--color", "never"]) == 0
    rows = [match.groupdict() for match in re.finditer(ROW, capsys.readouterr().out)]
    assert len(rows) == 12
    unpaired = [row for row in rows if row["text"].startswith("(past of w")]
    paired = [row for row in rows if row["text"].startswith("past of w")]
    assert (len(unpaired), len(paired)) == (4, 8)
    assert all(re.search(r"\(past of w\d+: \)", row["text"]) for row in unpaired)
    for part in (unpaired, paired):
        total = sum(int(row["targets"]) for row in part) * 12 / len(part)
        for row in part:
            items = total if normalization == "tokens" else 12 * int(row["targets"])
            assert float(row["denominator"]) == pytest.approx(items, rel=1e-5)
