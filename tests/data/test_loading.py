"""Sources, splits and mixtures, on real files."""

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, get_dataset

from dlm_tune.data import DatasetArguments, load_datasets, load_unpaired
from dlm_tune.data.loading import _repeat_to_weights, _sizes_without_repetition  # the arithmetic of mixtures

disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(path, count, letter="a"):
    return jsonl(path, [{"prompt": f"{letter}{number}", "completion": "x"} for number in range(count)])


def load(seed=0, text_field="text", **section):
    return load_datasets(DatasetArguments(**section), seed, text_field=text_field)


ROWS = [{"prompt": "NA", "completion": "7"}, {"prompt": "x, y", "completion": "null"}]


def write_json(path):
    path.write_text(json.dumps(ROWS))


def write_jsonl(path):
    jsonl(path, ROWS)


def write_csv(path):
    path.write_text('prompt,completion\nNA,7\n"x, y",null\n')


def write_parquet(path):
    Dataset.from_list(ROWS).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.json", write_json), ("a.jsonl", write_jsonl), ("a.csv", write_csv), ("a.parquet", write_parquet)],
)
def test_the_same_rows_from_every_file_format(tmp_path, name, write):
    """A CSV cell is text, be it 7, NA or null."""
    write(tmp_path / name)
    train, evaluation = load(dataset_name=str(tmp_path / name))
    assert train.to_list() == ROWS
    assert evaluation is None
    packed = tmp_path / "packed" / (name + ".gz")
    packed.parent.mkdir()
    if name != "a.parquet":
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert load(dataset_name=str(packed))[0].to_list() == ROWS


@pytest.mark.parametrize(
    "text", ["\ufeffprompt,completion\na,b\n", '\ufeff"prompt",completion\na,b\n', ",prompt,completion\n0,a,b\n"]
)
def test_csv_of_spreadsheets_and_of_data_frames(tmp_path, text):
    """A byte order mark, as Excel writes it; a column without a name, as `DataFrame.to_csv` writes its index."""
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert load(dataset_name=str(tmp_path / "a.csv"))[0].to_list() == [{"prompt": "a", "completion": "b"}]


def test_a_folder_may_have_the_name_of_a_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    write_jsonl(Path("text") / "a.jsonl")
    assert load(dataset_name="text")[0].to_list() == ROWS


def test_a_text_file_is_one_row_a_line_without_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load(dataset_name=str(tmp_path / "a.txt"))[0].to_list() == [{"text": "one"}, {"text": "two"}]


def test_a_changed_file_is_read_again(tmp_path):
    path = pairs(tmp_path / "a.jsonl", 2)
    assert len(load(dataset_name=path)[0]) == 2
    pairs(tmp_path / "a.jsonl", 3)
    assert len(load(dataset_name=path)[0]) == 3


def test_a_directory_with_splits_in_its_file_names(tmp_path):
    pairs(tmp_path / "train-1.jsonl", 2)
    pairs(tmp_path / "train-2.jsonl", 3, "b")
    pairs(tmp_path / "test.jsonl", 1, "t")
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "dataset_info.json").write_text("{}")
    train, evaluation = load(dataset_name=str(tmp_path))
    assert sorted(train["prompt"]) == ["a0", "a1", "b0", "b1", "b2"]
    assert evaluation["prompt"][:] == ["t0"]
    assert (
        load(dataset_name=str(tmp_path), dataset_train_split="train[:2]", eval_dataset_name=str(tmp_path))[0].num_rows
        == 2
    )


def test_a_directory_without_split_names_is_all_training_data(tmp_path):
    pairs(tmp_path / "one.jsonl", 2)
    pairs(tmp_path / "two.jsonl", 3)
    (tmp_path / "LICENSE").write_text("MIT")
    train, evaluation = load(dataset_name=str(tmp_path))
    assert (len(train), evaluation) == (5, None)


def test_a_saved_data_set(tmp_path):
    Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]]}).save_to_disk(tmp_path / "saved")
    assert load(dataset_name=str(tmp_path / "saved"))[0].to_list() == [{"input_ids": [1, 2], "labels": [-100, 2]}]


def test_an_evaluation_file(tmp_path):
    train, evaluation = load(
        dataset_name=pairs(tmp_path / "a.jsonl", 3), eval_dataset_name=pairs(tmp_path / "b.jsonl", 2, "b")
    )
    assert (len(train), evaluation["prompt"][:]) == (3, ["b0", "b1"])


@pytest.mark.parametrize(("size", "expected"), [(0.25, 5), (7, 7)])
def test_held_out_rows_are_on_one_side_and_fixed_by_the_seed(tmp_path, size, expected):
    path = pairs(tmp_path / "a.jsonl", 20)
    train, evaluation = load(dataset_name=path, test_split_size=size)
    assert len(evaluation) == expected
    assert sorted(train["prompt"][:] + evaluation["prompt"][:]) == sorted(f"a{number}" for number in range(20))
    assert load(dataset_name=path, test_split_size=size)[1]["prompt"][:] == evaluation["prompt"][:]
    assert load(dataset_name=path, test_split_size=size, seed=1)[1]["prompt"][:] != evaluation["prompt"][:]


def test_fraction_means_what_it_means_in_trl(tmp_path):
    entries = [
        {"path": "json", "data_files": pairs(tmp_path / "a.jsonl", 10), "fraction": 0.7},
        {"path": "json", "data_files": pairs(tmp_path / "b.jsonl", 9, "b"), "fraction": 0.2},
    ]
    expected = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in entries]))["train"]
    assert load(datasets=entries)[0].to_list() == expected.to_list()


def test_weight_repeats_the_small_set_to_its_share(tmp_path):
    """A quarter of the mixture from 4 rows, three quarters from 36: 12 rows from 4, none of the 36 lost."""
    entries = [
        {"path": pairs(tmp_path / "rare.jsonl", 4, "r"), "weight": 1},
        {"path": pairs(tmp_path / "common.jsonl", 36, "c"), "weight": 3},
    ]
    train, _ = load(datasets=entries)
    counts = Counter(train["prompt"][:])
    assert [counts[f"r{number}"] for number in range(4)] == [3] * 4
    assert [counts[f"c{number}"] for number in range(36)] == [1] * 36


def test_a_repeated_row_is_never_held_out_too(tmp_path):
    entries = [
        {"path": pairs(tmp_path / "rare.jsonl", 10, "r"), "weight": 1},
        {"path": pairs(tmp_path / "common.jsonl", 40, "c"), "weight": 1},
    ]
    train, evaluation = load(datasets=entries, test_split_size=0.3)
    assert len(evaluation) == 15
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert len(set(train["prompt"])) == 35
    origins = Counter(prompt[0] for prompt in train["prompt"])
    assert origins["r"] == origins["c"]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 5), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_mixture_arithmetic(sizes, weights):
    weights = weights[: len(sizes)]
    shares = [weight / sum(weights) for weight in weights]
    bounds = np.cumsum([0, *sizes])
    groups = [np.arange(start, stop) for start, stop in itertools.pairwise(bounds)]
    repeated = _repeat_to_weights(groups, weights, np.random.default_rng(0))
    total = sum(len(rows) for rows in repeated)
    for group, rows, share in zip(groups, repeated, shares, strict=True):
        counts = np.bincount(rows - group[0], minlength=len(group))
        assert counts.min() >= 1, "no row is left out"
        assert counts.max() - counts.min() <= 1, "rows of one set are repeated equally often"
        assert abs(len(rows) - share * total) <= len(sizes)
    cut = _sizes_without_repetition(sizes, weights)
    assert all(0 <= kept <= size for kept, size in zip(cut, sizes, strict=True))
    assert any(kept == size for kept, size in zip(cut, sizes, strict=True))


def test_columns_outside_the_format_go(tmp_path):
    """A lone `prompt` beside `messages` (as in several published sets) would mislead TRL's preparation."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "prompt_id": "1", "messages": messages}])
    assert load(dataset_name=path)[0].column_names == ["messages"]


def bad_line(folder):
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"\n')


def not_an_object(folder):
    (folder / "a.jsonl").write_text('{"text": "a"}\n["b"]\n')


def uneven_csv(folder):
    (folder / "a.csv").write_text("prompt,completion\na,b\nc,d,e\n")


def mixed_formats(folder):
    pairs(folder / "a.jsonl", 1)
    (folder / "b.txt").write_text("x\n")


def half_named(folder):
    pairs(folder / "train.jsonl", 1)
    pairs(folder / "extra.jsonl", 1)


@pytest.mark.parametrize(
    ("write", "name", "words"),
    [
        (lambda folder: pairs(folder / "pairs.jsonl", 1), "pears.jsonl", "no such file.*Did you mean 'pairs.jsonl'"),
        (lambda folder: None, "nowhere/a.jsonl", "no such file or directory. The nearest directory that exists is"),
        (bad_line, "a.jsonl", r"a.jsonl', line 3 is not valid JSON \(.*\): \{\"text\": \"c\""),
        (not_an_object, "a.jsonl", r"a.jsonl', line 2 is not a JSON object: \[\"b\"\]"),
        (
            lambda folder: (folder / "a.json").write_text('[{"text": "a"},\n{"text": }]'),
            "a.json",
            "not valid JSON, line 2",
        ),
        (lambda folder: (folder / "a.jsonl").write_text(" \n"), "a.jsonl", "the file '.*a.jsonl' is empty"),
        (lambda folder: (folder / "a.csv").write_text("prompt,completion\n"), "a.csv", "a header but no rows"),
        (uneven_csv, "a.csv", "cannot be read as csv"),
        (
            lambda folder: (folder / "a.csv").write_text("prompt,completion\na,b, c\nd,e\n"),
            "a.csv",
            "has 2 columns, but its first row has 3 cells",
        ),
        (lambda folder: (folder / "a.parquet").write_text("junk"), "a.parquet", "cannot be read as parquet"),
        (
            lambda folder: (folder / "a.xlsx").write_text("junk"),
            "a.xlsx",
            "the ending '.xlsx' is unknown. Readable: .json",
        ),
        (mixed_formats, "", "the directory mixes the formats json, text"),
        (half_named, "", "extra.jsonl does not, and would be left out"),
        (lambda folder: None, "", "the directory has no data files"),
        (
            lambda folder: jsonl(folder / "a.jsonl", [{"promt": "a", "completion": "b"}]),
            "a.jsonl",
            "Did you mean 'prompt'",
        ),
        (
            lambda folder: jsonl(folder / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            "a.jsonl",
            "`chosen` and `rejected` are for preference training",
        ),
        (
            lambda folder: jsonl(folder / "a.jsonl", [{"text": "a", "prompt": "a", "completion": "b"}]),
            "a.jsonl",
            "the columns of several formats: prompt \\+ completion, text. Name those to use",
        ),
    ],
)
def test_bad_sources(tmp_path, write, name, words):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load(dataset_name=str(folder / name))
    assert "dataset_name=" in str(caught.value)


def test_a_missing_relative_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    """`data/train.jsonl` would be a legal Hub name: the ending says that it is a path."""
    (tmp_path / "data").mkdir()
    pairs(tmp_path / "data" / "training.jsonl", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("looked up"))
    with pytest.raises(
        ValueError, match=r"data/train.jsonl'.*no such file or directory. Did you mean 'training.jsonl'"
    ):
        load(dataset_name="data/train.jsonl")


def test_a_hub_name_offline_says_that_no_local_path_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="dataset_name='user/nothing': there is no such local path, and the Hub"):
        load(dataset_name="user/nothing")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"dataset_train_split": "tain"}, r"dataset_train_split='tain'.*the splits \['train'\]. Did you mean 'train'"),
        ({"dataset_test_split": "validation"}, r"dataset_test_split='validation'.*the splits \['train'\]"),
        ({"dataset_train_split": "train[:x]"}, "A slice is written"),
        ({"dataset_config": "en"}, "is a local path, where config='en' has no effect"),
        ({"test_split_size": 3}, "test_split_size=3.* holds out 3 of 3 rows"),
        ({"test_split_size": 0.01}, "test_split_size=0.01 holds out 0 of 3 rows"),
    ],
)
def test_bad_splits(tmp_path, section, words):
    with pytest.raises(ValueError, match=words):
        load(dataset_name=pairs(tmp_path / "a.jsonl", 3), **section)


def test_a_mixture_of_different_formats(tmp_path):
    text = jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"datasets\[1\].*has the columns \['text'\].*must share one format"):
        load(datasets=[{"path": pairs(tmp_path / "a.jsonl", 1)}, {"path": text}])


def test_a_mixture_of_strings_and_messages(tmp_path):
    chat = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    entries = [{"path": pairs(tmp_path / "a.jsonl", 1)}, {"path": jsonl(tmp_path / "b.jsonl", chat)}]
    with pytest.raises(ValueError, match=r"datasets\[1\].*holds lists in column 'prompt'.*holds text"):
        load(datasets=entries)


def test_a_mixture_with_columns_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"columns=\['question'\] names \['question'\], but there are"):
        load(datasets=[{"path": pairs(tmp_path / "a.jsonl", 1), "columns": ["question"]}])


def test_a_format_without_files():
    with pytest.raises(ValueError, match="'json' is a file format: name the files in `data_files`"):
        load(datasets=[{"path": "json"}])


def test_a_mixture_of_message_lists_with_keys_in_different_order(tmp_path):
    one = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    other = [{"messages": [{"content": "c", "role": "user"}, {"content": "d", "role": "assistant"}]}]
    entries = [{"path": jsonl(tmp_path / f"{index}.jsonl", rows)} for index, rows in enumerate((one, other))]
    train, _ = load(datasets=entries)
    assert [message["content"] for row in train["messages"] for message in row] == ["a", "b", "c", "d"]


def test_unpaired_text_is_text_alone(tmp_path):
    jsonl(tmp_path / "text.jsonl", [{"text": "one"}, {"text": "two"}])
    arguments = DatasetArguments(dataset_name="unused", unpaired_dataset=str(tmp_path / "text.jsonl"))
    assert load_unpaired(arguments).to_list() == [{"text": "one"}, {"text": "two"}]
    assert load_unpaired(DatasetArguments(dataset_name="unused")) is None
    pairs(tmp_path / "pairs.jsonl", 2)
    with pytest.raises(
        ValueError, match=r"unpaired_dataset=.*\['prompt', 'completion'\]: unpaired text has no prompts"
    ):
        load_unpaired(DatasetArguments(dataset_name="unused", unpaired_dataset=str(tmp_path / "pairs.jsonl")))
    with pytest.raises(ValueError, match="unpaired_dataset"):
        load_unpaired(DatasetArguments(dataset_name="unused", unpaired_dataset=str(tmp_path / "nothing.jsonl")))
