"""The data section: what is refused before anything loads, and that TRL's parser reads it."""

from dataclasses import fields

import pytest
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

from dlm_tune.data import DatasetArguments, DatasetEntry


def test_an_entry_has_all_of_trls_keys_with_their_defaults():
    theirs = {field.name: field.default for field in fields(DatasetConfig)}
    ours = {field.name: field.default for field in fields(DatasetEntry)}
    assert theirs.items() <= ours.items()


def test_a_recipe_and_the_command_line_are_read_by_trls_parser(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("datasets:\n- {path: a.jsonl, weight: 1}\n- {path: b.jsonl, weight: 3}\ntest_split_size: 0.05\n")
    (arguments,) = TrlParser([DatasetArguments]).parse_args_and_config(["--config", str(recipe)])
    assert arguments.datasets == [DatasetEntry("a.jsonl", weight=1), DatasetEntry("b.jsonl", weight=3)]
    command = ["--datasets", "a.jsonl", '{"path": "b.jsonl", "split": "test"}', "--test_split_size", "10"]
    (arguments,) = TrlParser([DatasetArguments]).parse_args_and_config(command)
    assert arguments.datasets == [DatasetEntry("a.jsonl"), DatasetEntry("b.jsonl", split="test")]
    assert arguments.test_split_size == 10


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "no training data: set `dataset_name`.*or `datasets`"),
        ({"dataset_name": "a.jsonl", "datasets": [{"path": "b.jsonl"}]}, "are both set: keep one"),
        (
            {"datasets": [{"path": "a.jsonl", "wieght": 1}]},
            r"datasets\[0\]: unknown key 'wieght'. Did you mean 'weight'",
        ),
        ({"datasets": [{"name": "a.jsonl"}]}, r"datasets\[0\]: `path` is missing"),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "fraction": 1}]},
            "`fraction`.*and `weight`.*both set",
        ),
        ({"datasets": [{"path": "a", "weight": 1}, {"path": "b"}]}, "`weight` is set for some entries only"),
        ({"datasets": [{"path": "a", "weight": -1}]}, r"datasets\[0\]: weight=-1 must be a number above 0"),
        ({"datasets": ['{"path": ']}, "is not valid JSON"),
        ({"datasets": [3]}, r"datasets\[0\]=3 must be a mapping"),
        ({"datasets": [{"path": "a"}], "dataset_config": "en"}, "dataset_config='en' has no effect on a mixture"),
        ({"datasets": [{"path": "a"}], "dataset_test_split": "test"}, "dataset_test_split='test' has no effect"),
        ({"dataset_name": "a", "test_split_size": 1.5}, "test_split_size=1.5: give a fraction between 0 and 1"),
        ({"dataset_name": "a", "test_split_size": 0}, "test_split_size=0: give a fraction"),
        (
            {"dataset_name": "a", "test_split_size": 0.1, "eval_dataset_name": "b"},
            "test_split_size=0.1 and eval_dataset_name='b' both name evaluation rows",
        ),
        (
            {"dataset_name": "a", "test_split_size": 0.1, "dataset_test_split": "test"},
            "test_split_size=0.1 and dataset_test_split='test' both",
        ),
        (
            {"dataset_name": "a", "unpaired_dataset_split": "test"},
            "unpaired_dataset_split='test' has no effect without `unpaired_dataset`",
        ),
        (
            {"dataset_name": "a", "dataset_streaming": True},
            "dataset_streaming=True is not supported.*position of a row",
        ),
    ],
)
def test_bad_sections(section, words):
    with pytest.raises(ValueError, match=words):
        DatasetArguments(**section)


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError, match="3 problems in the data section") as caught:
        DatasetArguments(test_split_size=-1, dataset_streaming=True)
    assert str(caught.value).count("\n") == 3
