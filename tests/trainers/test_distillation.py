"""Training towards the guided initial model: against dense formulas, by hand, and to convergence."""

import copy
import json
import math

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model

from dlm_tune.models import load_model
from dlm_tune.trainers import DiffusionConfig, distillation
from dlm_tune.trainers.model_inputs import masked_token_inputs, prompt_mask
from tests.models.test_distillation import divergence_by_sums, guided_by_products
from tests.tiny_models import MASK_ID, tiny_dream, tiny_llada, tiny_tokenizer
from tests.trainers.test_diffusion_trainer import GradientRecorder, losses, make_trainer
from tests.trainers.test_packed_training import ROWS, gradients

W = 1.5


def lora(**settings):
    return LoraConfig(r=2, **({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def moved(model, seed=7):
    """The model after some training: its own weights with noise, adapters included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def dense_loss(student, teacher, batch, keep):
    """The loss of a corrupted batch row by row, each row alone, over full logits shifted as Dream's code does."""

    def log_probs(model, ids, masked):
        logits = model(input_ids=ids[None]).logits
        if model.config.logits_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits[0, masked]

    loss, hidden_tokens = 0.0, 0
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        noisy, masked = batch["noisy"].noisy_input_ids[row, :length], batch["noisy"].masked[row, :length]
        unconditional = noisy.clone()
        for position in range(length):
            if not batch["target_mask"][row, position] and int(noisy[position]) not in keep:
                hidden_tokens += int(unconditional[position] != MASK_ID)
                unconditional[position] = MASK_ID
        with torch.no_grad():
            branches = [log_probs(teacher, ids, masked) for ids in (noisy, unconditional)]
            guided = guided_by_products(*branches, W, MASK_ID)
        divergence = divergence_by_sums(guided, log_probs(student, noisy, masked))
        loss = loss + (divergence * batch["loss_weights"][row, :length][masked]).sum()
    return loss, hidden_tokens


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_loss_and_gradient_equal_the_formula_on_dense_logits(tmp_path, make_model, normalization):
    """Ragged rows, some with hidden prompts, of a student that has left its teacher behind."""
    keep = ["s", " "]
    initial = make_model().double()
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(initial),
        rows=ROWS,
        guidance_distillation_scale=W,
        guidance_keep_tokens=keep,
        prompt_dropout=0.4,
        loss_normalization=normalization,
    )
    moved(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    loss, gradient = gradients(trainer, [batch])
    assert 0 < batch["prompt_hidden"].sum() < len(ROWS)
    expected, hidden_tokens = dense_loss(
        trainer.model, initial, batch, {tiny_tokenizer().convert_tokens_to_ids(token) for token in keep}
    )
    assert hidden_tokens > 20
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    trainer.model.zero_grad()
    expected.backward()
    reference = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    assert (gradient - reference).norm() < 1e-5 * reference.norm()


def test_the_log_keeps_the_likelihood_of_the_true_tokens(tmp_path):
    plain, distilled = (
        make_trainer(tmp_path, learning_rate=0.0, guidance_distillation_scale=scale, eval_rows=ROWS[:3])
        for scale in (None, W)
    )
    for trainer in (plain, distilled):
        trainer.train()
    ours, theirs = distilled.state.log_history[0], plain.state.log_history[0]
    for key in ("nelbo", "masked_accuracy", "nll_masked_50_75", "num_tokens"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert ours["loss"] != pytest.approx(theirs["loss"], rel=0.1)
    assert distilled.evaluate()["eval_nelbo"] == pytest.approx(plain.evaluate()["eval_nelbo"], rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_gradients_do_not_depend_on_the_cut_into_microbatches(tmp_path, packing):
    results = []
    for microbatches in (1, 2, 4):
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            rows=ROWS,
            guidance_distillation_scale=W,
            per_device_train_batch_size=4 // microbatches,
            gradient_accumulation_steps=microbatches,
            max_grad_norm=0.0,
            packing=packing,
            max_length=48,
            callbacks=[recorder],
        )
        trainer.train()
        results.append((losses(trainer)[0], torch.cat([g.flatten() for g in recorder.steps[0].values()])))
    loss, gradient = results[0]
    assert gradient.norm() > 0.01
    for other_loss, other in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - gradient).norm() < 2e-6 * gradient.norm()


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_packed_and_unpacked_rows_have_the_same_loss_and_gradient(tmp_path, make_model):
    settings = {"rows": ROWS, "max_length": 48, "guidance_distillation_scale": W, "prompt_dropout": 0.3}
    packed = make_trainer(tmp_path, make_model(), packing=True, **settings)
    plain = make_trainer(tmp_path, make_model(), **settings)
    batch = packed.data_collator([packed.train_dataset[i] for i in range(len(packed.train_dataset))])
    rows = plain.data_collator([plain.train_dataset[i] for i in batch["row_index"].tolist()])
    for trainer in (packed, plain):
        moved(trainer.model)
    (loss, gradient), (expected_loss, expected) = gradients(packed, [batch]), gradients(plain, [rows])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert (gradient - expected).norm() < 2e-6 * expected.norm()


def test_training_leaves_the_teacher_as_it_was(tmp_path):
    model = tiny_llada()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, guidance_distillation_scale=W, max_steps=3, learning_rate=1e-2)
    trainer.train()
    teacher = trainer._teacher._copy
    assert_equal(weights_of(teacher), before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


ADAPTERS = {
    "attention": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_with_an_adapter_the_teacher_is_the_model_without_it(tmp_path, adapter):
    """In the first step, and when the adapter has been trained."""
    initial = tiny_llada()
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(initial),
        rows=ROWS,
        peft_config=lora(**ADAPTERS[adapter]),
        guidance_distillation_scale=W,
        max_steps=3,
        learning_rate=1e-2,
    )
    before = {name: p for name, p in weights_of(trainer.model).items() if name.endswith("base_layer.weight")}
    trainer.train()
    after = weights_of(trainer.model)
    assert before
    assert_equal(before, {name: after[name] for name in before})

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    loss, gradient = gradients(trainer, [batch])
    expected, _ = dense_loss(trainer.model, initial, batch, {})
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    trainer.model.zero_grad()
    expected.backward()
    reference = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert (gradient - reference).norm() < 1e-4 * reference.norm()


def test_an_adapter_first_moves_where_full_training_points(tmp_path):
    """The gradient of LoRA's B, which starts at zero, is the gradient of the weight times A transposed."""
    name = "model.layers.0.self_attn.q_proj"
    recorders = [GradientRecorder(), GradientRecorder()]
    full = make_trainer(tmp_path, guidance_distillation_scale=W, max_grad_norm=0.0, callbacks=recorders[:1])
    adapted = make_trainer(
        tmp_path,
        guidance_distillation_scale=W,
        max_grad_norm=0.0,
        callbacks=recorders[1:],
        peft_config=lora(lora_alpha=6),
    )
    factor = adapted.model.get_submodule(f"base_model.model.{name}.lora_A.default").weight.detach().clone()
    full.train()
    adapted.train()
    of_weight = recorders[0].steps[0][f"{name}.weight"]
    of_factor = recorders[1].steps[0][f"base_model.model.{name}.lora_B.default.weight"]
    assert of_factor.norm() > 1e-4
    torch.testing.assert_close(of_factor, 3 * of_weight @ factor.T, rtol=1e-4, atol=1e-6)
    assert losses(full) == pytest.approx(losses(adapted), rel=1e-6)


@pytest.mark.parametrize("peft_config", [None, lora(lora_dropout=0.5)], ids=["copy", "adapter"])
def test_the_teacher_drops_nothing_and_leaves_the_mode_as_it_was(tmp_path, peft_config):
    trainer = make_trainer(
        tmp_path, tiny_llada(attention_dropout=0.5).train(), guidance_distillation_scale=W, peft_config=peft_config
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.corrupt_batches([batch], step=0, epoch=0)
    trainer.model.train()
    arguments = masked_token_inputs(batch, batch["noisy"], 0, batch["loss_weights"])
    assert trainer.model(**arguments).loss != trainer.model(**arguments).loss, "the student does drop"
    first, second = (trainer._teacher.guided_targets(trainer.model, arguments, prompt_mask(batch)) for _ in range(2))
    assert torch.equal(first.cond_hidden, second.cond_hidden)
    assert trainer.model.training
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert peft_config is None or all("lora_" in name for name in trainable)


@pytest.mark.parametrize("peft", [False, True])
def test_resuming_keeps_the_teacher_of_the_first_start(tmp_path, peft):
    def run(folder):
        return make_trainer(
            folder,
            peft_config=lora() if peft else None,
            guidance_distillation_scale=W,
            per_device_train_batch_size=4,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            learning_rate=1e-2,
        )

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert_equal(weights_of(resumed.model), weights_of(whole.model))
    if not peft:
        assert_equal(weights_of(resumed._teacher._copy), weights_of(tiny_llada()))


def test_one_masked_token_converges_to_the_tilted_distribution(tmp_path):
    """Four prompts, answers of one token: p_c^(1+w) p_u^-w with each prompt, p_u where the prompt is hidden."""
    prompts = [10, 20, 30, 40]
    rows = [{"input_ids": [prompt, 60, 50], "labels": [-100, -100, 50]} for prompt in prompts] * 2
    initial = tiny_llada()
    trainer = make_trainer(
        tmp_path,
        copy.deepcopy(initial),
        rows=rows,
        eos_policy="none",
        guidance_distillation_scale=W,
        prompt_dropout=0.5,
        max_steps=200,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=100,
    )
    trainer.train()
    conditional = torch.tensor([[prompt, 60, MASK_ID] for prompt in prompts])
    hidden = torch.tensor([[MASK_ID] * 3])
    with torch.no_grad():
        cond, uncond = (initial(input_ids=ids).logits[:, -1] for ids in (conditional, hidden))
        student = trainer.model(input_ids=torch.cat([conditional, hidden])).logits[:, -1].softmax(-1)
    guided = guided_by_products(cond, uncond.expand_as(cond), W, MASK_ID)
    plain, unconditional = (guided_by_products(logits, logits, W, MASK_ID) for logits in (cond, uncond))
    distance = (student[:4] - guided).abs().sum(-1) / 2
    assert ((plain - guided).abs().sum(-1) / 2 > 0.3).all(), "guidance does change the distribution"
    assert (distance < 0.02).all(), distance
    assert (student[4] - unconditional[0]).abs().sum() / 2 < 0.02
    assert losses(trainer)[-1] < 1e-3


def test_checkpoints_say_what_they_were_distilled_from(tmp_path):
    trainer = make_trainer(tmp_path / "full", guidance_distillation_scale=W)
    trainer.train()
    trainer.save_model()
    assert load_model(tmp_path / "full").config.guidance_distillation_scale == W
    trainer = make_trainer(tmp_path / "adapter", guidance_distillation_scale=W, peft_config=lora())
    trainer.train()
    trainer.save_model()
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["auto_mapping"]["dlm_tune"]["guidance_distillation_scale"] == W
    assert not hasattr(make_trainer(tmp_path).model.config, "guidance_distillation_scale")


def test_noised_prompts_are_no_condition(tmp_path):
    with pytest.raises(ValueError, match=r"prompt_noising=0.1 does not go with guidance_distillation_scale=1.5"):
        DiffusionConfig(output_dir=str(tmp_path), guidance_distillation_scale=W, prompt_noising=0.1)


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_scales_that_guide_nowhere_are_refused(tmp_path, scale):
    with pytest.raises(ValueError, match=r"guidance_distillation_scale=.* must be finite and not 0"):
        DiffusionConfig(output_dir=str(tmp_path), guidance_distillation_scale=scale)


def test_data_without_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"guidance_distillation_scale=1.5 has no effect on plain text"):
        make_trainer(tmp_path, rows=[{"text": "abc"}] * 2, guidance_distillation_scale=W)
    with pytest.raises(ValueError, match=r"guidance_distillation_scale=1.5 has no effect with completion_only_loss"):
        make_trainer(tmp_path, guidance_distillation_scale=W, completion_only_loss=False)


def test_models_that_cannot_be_their_own_teacher_are_refused(tmp_path):
    biased = lora(target_modules=["q_proj"], bias="all")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.*bias.* is trained outside of a LoRA adapter"):
        make_trainer(tmp_path, tiny_dream(), guidance_distillation_scale=W, peft_config=biased)
    for settings in ({}, {"target_modules": ["embed_tokens"]}):
        trained = get_peft_model(tiny_llada(), lora(init_lora_weights=False, **settings))
        with pytest.raises(ValueError, match=r"changes the model already. Merge it"):
            make_trainer(tmp_path, trained, guidance_distillation_scale=W)
    fresh = get_peft_model(tiny_llada(), lora())
    make_trainer(tmp_path, fresh, guidance_distillation_scale=W)


def test_parallelism_that_cannot_hold_a_copy_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, guidance_distillation_scale=W)
    settings = {"guidance_scale": W, "mask_token_id": MASK_ID}
    with pytest.raises(ValueError, match="does not run on 2 devices in one process"):
        distillation.GuidedTeacher(trainer.model, trainer.accelerator, num_devices=2, **settings)
    adapted = get_peft_model(tiny_llada(), lora())
    monkeypatch.setattr(distillation, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"FSDP and ZeRO-3 would not shard. Train an adapter"):
        distillation.GuidedTeacher(trainer.model, trainer.accelerator, **settings)
    distillation.GuidedTeacher(adapted, trainer.accelerator, **settings)
    monkeypatch.setattr(distillation, "is_deepspeed_zero3_enabled", lambda: False)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"FSDP and ZeRO-3 would not shard. Train an adapter"):
        distillation.GuidedTeacher(trainer.model, trainer.accelerator, **settings)
