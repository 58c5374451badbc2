"""Conversion touches the mask token's rows and nothing else, and refuses what it cannot convert."""

import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlm_tune.models import FAMILIES, DiffusionMixin, load_model, load_tokenizer
from dlm_tune.models.convert import convert_checkpoint
from tests.models.layouts import config_json, logits_of
from tests.models.test_loading import edit_json, save_decoder
from tests.tiny_models import save_tiny_checkpoint, tiny_tokenizer

DECODERS = sorted(FAMILIES.keys() - {"llada", "Dream"})
NUM_TOKENS = len(tiny_tokenizer("Dream"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_causal(directory: Path, model_type: str = "qwen3", chat_template: bool = True, **config) -> Path:
    """A causal decoder with a tokenizer that has no mask token; `<|mask|>` is a reserved token of another name."""
    save_decoder(directory, model_type, **config)
    tokenizer = tiny_tokenizer("Dream", chat_template=chat_template)
    tokenizer.mask_token = None
    text = (directory / "tokenizer.json").read_text()
    for file in directory.glob("*token*"):
        file.unlink()
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (directory / name).read_text()
        (directory / name).write_text(text.replace("<|mask|>", "<|reserved|>"))
    return directory


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    """A tied Qwen3 with spare rows, as the small published ones are."""
    return save_causal(tmp_path_factory.mktemp("ar") / "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def converted(causal, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "qwen3"
    convert_checkpoint(causal, directory)
    return directory


def some_tokens() -> Tensor:
    return torch.randint(6, NUM_TOKENS, (2, 12), generator=torch.Generator().manual_seed(0))


def weights_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def mean_row(table: Tensor) -> Tensor:
    return torch.stack([table[i] for i in range(NUM_TOKENS)]).double().mean(0).to(table.dtype)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_other_weight_is_touched(model_type, tied, tmp_path):
    source = save_causal(tmp_path / "ar", model_type, tie_word_embeddings=tied)
    result = convert_checkpoint(source, tmp_path / "out")
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert (HEAD in after) == (not tied)
    mask = result.mask_token_id
    assert (mask, result.rows_before, result.rows) == (NUM_TOKENS, 128, 128)
    for name, tensor in before.items():
        if name in (EMBEDDING, HEAD):
            assert torch.equal(after[name][mask], mean_row(tensor))
            assert not torch.equal(after[name][mask], tensor[mask])
            tensor[mask] = after[name][mask]
        assert torch.equal(after[name], tensor), name

    tokens = some_tokens()
    autoregressive = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = load_model(tmp_path / "out", dtype=torch.float32)
    bidirectional = logits_of(model, tokens)
    # the head alone makes the logits: nothing behind it scales them (as in Granite), which the scores would miss
    shifted = torch.cat([bidirectional[:, :1], bidirectional[:, :-1]], dim=1).flatten(0, 1)
    with torch.no_grad():
        predicted = model.predict_logits(tokens, None, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(predicted, shifted)
    model.config.is_causal = True
    others = torch.arange(128) != mask
    assert torch.equal(logits_of(model, tokens)[..., others], logits_of(autoregressive, tokens)[..., others])
    assert not torch.equal(bidirectional[:, 0], logits_of(model, tokens)[:, 0])


def test_position_is_scored_by_its_predecessor(causal, converted):
    tokens = some_tokens()
    model = load_model(converted, dtype=torch.float32)
    assert model.config.logits_shift is True
    model.config.is_causal = True
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        scores = model(tokens, target_ids=tokens, target_mask=everywhere).token_nll.view(tokens.shape)
    logits = logits_of(AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32), tokens)
    # the mask token's column is the mean of the vocabulary's columns, since its row is
    logits[..., NUM_TOKENS] = logits[..., :NUM_TOKENS].mean(-1)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(scores[:, 1:].flatten(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tables_grow_where_no_row_is_spare(tied, tmp_path):
    source = save_causal(tmp_path / "ar", "llama", vocab_size=NUM_TOKENS, tie_word_embeddings=tied)
    result = convert_checkpoint(source, tmp_path / "out")
    assert (result.rows_before, result.rows, result.mask_token_id) == (NUM_TOKENS, 128, NUM_TOKENS)
    assert config_json(tmp_path / "out")["vocab_size"] == 128
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor)
        if name in (EMBEDDING, HEAD):
            assert torch.equal(after[name][NUM_TOKENS:], mean_row(tensor).expand(128 - NUM_TOKENS, -1))
    # Hewitt's bound: k new rows at the mean take at most k / V of the old normaliser
    tokens = some_tokens()
    old = logits_of(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, is_causal=True)
    growth = logits_of(model, tokens).logsumexp(-1) - old.logsumexp(-1)
    assert growth.min() > 0
    assert growth.max() <= math.log(1 + (128 - NUM_TOKENS) / NUM_TOKENS)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mask_token_starts_as_a_chosen_token(tied, tmp_path):
    source = save_causal(tmp_path / "ar", tie_word_embeddings=tied)
    result = convert_checkpoint(source, tmp_path / "out", mask_embedding="<|dlm_pad|>")
    before, after = weights_of(source), weights_of(tmp_path / "out")
    assert torch.equal(after[EMBEDDING][result.mask_token_id], before[EMBEDDING][5])
    if not tied:  # in the head the mask token must not be as likely as that token
        assert torch.equal(after[HEAD][result.mask_token_id], mean_row(before[HEAD]))
    assert "<|dlm_pad|>" in result.mask_embedding


def test_reserved_token_becomes_the_mask_token(causal, tmp_path):
    result = convert_checkpoint(causal, tmp_path / "a", mask_token="<|reserved|>")
    assert (result.mask_token, result.mask_token_id) == ("<|reserved|>", 2)
    table = load_file(causal / "model.safetensors")[EMBEDDING]
    others = torch.stack([table[i] for i in range(NUM_TOKENS) if i != 2]).double().mean(0).float()
    assert torch.equal(weights_of(tmp_path / "a")[EMBEDDING][2], others)
    tokenizer = load_tokenizer(tmp_path / "a")
    assert len(tokenizer) == NUM_TOKENS
    assert tokenizer("a<|reserved|>b", add_special_tokens=False).input_ids[1] == 2
    # copied from itself: the row stays as it is
    convert_checkpoint(causal, tmp_path / "b", mask_token="<|reserved|>", mask_embedding="<|reserved|>")
    assert torch.equal(weights_of(tmp_path / "b")[EMBEDDING], table)
    # a tokenizer's own mask token is taken without being asked for
    edit_json(tmp_path / "a" / "config.json", mask_token_id=None, is_causal=None, logits_shift=None)
    assert convert_checkpoint(tmp_path / "a", tmp_path / "c").mask_token_id == 2
    with pytest.raises(ValueError, match=r"mask_token='<M>': the tokenizer has the mask token '<\|reserved\|>'"):
        convert_checkpoint(tmp_path / "a", tmp_path / "d", mask_token="<M>")


def test_facts_and_files_of_the_converted_checkpoint(causal, converted):
    content = config_json(converted)
    facts = {"is_causal": False, "logits_shift": True, "mask_token_id": NUM_TOKENS, "use_cache": False}
    assert content == config_json(causal) | facts
    tokenizer = load_tokenizer(converted)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", NUM_TOKENS)
    assert tokenizer("a<|mask|>b", add_special_tokens=False).input_ids[1] == NUM_TOKENS
    assert tokenizer.decode([NUM_TOKENS], skip_special_tokens=True) == ""
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 0
    assert sorted(file.name for file in converted.parent.iterdir()) == ["qwen3"]
    model = load_model(converted)
    assert isinstance(model, DiffusionMixin)
    # plain transformers attends in both directions as well
    plain = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    assert not isinstance(plain, DiffusionMixin)
    assert torch.equal(logits_of(plain, some_tokens()), logits_of(model, some_tokens()))


def test_annealed_convention_predicts_in_place(causal, tmp_path):
    assert convert_checkpoint(causal, tmp_path / "out", logits_shift=False).logits_shift is False
    assert config_json(tmp_path / "out")["logits_shift"] is False
    assert load_model(tmp_path / "out").config.logits_shift is False


def test_weights_keep_their_dtype_unless_asked(causal, tmp_path):
    # a config that names another dtype than the files have must not round them
    edit_json(save_causal(tmp_path / "ar") / "config.json", dtype="bfloat16")
    assert convert_checkpoint(tmp_path / "ar", tmp_path / "a").dtype == torch.float32
    assert config_json(tmp_path / "a")["dtype"] == "float32"
    assert convert_checkpoint(causal, tmp_path / "b", dtype=torch.bfloat16).dtype == torch.bfloat16
    table, rounded = weights_of(causal)[EMBEDDING], weights_of(tmp_path / "b")[EMBEDDING]
    assert torch.equal(rounded[:NUM_TOKENS], table[:NUM_TOKENS].bfloat16())


def test_large_checkpoints_are_written_in_shards(causal, tmp_path):
    convert_checkpoint(causal, tmp_path / "out", max_shard_size="30KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.keys()
    assert torch.equal(
        logits_of(load_model(tmp_path / "out"), some_tokens()),
        logits_of(load_model(convert_checkpoint(causal, tmp_path / "whole").directory), some_tokens()),
    )


def test_chat_template_is_the_models_own_or_the_familys(causal, converted, tmp_path):
    edit_json(save_causal(tmp_path / "own") / "tokenizer_config.json", chat_template="{{ messages[0].content }} own")
    (tmp_path / "own" / "chat_template.jinja").unlink(missing_ok=True)
    convert_checkpoint(tmp_path / "own", tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").chat_template == "{{ messages[0].content }} own"
    save_causal(tmp_path / "base", chat_template=False)
    convert_checkpoint(tmp_path / "base", tmp_path / "b")
    chat = [{"role": "user", "content": "hi"}]
    text = load_tokenizer(tmp_path / "b").apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    # for readers without dlm_tune it is in the files
    assert AutoTokenizer.from_pretrained(tmp_path / "b").apply_chat_template(chat, tokenize=False) == text


def test_of_the_generation_config_only_the_ids_are_kept(tmp_path):
    source = save_causal(tmp_path / "ar")
    edit_json(source / "generation_config.json", temperature=0.6, do_sample=True, eos_token_id=[4, 0], max_length=99)
    convert_checkpoint(source, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert content["eos_token_id"] == [4, 0]
    assert not {"temperature", "do_sample", "max_length"} & content.keys()


def test_training_goes_on_from_a_converted_checkpoint(converted, tmp_path):
    from datasets import Dataset

    from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer

    rows = Dataset.from_list([{"text": "some text to learn"}, {"text": "more of it"}] * 4)
    arguments = DiffusionConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        bf16=False, report_to="none", max_length=32, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    model = load_model(converted, dtype=torch.float32)
    trainer = DiffusionTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=load_tokenizer(converted)
    )
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 2
    again = load_model(tmp_path / "run", dtype=torch.float32)
    assert torch.equal(logits_of(again, some_tokens()), logits_of(model, some_tokens()))
    assert not torch.equal(logits_of(load_model(converted), some_tokens()), logits_of(again, some_tokens()))
    facts = ("is_causal", "logits_shift", "mask_token_id")
    assert [config_json(tmp_path / "run")[name] for name in facts] == [False, True, NUM_TOKENS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_token": "a"}, r"mask_token='a' is in use \(ordinary token"),
        ({"mask_token": "<|endoftext|>"}, r"in use \(eos_token, pad_token"),
        ({"mask_token": "<|im_end|>"}, r"in use \(end of a chat turn, part of the chat template\)"),
        ({"mask_embedding": "<|dlm_pat|>"}, r"mask_embedding='<\|dlm_pat\|>' is no token .* '<\|dlm_pad\|>'"),
    ],
)
def test_impossible_mask_tokens_are_refused(causal, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(causal, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_mask_token_that_falls_on_another_token_is_refused(causal, tmp_path):
    """tokenizers numbers new tokens by the size of the vocabulary, which is a token's id where there are gaps."""
    source = tmp_path / "ar"
    shutil.copytree(causal, source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"]["~"] = NUM_TOKENS  # leaves a gap where it was
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"id {NUM_TOKENS} of its mask token '<\|mask\|>' to '~' too, .* have gaps"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "out", mask_token="<|reserved|>")
    assert load_tokenizer(tmp_path / "out").mask_token == "<|reserved|>"


def test_diffusion_checkpoints_are_refused(converted, tmp_path):
    for family in ("llada", "Dream"):
        source = save_tiny_checkpoint(tmp_path / family, family)
        with pytest.raises(
            ValueError, match=f"a diffusion checkpoint already .model_type='{family}', mask_token_id=2"
        ):
            convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(
        ValueError, match=rf"mask_token_id={NUM_TOKENS}, is_causal=False in its config\.json\): there is nothing"
    ):
        convert_checkpoint(converted, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' .* is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "are quantised"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
            "sliding_window=8",
        ),
        ({"vocab_size": 50}, "has '.*' at id .* but the model has 50 embedding rows"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "11 weights are missing from the files"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_converted_are_refused(changes, message, tmp_path):
    source = save_causal(tmp_path / "ar")
    edit_json(source / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ar"]


def test_sources_without_their_files_are_refused(tmp_path):
    source = save_causal(tmp_path / "ar")
    weights = source / "model.safetensors"
    weights.rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle files can run code"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "pytorch_model.bin").rename(weights)
    for file in source.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "config.json").rename(source / "adapter_config.json")
    with pytest.raises(ValueError, match="is an adapter; merge it"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_existing_output_is_kept_unless_it_is_to_be_replaced(causal, tmp_path):
    out = convert_checkpoint(causal, tmp_path / "out", logits_shift=False).directory
    with pytest.raises(ValueError, match="is not empty"):
        convert_checkpoint(causal, out)
    assert config_json(out)["logits_shift"] is False
    (out / "old.txt").write_text("of the old checkpoint")
    convert_checkpoint(causal, out, overwrite=True)
    assert config_json(out)["logits_shift"] is True
    assert not (out / "old.txt").exists()
    with pytest.raises(ValueError, match="would replace"):
        convert_checkpoint(causal, causal, overwrite=True)
    with pytest.raises(ValueError, match="would replace"):
        convert_checkpoint(causal, causal.parent, overwrite=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no checkpoint and overwrite does not remove it"):
        convert_checkpoint(causal, tmp_path / "papers", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        convert_checkpoint(causal, tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="max_shard_size='5' is no size"):
        convert_checkpoint(causal, tmp_path / "new", max_shard_size="5")
    killed = tmp_path / ".new.partial"  # as a killed conversion leaves it
    killed.mkdir()
    (killed / "model.safetensors").write_text("half of it")
    convert_checkpoint(causal, tmp_path / "new")
    assert not killed.exists()
    (tmp_path / "link").symlink_to(out)
    convert_checkpoint(causal, tmp_path / "link", overwrite=True, logits_shift=False)
    assert config_json(out)["logits_shift"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "new", "out", "papers"]


def test_faults_while_writing_leave_the_old_checkpoint(causal, tmp_path):
    """A damaged weights file is noticed while the new directory is being written."""
    out = convert_checkpoint(causal, tmp_path / "out", logits_shift=False).directory
    source = save_causal(tmp_path / "ar")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing from the files \(model\.norm\.weight\)"):
        convert_checkpoint(source, out, overwrite=True)
    assert config_json(out)["logits_shift"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ar", "out"]


def test_a_full_disk_leaves_the_old_checkpoint(causal, tmp_path):
    out = convert_checkpoint(causal, tmp_path / "out", logits_shift=False).directory
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes beyond fail as on a full disk
    try:
        with pytest.raises(OSError, match=r"out failed: .*File too large"):
            convert_checkpoint(causal, out, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert config_json(out)["logits_shift"] is False
    assert torch.isfinite(logits_of(load_model(out), some_tokens())).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
