import json

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig

from dlm_tune import cli, load_model
from dlm_tune.hub.card import MARKER
from tests.hub.conftest import TOKEN, hub  # noqa: F401
from tests.hub.test_push import logits_of, pushed
from tests.tiny_models import save_tiny_checkpoint
from tests.trainers.test_diffusion_trainer import PAIRS, make_trainer

LORA = LoraConfig(r=4, target_modules=["q_proj"])
PUSHING = {"push_to_hub": True, "hub_model_id": "user/run", "save_strategy": "steps", "save_steps": 1}


def titles(hub):  # noqa: F811
    return [commit.title for commit in hub.repositories["model", "user/run"].commits[1:]]


def test_run_pushes_at_every_save_and_at_the_end(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    hub.tokens = {TOKEN}
    trainer = make_trainer(tmp_path / "out", max_steps=2, hub_token=TOKEN, **PUSHING)
    assert hub.repositories["model", "user/run"].private
    trainer.train()
    assert titles(hub) == ["Training in progress, step 1", "Training in progress, step 2"]
    report = trainer.push_to_hub(license="mit")
    assert titles(hub)[-1] == "End of training"
    assert report.repo_id == "user/run"
    names = pushed(hub, "user/run")
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth")) or "/" in name]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert torch.allclose(logits_of(load_model("user/run")), logits_of(model), atol=1e-6)


def test_every_save_of_an_adapter_has_our_card_and_keeps_ones_own(tmp_path):
    out = tmp_path / "out"
    trainer = make_trainer(out, max_steps=2, save_strategy="steps", save_steps=1, peft_config=LORA)
    trainer.train()
    for number in (1, 2):
        assert MARKER in (out / f"checkpoint-{number}" / "README.md").read_text()
        assert json.loads((out / f"checkpoint-{number}" / "training.json").read_text())["steps"] == number
    trainer.save_model()
    assert MARKER in (out / "README.md").read_text()
    (out / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    trainer.save_model()
    kept = (out / "README.md").read_text()
    assert kept.endswith("---\nMy own words.\n")
    assert "license: mit" in kept
    assert "library_name: peft" in kept


def test_cut_connection_does_not_end_the_training(hub, tmp_path, caplog):  # noqa: F811
    hub.uploads_before_cut = 0
    trainer = make_trainer(tmp_path / "out", max_steps=2, **PUSHING)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "checkpoint-1 was not pushed: the connection to the Hub broke" in caplog.text
    assert TOKEN not in caplog.text
    with pytest.raises(OSError, match="run the same command again"):
        trainer.push_to_hub()
    hub.uploads_before_cut = None
    trainer.push_to_hub()
    assert titles(hub) == ["End of training"]


def test_repository_of_another_run_is_refused_before_training(hub, tmp_path, monkeypatch):  # noqa: F811
    api = HfApi()
    api.create_repo("user/run", private=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="model.safetensors", repo_id="user/run")
    with pytest.raises(ValueError, match=r"holds model\.safetensors.*--hub_revision, or go on with the run"):
        make_trainer(tmp_path / "out", **PUSHING)
    make_trainer(tmp_path / "out", resume_from_checkpoint="last", **PUSHING)  # its own, going on
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"needs a token.*hf auth login"):
        make_trainer(tmp_path / "out", push_to_hub=True, hub_model_id="user/other")
    with pytest.raises(ValueError, match="hub_strategy='checkpoint' cannot be honoured"):
        make_trainer(tmp_path / "out", hub_strategy="checkpoint", **PUSHING)


def test_adapter_of_a_local_base_is_refused_before_training(hub, tmp_path):  # noqa: F811
    base = save_tiny_checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match=r"the adapter's base .* is a folder of this machine"):
        make_trainer(tmp_path / "out", model=load_model(base), peft_config=LORA, **PUSHING)
    assert not hub.repositories
    HfApi().create_repo("user/base")
    trainer = make_trainer(tmp_path / "out", model=load_model(base), peft_config=LORA)
    with pytest.raises(ValueError, match="blocking=False"):
        trainer.push_to_hub(blocking=False)
    report = trainer.push_to_hub(base_model="user/base")
    assert report.repo_id == "user/out"  # the name of the folder, as in transformers
    assert hub.repositories["model", "user/out"].private
    with pytest.raises(ValueError, match="user/out exists and holds"):
        trainer.push_to_hub(base_model="user/base")
    trainer.push_to_hub(base_model="user/base", overwrite=True)


def test_command_line_pushes_recipe_and_results_too(hub, tmp_path, capsys):  # noqa: F811
    base = save_tiny_checkpoint(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    arguments = {
        "model_name_or_path": base,
        "dataset_name": tmp_path / "rows.jsonl",
        "eval_dataset_name": tmp_path / "rows.jsonl",
        "eval_noise_samples": 1,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "report_to": "none",
        "push_to_hub": True,
        "hub_model_id": "user/run",
        "hub_private_repo": False,
        "hub_strategy": "end",
    }
    command = ["sft", *(part for key, value in arguments.items() for part in (f"--{key}", str(value)))]
    assert cli.main(command) == 0
    assert "Pushed to http://127.0.0.1" in capsys.readouterr().out
    assert titles(hub) == ["End of training"]
    assert not hub.repositories["model", "user/run"].private
    repository = hub.repositories["model", "user/run"]
    files = {name: hub._contents[oid].decode(errors="replace") for name, oid in repository.commits[-1].files.items()}
    assert "dataset_name: rows.jsonl" in files["recipe.yaml"]
    nelbo = json.loads(files["results.json"])["after"]["eval_nelbo"]
    assert f"| held-out NELBO, nats per token | {nelbo:.4f} ±" in files["README.md"]
    assert str(tmp_path) not in "".join(text for name, text in files.items() if not name.endswith(".safetensors"))
