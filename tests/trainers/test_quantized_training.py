"""Adapters on 4- and 8-bit weights: real bitsandbytes, on the CPU."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from dlm_tune.models import load_model
from dlm_tune.models.quantization import is_quantized
from tests.models.test_loading import logits_of
from tests.tiny_models import save_tiny_checkpoint
from tests.trainers.test_diffusion_trainer import PAIRS, losses, make_trainer

pytest.importorskip("bitsandbytes")

TOKENS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(0))
NESTED_NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
QUANTIZATIONS = pytest.mark.parametrize("quantization", [NESTED_NF4, FP4, "8bit"], ids=["nf4", "fp4", "8bit"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A width of 96 is no multiple of the 64 weights that share a scale."""
    folder = tmp_path_factory.mktemp("base")
    return str(save_tiny_checkpoint(folder, "llada", d_model=96, mlp_hidden_size=128, init_std=0.1))


def trained_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@QUANTIZATIONS
def test_trains_saves_and_reloads_to_the_same_logits(base, tmp_path, quantization):
    """With an evaluation in the middle, after which bitsandbytes would compute otherwise."""
    trainer = make_trainer(
        tmp_path / "out",
        load_model(base, quantization=quantization),
        eval_rows=PAIRS[:4],
        max_steps=12,
        eval_strategy="steps",
        eval_steps=4,
        learning_rate=1e-2,
        peft_config=LoraConfig(r=4),
    )
    assert is_quantized(trainer.model)
    trained = trained_parameters(trainer.model)
    assert len(trained) == 2 * 7 * 2, "all linear layers of both blocks, never the LM head"
    assert not any("lm_head" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    trainer.save_model(tmp_path / "adapter")
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    )
    again = load_model(base, quantization=quantization, adapter=tmp_path / "adapter")
    assert torch.equal(logits_of(again, TOKENS), logits_of(trainer.model.eval(), TOKENS))


@pytest.mark.parametrize(
    "quantization", [NESTED_NF4, pytest.param("8bit", marks=pytest.mark.slow)], ids=["nf4", "8bit"]
)
def test_a_resumed_run_continues_the_loss_curve(base, tmp_path, quantization):
    """Evaluations of the whole run come before and after the checkpoint."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}

    def trainer(folder):
        model = load_model(base, quantization=quantization)
        return make_trainer(tmp_path / folder, model, eval_rows=PAIRS[:2], peft_config=LoraConfig(r=4), **settings)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(whole)) == 6
    assert losses(resumed) == losses(whole)
    for name, parameter in trained_parameters(whole.model).items():
        assert torch.equal(parameter, trained_parameters(resumed.model)[name])


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=TOKENS).logits.float().logsumexp(-1).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in trained_parameters(model).items()}


@QUANTIZATIONS
def test_an_evaluation_does_not_change_the_gradient(base, quantization):
    """On CPUs with AVX512-BF16 the first evaluation would cut the gradient at every quantised layer."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model(base, quantization=quantization), config)
    before = gradients(model)
    evaluated = logits_of(model.eval(), TOKENS)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    if quantization != "8bit":  # whose inputs are quantised too, in evaluation
        with torch.no_grad():
            assert torch.equal(model.train()(input_ids=TOKENS).logits, evaluated)


@pytest.mark.parametrize(
    "quantization", [NESTED_NF4, pytest.param("8bit", marks=pytest.mark.slow)], ids=["nf4", "8bit"]
)
def test_gradient_checkpointing_gives_the_same_gradient(base, tmp_path, quantization):
    """The inputs of the first layer must require gradients; with the layers' dtype bfloat16 as on a GPU."""
    recorded = []
    for enabled in (False, True):
        model = load_model(base, quantization=quantization, dtype=torch.bfloat16)
        trainer = make_trainer(
            tmp_path, model, max_steps=2, gradient_checkpointing=enabled, bf16=True, peft_config=LoraConfig(r=4)
        )
        trainer.train()
        recorded.append(losses(trainer) + [parameter.sum().item() for parameter in trainer.model.parameters()])
        assert {parameter.dtype for parameter in trained_parameters(trainer.model).values()} == {torch.float32}
    assert recorded[0] == recorded[1]


def test_a_model_prepared_by_peft_trains_as_well(base, tmp_path):
    """`prepare_model_for_kbit_training`: norms, embeddings and head in float32, layers in bfloat16."""
    model = load_model(base, quantization="4bit", dtype=torch.bfloat16)
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert prepared.lm_head.weight.dtype == torch.float32
    trainer = make_trainer(
        tmp_path, prepared, max_steps=8, learning_rate=1e-2, bf16=True, gradient_checkpointing=True,
        peft_config=LoraConfig(r=4), eval_rows=PAIRS[:2],
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.2
    assert trainer.evaluate()["eval_nelbo"] > 0


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_keep_the_type_they_were_given(base, tmp_path, adapter_dtype):
    model = get_peft_model(load_model(base, quantization="4bit"), LoraConfig(r=4, target_modules=["q_proj"]))
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.to(adapter_dtype)
    before = {name: parameter.clone() for name, parameter in trained_parameters(model).items()}
    trainer = make_trainer(tmp_path, model)
    for name, parameter in trained_parameters(trainer.model).items():
        assert parameter.dtype == adapter_dtype
        assert torch.equal(parameter, before[name])


def test_trl_still_casts_adapters_of_quantised_models(base, tmp_path, monkeypatch):
    """Where this fails, `adapters_keep_their_type` has become needless."""
    from contextlib import nullcontext

    from dlm_tune.trainers import diffusion_trainer

    monkeypatch.setattr(diffusion_trainer, "adapters_keep_their_type", lambda model: nullcontext())
    trainer = make_trainer(tmp_path, load_model(base, quantization="4bit"), peft_config=LoraConfig(r=4))
    assert {parameter.dtype for parameter in trained_parameters(trainer.model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimisers_of_bitsandbytes_run_on_the_cpu(base, tmp_path, optim):
    model = load_model(base, quantization="4bit")
    trainer = make_trainer(
        tmp_path, model, max_steps=12, learning_rate=1e-2, optim=optim, peft_config=LoraConfig(r=64)
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    states = [state["state1"] for state in trainer.optimizer.state.values() if "state1" in state]
    assert any(state.dtype == (torch.uint8 if "8bit" in optim else torch.float32) for state in states)


def test_the_cast_of_8_bit_inputs_is_said_once(base, caplog):
    model = load_model(base, quantization="8bit")
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.filters[-1]._seen.clear()
    with caplog.at_level(logging.WARNING, logger=logger.name):
        for _ in range(2):
            logits_of(model, TOKENS)
        load_model(base, quantization="8bit")
    assert len(logger.filters) == 1
    assert sum("inputs will be cast" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_alone_cannot_be_trained(base, tmp_path, quantization):
    with pytest.raises(ValueError, match=r"quantised and has no adapter.*peft_config .*use_peft: true"):
        make_trainer(tmp_path, load_model(base, quantization=quantization))


def test_dora_trains_on_4_bits_and_is_refused_on_8(base, tmp_path):
    model = load_model(base, quantization="4bit")
    trainer = make_trainer(
        tmp_path / "out", model, max_steps=6, learning_rate=1e-2, peft_config=LoraConfig(r=4, use_dora=True)
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    trainer.save_model(tmp_path / "adapter")
    again = load_model(base, quantization="4bit", adapter=tmp_path / "adapter")
    assert torch.equal(logits_of(again, TOKENS), logits_of(trainer.model.eval(), TOKENS))
    with pytest.raises(ValueError, match="use_dora=True does not work on 8-bit weights on the CPU"):
        make_trainer(tmp_path, load_model(base, quantization="8bit"), peft_config=LoraConfig(r=4, use_dora=True))


def test_a_frozen_adapter_is_evaluated_but_not_trained(base, tmp_path):
    trainer = make_trainer(tmp_path / "out", load_model(base), peft_config=LoraConfig(r=4))
    trainer.save_model(tmp_path / "adapter")
    frozen = make_trainer(tmp_path / "again", load_model(tmp_path / "adapter"), eval_rows=PAIRS[:2])
    assert frozen.evaluate()["eval_nelbo"] > 0
    with pytest.raises(ValueError, match=r"no weight of the model is trained: .* is_trainable=True"):
        frozen.train()


def test_a_second_adapter_is_refused(base, tmp_path):
    model = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the model has an adapter already, and peft_config asks for a new one"):
        make_trainer(tmp_path, model, peft_config=LoraConfig(r=4))


def test_a_quantised_model_is_saved_whole_after_evaluations(base, tmp_path):
    """bitsandbytes would have repacked the weights for the CPU, and written them so."""
    model = load_model(base, quantization="4bit")
    expected = logits_of(model, TOKENS)
    model.save_pretrained(tmp_path / "nf4")
    assert torch.equal(logits_of(load_model(tmp_path / "nf4"), TOKENS), expected)


def test_training_leaves_the_quantised_weights_alone(base, tmp_path):
    model = load_model(base, quantization="4bit")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(
        tmp_path, model, eval_rows=PAIRS[:2], max_steps=3, learning_rate=1e-2, peft_config=LoraConfig(r=4)
    )
    trainer.train()
    trainer.evaluate()
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    assert set(after) == set(weights)
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
