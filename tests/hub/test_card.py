import json
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dlm_tune import DiffusionConfig, DiffusionTrainer, load_model, push_to_hub
from dlm_tune.hub import make_card
from dlm_tune.hub.card import MARKER, hub_datasets
from dlm_tune.hub.contents import collect
from dlm_tune.hub.privacy import REMOVED, is_hub_name, redact, without_local_paths
from dlm_tune.hub.remote_code import remote_code_map
from dlm_tune.models import convert_checkpoint, merge_adapter
from dlm_tune.models.llada import to_native_name
from tests.hub.conftest import TOKEN
from tests.models.test_convert import save_causal
from tests.models.test_loading import edit_json
from tests.tiny_models import MASK_ID, SHORT_RUN, VOCAB_SIZE, save_tiny_checkpoint, tiny_tokenizer
from tests.trainers.test_diffusion_trainer import PAIRS, make_trainer


def rows_of(card):
    """The two-column tables of a card as one dict."""
    lines = [line.strip("| ").split(" | ", 1) for line in str(card).splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def test_card_of_a_run_says_what_its_files_say(trained_adapter):
    card = make_card(trained_adapter, repo_id="somebody/inflection", base_model="somebody/base")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "somebody/base"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"dlm-tune", "diffusion-language-model", "masked-diffusion", "llada", "lora"} == set(metadata["tags"])
    assert "license" not in metadata
    assert "datasets" not in metadata
    rows = rows_of(card)
    results = json.loads((trained_adapter / "results.json").read_text())
    training = json.loads((trained_adapter / "training.json").read_text())
    for label, metrics in (("held-out NELBO, nats per token", "after"), ("the same before training", "before")):
        nelbo, error = (results[metrics][name] for name in ("eval_nelbo", "eval_nelbo_standard_error"))
        assert rows[label] == f"{nelbo:.4f} ± {error:.4f}"
    expected = {
        "family": "LLaDA",
        "mask token": rf"`<\|mdm_mask\|>`, id {MASK_ID}",
        "logits shift": "no: position i is predicted at i",
        "noise seed": "7",
        "noise samples per row": "2",
        "noise schedule": "polynomial, alpha(t) = 1 - t^1.25",
        "objective": "bound on the negative log-likelihood (NELBO)",
        "EOS policy": "pad_to_block: answers are filled with learned EOS to a multiple of 16",
        "guidance training": "prompt dropout 0.25",
        "rank, alpha": "4, 8",
        "adapted layers": "q_proj, v_proj",
        "steps": "2",
        "seeds": "seed 42, noise_seed 7",
        "tokens": f"{training['tokens']:,}",
    }
    assert {label: rows.get(label) for label in expected} == expected
    assert training["tokens"] > 0
    assert f"torch {torch.__version__}" in rows["versions"]


def test_what_is_not_known_is_left_out(tmp_path):
    card = make_card(save_tiny_checkpoint(tmp_path / "checkpoint", "Dream"), repo_id="somebody/dream")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "## Training" not in card.text
    assert "## Evaluation" not in card.text
    assert rows_of(card)["logits shift"] == "yes: position i is predicted at position i - 1"
    assert "None" not in card.text


def test_figures_of_eval_come_with_their_sampler(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    sampler = {
        "max_new_tokens": 12,
        "block_length": 6,
        "steps": 4,
        "temperature": 0.0,
        "remasking": "margin",
        "seed": 5,
    }
    completions = {"exact_match": 0.5, "exact_match_standard_error": 0.1, "error_rate": 0.25, "num_rows": 40}
    secret_samples = [{"prompt": "a private prompt"}]
    likelihood = {"eval_nelbo": 1.25, "eval_nelbo_standard_error": 0.5, "noise_seed": 3, "eval_noise_samples": 16}
    report = {
        "likelihood": likelihood,
        "completions": completions | {"generation": sampler, "samples": secret_samples},
    }
    (folder / "evaluation.json").write_text(json.dumps(report))
    contents = collect(folder, "somebody/tiny")
    rows = rows_of(contents.card)
    assert rows["held-out NELBO, nats per token"] == "1.2500 ± 0.5000"
    assert (rows["noise seed"], rows["noise samples per row"]) == ("3", "16")
    assert rows["exact match"] == "0.5000 ± 0.1000"
    assert rows["sampler"] == "max_new_tokens 12, steps 4, block_length 6, remasking margin, temperature 0.0, seed 5"
    assert "max_new_tokens=12, block_length=6, steps=4" in contents.card.text
    assert "evaluation.json" in contents.left_out  # it holds rows of the data


@pytest.mark.parametrize("text", ["My own words.\n", "# A title\n\n| | |\n"])
def test_text_of_ones_own_is_kept_and_gets_metadata(tmp_path, text):
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    (folder / "README.md").write_text(f"---\nlicense: mit\ntags:\n- mine\n---\n{text}")
    card = make_card(folder, license="apache-2.0")
    assert card.text == text
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "dlm-tune", "diffusion-language-model", "masked-diffusion", "llada"]
    assert card.data.pipeline_tag == "text-generation"


def test_templates_and_our_own_card_are_written_anew(trained_adapter, tmp_path):
    folder = shutil.copytree(trained_adapter, tmp_path / "adapter")
    written = (folder / "README.md").read_text()
    assert MARKER in written  # at the save, in the place of PEFT's template
    (folder / "README.md").write_text(written.replace("LLaDA", "edited by mistake"))
    assert "edited by mistake" not in str(make_card(folder))
    ModelCard.from_template(ModelCard("---\n---\n").data, base_model="x").save(folder / "README.md")
    assert MARKER in str(make_card(folder))


def test_licence_of_a_local_base_is_taken(trained_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(trained_adapter.parent / "base", base)
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    folder = shutil.copytree(trained_adapter, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    assert make_card(folder).data.license == "cc-by-4.0"
    assert make_card(folder, license="mit").data.license == "mit"


def test_instruct_models_are_asked_in_their_template(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "tiny-Instruct")
    text = make_card(folder).text
    assert "apply_chat_template" in text
    use = text.split("```python\n")[1].split("```")[0].replace("tiny-Instruct", str(folder))
    printed = []
    exec(use, {"print": printed.append})
    assert len(printed) == 1


def test_config_points_to_the_authors_code(tmp_path):
    """`FILE.CLASS` would be looked for beside the weights, where no code is pushed."""
    llada = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    config = {"architectures": ["LLaDAModelLM"], "auto_map": llada}
    mapped = {name: f"GSAI-ML/LLaDA-8B-Instruct--{entry}" for name, entry in llada.items()}
    assert remote_code_map(config, "GSAI-ML/LLaDA-8B-Instruct") == mapped
    assert remote_code_map(config | {"auto_map": mapped}, "somebody/fine-tuned") == mapped
    own = remote_code_map({"architectures": ["DreamModel"]}, None)
    assert own["AutoModel"] == "Dream-org/Dream-v0-Base-7B--modeling_dream.DreamModel"
    assert remote_code_map({"architectures": ["LlamaForCausalLM"]}, "somebody/llama") is None
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    contents = collect(folder, "somebody/tiny")
    shared = json.loads(contents.files["config.json"])
    assert shared.pop("auto_map")["AutoModelForCausalLM"] == "GSAI-ML/LLaDA-8B-Base--modeling_llada.LLaDAModelLM"
    assert shared == json.loads((folder / "config.json").read_text())
    (tmp_path / "shared").mkdir()
    for name, file in contents.files.items():
        (tmp_path / "shared" / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    # without the authors' code: the native class
    assert type(load_model(tmp_path / "shared")).__name__ == "LLaDAModelLM"


def test_weights_under_transformers_names_are_not_said_to_fit_the_authors_code(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    weights = {to_native_name(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    contents = collect(folder, "somebody/tiny")
    assert "trust_remote_code" not in contents.card.text
    assert "`dlm-tune merge --layout original`" in contents.card.text
    assert "auto_map" not in json.loads(contents.files["config.json"])


def test_a_causal_family_loads_bidirectionally_without_us(tmp_path):
    """What the card says of Llama: transformers alone gives the logits of `load_model`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, mask_token_id=MASK_ID, is_causal=False, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path).save_pretrained(tmp_path)
    card = make_card(tmp_path, repo_id="somebody/llama")
    assert "`is_causal: false`" in card.text
    assert "trust_remote_code" not in card.text
    input_ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=input_ids).logits
        assert torch.equal(alone, load_model(tmp_path)(input_ids=input_ids).logits)
        changed = input_ids.clone()
        changed[:, -1] = 5
        assert not torch.equal(alone[:, 0], load_model(tmp_path)(input_ids=changed).logits[:, 0])


def test_converted_model_names_what_it_was_made_of(hub, tmp_path):
    """From the Hub to a folder, LoRA on that, and the merge: the card names the source where others know it."""
    source = save_causal(tmp_path / "source")
    (source / "LICENSE").write_text("Apache")
    HfApi().create_repo("user/causal")
    HfApi().upload_folder(repo_id="user/causal", folder_path=source)
    for origin, folder in (("user/causal", tmp_path / "converted"), (str(source), tmp_path / "of-a-folder")):
        result = convert_checkpoint(origin, folder)
        card = make_card(folder, repo_id="user/diffusion")
        is_known = origin == "user/causal"
        assert card.data.to_dict().get("base_model") == (origin if is_known else None)
        assert card.data.to_dict().get("base_model_relation") == ("finetune" if is_known else None)
        assert "Converted from a causal decoder with dlm-tune, without training." in card.text
        assert "Trained" not in card.text
        assert str(tmp_path) not in (folder / "training.json").read_text()
    assert (tmp_path / "of-a-folder" / "LICENSE").read_text() == "Apache"

    push_to_hub(tmp_path / "converted", "user/diffusion", license="apache-2.0")
    assert load_model("user/diffusion").config.mask_token_id == result.mask_token_id
    trainer = DiffusionTrainer(
        str(tmp_path / "converted"),
        DiffusionConfig(output_dir=str(tmp_path / "adapter"), max_steps=1, **SHORT_RUN),
        Dataset.from_list(PAIRS),
        peft_config=LoraConfig(r=2),
    )
    trainer.train()
    trainer.save_model()
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")  # into the folder: nobody else knows that name
    report = push_to_hub(tmp_path / "merged", "user/merged", dry_run=True)
    assert "base_model" not in report.metadata
    assert any("converted is a local folder" in line and "--base_model USER/NAME" in line for line in report.warnings)
    assert "Trained with dlm-tune" in report.card
    merge_adapter(tmp_path / "adapter", tmp_path / "again", base="user/diffusion")
    metadata = make_card(tmp_path / "again").data.to_dict()
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("user/diffusion", "finetune")


def test_relative_base_of_an_adapter_is_local_from_everywhere(tmp_path, monkeypatch):
    """`outputs/base` looks like USER/NAME where that folder is not."""
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint("outputs/base")
    trainer = make_trainer("outputs/lora", model=load_model("outputs/base"), peft_config=LoraConfig(r=2), max_steps=1)
    trainer.train()
    trainer.save_model()
    monkeypatch.chdir(tmp_path / "outputs" / "lora")
    with pytest.raises(ValueError, match="which nobody else has"):
        collect(".", "user/lora")


def test_data_sets_are_named_only_by_their_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    recipe = {
        "datasets": [{"path": "allenai/tulu-3-sft-mixture"}, {"path": "data/mine"}, {"path": "/srv/rows.jsonl"}],
        "unpaired_dataset": "data/text.txt",
    }
    assert hub_datasets(recipe) == ["allenai/tulu-3-sft-mixture"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/secret-project/rows.jsonl", "rows.jsonl"),
        ("~/runs/one/", "one"),
        (r"C:\Users\ann\model", "model"),
        ("../data/rows.jsonl", "rows.jsonl"),
        ("data/quickstart/train.jsonl", "train.jsonl"),
        ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Base"),
        ("hf://datasets/squad/train.parquet", "hf://datasets/squad/train.parquet"),
        ("run of /home/ann/x with 1/2 of it", "run of x with 1/2 of it"),
        ("file:///home/ann/x.csv", "x.csv"),
        ("linear", "linear"),
        ({"path": ["/a/b", 3, None]}, {"path": ["b", 3, None]}),
    ],
)
def test_paths_are_cut_to_their_last_part(value, expected):
    assert without_local_paths(value) == expected


@pytest.mark.parametrize("secret", [TOKEN, "sk-" + "a1" * 12, "ghp_" + "b2" * 12, "correct-horse-battery"])
def test_secrets_are_removed_from_texts(secret):
    assert redact(f"say {secret}!", ["correct-horse-battery"]) == f"say {REMOVED}!"
    assert redact("eos_token: <|endoftext|>", []) == "eos_token: <|endoftext|>"


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert is_hub_name("GSAI-ML/LLaDA-8B-Base")
    for name in ("models/base", "./x", "a/b/c", "data/rows.jsonl", "/a/b", "plain", None):
        assert not is_hub_name(name)
