import json

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from peft import LoraConfig

from tests.hub_server import HubServer
from tests.tiny_models import save_tiny_checkpoint
from tests.trainers.test_diffusion_trainer import PAIRS, make_trainer

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub that this process talks to, with a token and an empty cache."""
    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture(scope="session")
def trained_adapter(tmp_path_factory):
    """An adapter as a run of the command line leaves it: its folder, beside that of its base."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_tiny_checkpoint(folder / "base")
    from dlm_tune import load_model

    model = load_model(base)
    trainer = make_trainer(
        folder / "adapter",
        model=model,
        eval_rows=PAIRS,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        max_steps=2,
        eos_policy="pad_to_block",
        block_length=16,
        prompt_dropout=0.25,
        noise_seed=7,
        eval_noise_samples=2,
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    recipe = {
        "model_name_or_path": str(base),
        "dataset_name": "/home/somebody/data/pairs.jsonl",
        "output_dir": str(folder / "adapter"),
        "hub_token": TOKEN,
        "max_steps": 2,
    }
    (folder / "adapter" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = {"before": before, "after": trainer.evaluate(), "hub_datasets": []}
    (folder / "adapter" / "results.json").write_text(json.dumps(results))
    return folder / "adapter"
