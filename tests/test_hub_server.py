"""Data sets and models by Hub name, over HTTP, against the local server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from tests.tiny_models import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub: HubServer, home: Path, code: str) -> str:
    """Run `code` in a process that uses the local Hub; return what it prints."""
    environment = os.environ | hub.environment(home)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_data_set_loads_by_its_hub_name(hub, tmp_path):
    push = """
from datasets import Dataset, DatasetDict
train = Dataset.from_dict({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"]})
test = Dataset.from_dict({"prompt": ["d"], "completion": ["w"]})
DatasetDict({"train": train, "test": test}).push_to_hub("user/pairs")
"""
    run(hub, tmp_path / "pusher", push)
    assert ("dataset", "user/pairs") in hub.repositories
    load = """
from dlm_tune.data import DatasetArguments, load_datasets
train, test = load_datasets(DatasetArguments(dataset_name="user/pairs"), seed=0)
print(train["completion"][:], test["prompt"][:])
entries = [{"path": "user/pairs", "split": "train[:2]"}, {"path": "user/pairs", "split": "test"}]
print(load_datasets(DatasetArguments(datasets=entries), seed=0)[0]["prompt"][:])
for wrong in ({"dataset_name": "user/pears"}, {"dataset_name": "user/pairs", "dataset_train_split": "trian"},
              {"dataset_name": "user/pairs", "dataset_config": "english"}):
    try:
        load_datasets(DatasetArguments(**wrong), seed=0)
    except ValueError as error:
        print("ERROR", str(error).replace("\\n", " "))
"""
    printed = run(hub, tmp_path / "loader", load).splitlines()
    assert printed[:2] == ["['x', 'y', 'z'] ['d']", "['a', 'b', 'd']"]
    assert "dataset_name='user/pears': there is no such local path, and the Hub has no data set" in printed[2]
    assert "dataset_train_split='trian': dataset_name='user/pairs' has the splits ['train', 'test']" in printed[3]
    assert "Did you mean 'train'" in printed[3]
    assert "'english'" in printed[4]
    assert "Set `dataset_config`" in printed[4]


def test_a_model_loads_by_its_hub_name(hub, tmp_path):
    directory = save_tiny_checkpoint(tmp_path / "checkpoint")
    push = f"""
from huggingface_hub import HfApi
HfApi().create_repo("user/tiny-llada")
HfApi().upload_folder(folder_path={str(directory)!r}, repo_id="user/tiny-llada")
"""
    run(hub, tmp_path / "pusher", push)
    load = """
import torch
from dlm_tune import load_model, load_tokenizer
from tests.tiny_models import tiny_llada
model, tokenizer = load_model("user/tiny-llada"), load_tokenizer("user/tiny-llada")
expected = tiny_llada().state_dict()
print(type(model).__name__, all(torch.equal(expected[key], value) for key, value in model.state_dict().items()))
print(tokenizer.mask_token_id == model.config.mask_token_id)
"""
    assert run(hub, tmp_path / "loader", load).split() == ["LLaDAModelLM", "True", "True"]
    assert any("model.safetensors" in request for request in hub.requests if request.startswith("GET"))
