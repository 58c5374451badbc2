import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from dlm_tune import cli, load_model, push_to_hub
from tests.hub.conftest import TOKEN
from tests.models.test_loading import edit_json
from tests.tiny_models import VOCAB_SIZE, save_tiny_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path):
    return save_tiny_checkpoint(tmp_path / "checkpoint", seed=3)


def logits_of(model):
    input_ids = torch.arange(24).view(2, 12) % VOCAB_SIZE
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def pushed(hub, name="user/tiny"):
    repository = hub.repositories["model", name]
    return set(repository.commits[-1].files) - {".gitattributes"}


def content(hub, file, name="user/tiny"):
    commit = hub.repositories["model", name].commits[-1]
    return hub._contents[commit.files[file]].decode()


def test_adapter_of_a_base_on_the_hub_loads_in_a_fresh_process_and_its_card_runs(hub, trained_adapter, tmp_path):
    """Base and adapter are pushed; by name alone, elsewhere: same logits, the card's code, the Auto classes."""
    base = trained_adapter.parent / "base"
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    push_to_hub(base, "user/base")
    report = push_to_hub(trained_adapter, "user/adapter", base_model="user/base")
    for line in ("license: apache-2.0", "base_model: user/base", "base_model_relation: adapter", "library_name: peft"):
        assert line in report.metadata.splitlines()
    blocks = report.card.split("```python\n")[1:]
    use = blocks[0].split("```")[0]
    auto = push_to_hub(base, "user/base", overwrite=True, dry_run=True)
    assert auto.card.endswith("The base.\n")  # a text of one's own is kept as it is
    torch.save(logits_of(load_model(base, adapter=trained_adapter)), tmp_path / "expected.pt")
    script = f"""
import dlm_tune
from transformers import AutoModelForCausalLM
auto = AutoModelForCausalLM.from_pretrained("user/base")
import torch
from tests.hub.test_push import logits_of
{use}
print("EQUAL", torch.equal(logits_of(model), torch.load({str(tmp_path / "expected.pt")!r})))
native = dlm_tune.load_model("user/base")
print("AUTO", type(auto) is type(native), torch.equal(logits_of(auto), logits_of(native)))
print("NEW", output.sequences.shape[1] - inputs["input_ids"].shape[1], output.sequences.eq(2).any().item())
"""
    environment = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EQUAL True" in done.stdout
    assert "AUTO True True" in done.stdout
    assert "NEW 16 False" in done.stdout


def test_model_comes_back_by_name_branch_and_tag(hub, checkpoint, tmp_path):
    expected = logits_of(load_model(checkpoint))
    report = push_to_hub(checkpoint, "tiny", license="mit")
    assert report.repo_id == "user/tiny"
    assert report.url == f"{hub.url}/user/tiny/commit/{hub.repositories['model', 'user/tiny'].commits[-1].oid}"
    assert hub.repositories["model", "user/tiny"].private
    assert torch.equal(logits_of(load_model("user/tiny")), expected)
    HfApi().create_tag("user/tiny", tag="v1")
    other = save_tiny_checkpoint(tmp_path / "other", seed=4)
    push_to_hub(other, "user/tiny", revision="try", commit_message="another seed")
    assert hub.repositories["model", "user/tiny"].commits[-1].title == "another seed"
    assert torch.equal(logits_of(load_model("user/tiny")), expected)
    assert torch.equal(logits_of(load_model("user/tiny", revision="v1")), expected)
    assert torch.equal(logits_of(load_model("user/tiny", revision="try")), logits_of(load_model(other)))
    with pytest.raises(ValueError, match="user/tiny at try exists and holds"):
        push_to_hub(checkpoint, "user/tiny", revision="try")


def test_only_what_belongs_to_a_checkpoint_is_pushed(hub, checkpoint):
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "run.log", ".env", "modeling_llada.py"):
        (checkpoint / name).write_text("nothing for others")
    (checkpoint / "checkpoint-10").mkdir()
    report = push_to_hub(checkpoint, "user/tiny")
    expected = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    assert pushed(hub) == expected | {"tokenizer.json", "tokenizer_config.json"} == set(report.sizes)
    assert report.sizes["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert {"training_args.bin", "checkpoint-10/", ".env", "modeling_llada.py"} <= set(report.left_out)


def test_dry_run_shows_files_and_card_and_contacts_nothing(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    arguments = ["push", "--model_name_or_path", str(checkpoint), "--hub_model_id", "user/tiny", "--dry_run"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Would be pushed to user/tiny (private if it is new)" in printed
    assert "model.safetensors" in printed
    assert "pipeline_tag: text-generation" in printed
    assert "no licence" in printed
    assert not hub.requests
    assert not (checkpoint / "README.md").exists()


def test_cut_connection_leaves_the_repository_and_the_same_call_resumes(hub, tmp_path):
    folder = tmp_path / "sharded"
    save_tiny_checkpoint(folder)
    load_model(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    hub.uploads_before_cut = 1
    with pytest.raises(OSError, match="run the same command again") as raised:
        push_to_hub(folder, "user/tiny")
    assert "connection to the Hub broke while pushing to user/tiny" in str(raised.value)
    assert pushed(hub) == set()  # all or nothing
    hub.uploads_before_cut = None
    arrived = {request for request in hub.requests if request.startswith("PUT")}
    assert len(arrived) == 1
    first = len(hub.requests)
    push_to_hub(folder, "user/tiny")
    again = [request for request in hub.requests[first:] if request.startswith("PUT")]
    assert len(again) == len(shards) - 1
    assert not arrived & set(again)
    assert set(shards) <= pushed(hub)
    assert torch.equal(logits_of(load_model("user/tiny")), logits_of(load_model(folder)))


def test_repository_with_files_is_not_overwritten_unless_told(hub, checkpoint, tmp_path):
    push_to_hub(checkpoint, "user/tiny")
    before = pushed(hub)
    other = save_tiny_checkpoint(tmp_path / "other", seed=4)
    with pytest.raises(
        ValueError, match=r"user/tiny exists and holds chat_template.jinja, .* and 2 more.*--overwrite"
    ):
        push_to_hub(other, "user/tiny")
    assert pushed(hub) == before
    api = HfApi()
    api.upload_file(path_or_fileobj=b"x", path_in_repo="model-00001-of-00002.safetensors", repo_id="user/tiny")
    api.upload_file(path_or_fileobj=b"y", path_in_repo="picture.png", repo_id="user/tiny")
    push_to_hub(other, "user/tiny", overwrite=True)
    assert pushed(hub) == before | {"picture.png"}  # weights of another push would be ambiguous
    assert torch.equal(logits_of(load_model("user/tiny")), logits_of(load_model(other)))


def test_private_is_the_default_and_public_must_be_said(hub, checkpoint):
    HfApi().create_repo("user/tiny", private=False)
    with pytest.raises(ValueError, match="user/tiny exists and is public, and pushes are private by default"):
        push_to_hub(checkpoint, "user/tiny")
    push_to_hub(checkpoint, "user/tiny", private=False)
    push_to_hub(checkpoint, "user/open", private=False)
    assert not hub.repositories["model", "user/open"].private


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": None}, "needs a token.*hf auth login"),
        ({"token": "hf_WrongWrongWrongWrong"}, r"does not accept the token \(401\)"),
        ({"repo_id": "strangers/tiny"}, r"may not write to strangers/tiny \(403\)"),
        ({"repo_id": "user/ti ny"}, "is no name of the Hub"),
        ({"offline": True}, "HF_HUB_OFFLINE is set"),
        ({"base_model": "outputs"}, "base_model='outputs' is not the name of a repository"),
    ],
)
def test_hub_refuses_with_a_remedy_and_without_the_token(hub, checkpoint, monkeypatch, change, message):
    hub.tokens = {TOKEN}
    if "token" in change:
        monkeypatch.delenv("HF_TOKEN")
    if change.get("offline"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        from huggingface_hub.utils import close_session

        close_session()
    options = {key: value for key, value in change.items() if key in ("token", "base_model")}
    with pytest.raises((ValueError, OSError), match=message) as raised:
        push_to_hub(checkpoint, change.get("repo_id", "user/tiny"), **options)
    assert "hf_Wrong" not in str(raised.value)
    assert not hub.repositories


def test_server_down_is_named(hub, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="connection to the Hub broke while pushing to user/tiny"):
        push_to_hub(checkpoint, "user/tiny")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no mask token", "has no mask token"),
        ("pickle", "pickle files can run code"),
        ("truncated", "is truncated or corrupt"),
        ("both", "holds a whole model .* and an adapter"),
        ("neither", "has neither config.json nor adapter_config.json"),
        ("no folder", "is not a folder"),
        ("secret", "tokenizer_config.json holds what looks like an access token"),
    ],
)
def test_unfit_folder_is_refused_before_anything_is_sent(hub, checkpoint, fault, message):
    weights = checkpoint / "model.safetensors"
    if fault == "no mask token":
        edit_json(checkpoint / "config.json", mask_token_id=None)
        for file in (*checkpoint.glob("tokenizer*"), checkpoint / "chat_template.jinja"):
            file.unlink()
    elif fault == "pickle":
        weights.rename(checkpoint / "pytorch_model.bin")
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "both":
        (checkpoint / "adapter_config.json").write_text("{}")
    elif fault == "neither":
        (checkpoint / "config.json").unlink()
    elif fault == "no folder":
        shutil.rmtree(checkpoint)
    else:
        edit_json(checkpoint / "tokenizer_config.json", note=f"use {TOKEN}")
    with pytest.raises(ValueError, match=message) as raised:
        push_to_hub(checkpoint, "user/tiny")
    assert TOKEN not in str(raised.value)
    assert not hub.requests


def test_adapter_whose_base_others_lack_is_refused(hub, trained_adapter, tmp_path):
    with pytest.raises(ValueError, match=r"which nobody else has.*--base_model USER/NAME.*dlm-tune merge"):
        push_to_hub(trained_adapter, "user/adapter")
    with pytest.raises(ValueError, match="the adapter's base user/absent is not on the Hub"):
        push_to_hub(trained_adapter, "user/adapter", base_model="user/absent")
    assert not hub.repositories


def test_adapter_without_a_mask_token_is_refused(hub, trained_adapter, tmp_path):
    folder = shutil.copytree(trained_adapter, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", auto_mapping=None, base_model_name_or_path="user/base")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"which token is the mask.*Save the tokenizer beside it"):
        push_to_hub(folder, "user/adapter")


def test_neither_paths_nor_secrets_leave_the_machine(hub, trained_adapter, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    recipe = trained_adapter / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "run_name: correct-horse-battery of /home/somebody/runs\n")
    push_to_hub(trained_adapter.parent / "base", "user/base")
    push_to_hub(trained_adapter, "user/adapter", base_model="user/base")
    files = [file for file in pushed(hub, "user/adapter") if not file.endswith(".safetensors")]
    text = "\n".join(content(hub, file, "user/adapter") for file in files)
    assert {"README.md", "recipe.yaml", "training.json", "results.json", "adapter_config.json"} <= set(files)
    for word in (TOKEN, "correct-horse", "somebody", str(trained_adapter.parent), "hub_token"):
        assert word not in text
    shared = content(hub, "recipe.yaml", "user/adapter")
    assert "dataset_name: pairs.jsonl" in shared
    assert "max_steps: 2" in shared
    assert '"base_model_name_or_path": "user/base"' in content(hub, "adapter_config.json", "user/adapter")


@pytest.mark.slow
def test_people_without_dlm_tune_load_it_with_the_code_of_the_base(hub, checkpoint, tmp_path):
    """`auto_map` of the pushed config finds the modelling code in the base's repository, here a stand-in for it."""
    configuration = """
from transformers import PreTrainedConfig
class LLaDAConfig(PreTrainedConfig):
    model_type = "llada"
"""
    modelling = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_llada import LLaDAConfig
class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.d_model)})
        self.post_init()
"""
    push_to_hub(checkpoint, "user/base")
    for name, text in (("configuration_llada.py", configuration), ("modeling_llada.py", modelling)):
        HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="user/base")
    auto_map = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    edit_json(checkpoint / "config.json", auto_map=auto_map)
    push_to_hub(checkpoint, "user/tuned", base_model="user/base")
    script = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModel.from_pretrained("user/tuned", trust_remote_code=True)
assert "dlm_tune" not in sys.modules
print("REMOTE", type(model).__module__.startswith("transformers_modules"), type(model).__name__)
table = model.model.transformer["wte"].weight
import dlm_tune  # after transformers, where it is before it in the other test
native = AutoModelForCausalLM.from_pretrained("user/tuned")
print("NATIVE", type(native).__module__, bool((native.get_input_embeddings().weight == table).all()))
"""
    environment = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "REMOTE True LLaDAModelLM" in done.stdout
    assert "NATIVE dlm_tune.models.llada True" in done.stdout
