"""docs/data-formats.md: each of its files loads and is learned from, each of its recipe sections works."""

import re
from pathlib import Path

import pytest
import yaml
from datasets import disable_progress_bars

from dlm_tune.data import DatasetArguments, check_raw_rows, load_datasets

PAGE = (Path(__file__).parent.parent.parent / "docs" / "data-formats.md").read_text()
# the file of an example is the one named last before it
FILES = {
    re.findall(r"`([\w-]+\.jsonl)`", PAGE[: block.start()])[-1]: block[1]
    for block in re.finditer(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)
}
SECTIONS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)

disable_progress_bars()


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_page_has_its_examples():
    expected = {"text", "pairs", "chat-pairs", "messages", "conversations", "tokens"}
    assert set(FILES) == {f"{name}.jsonl" for name in expected}
    assert len(SECTIONS) == 3


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_and_passes_the_checks(name, files):
    train, _ = load_datasets(DatasetArguments(dataset_name=name), seed=0)
    assert len(check_raw_rows(train, "error", "train")) == len(FILES[name].strip().splitlines())


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_section_loads(section, files):
    train, evaluation = load_datasets(DatasetArguments(**yaml.safe_load(section)), seed=0)
    if "weight" in section:
        assert train.num_rows == 4
        assert evaluation is None
    elif "test_split_size" in section:
        assert (train.num_rows, evaluation.num_rows) == (3, 1)
    else:
        assert (train.num_rows, evaluation.num_rows) == (6, 4)
