"""Training with annealed attention: which mask enters the loss, and what it does not depend on."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlm_tune.models.annealing import RightContext, annealed_attention
from dlm_tune.trainers import DiffusionConfig
from tests.models.test_mixin import tiny_decoder
from tests.tiny_models import tiny_llada
from tests.trainers.test_diffusion_trainer import PAIRS, GradientRecorder, losses, make_trainer
from tests.trainers.test_packed_training import ROWS, gradients


def annealed_trainer(tmp_path, rows=PAIRS, annealing_steps=4, model=None, **arguments):
    model = model or tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True)
    return make_trainer(tmp_path, model, rows, attention_annealing_steps=annealing_steps, **arguments)


def flat(gradient):
    return torch.cat([part.flatten() for part in gradient.values()])


def test_the_mask_of_the_step_is_what_the_model_gets(tmp_path):
    """Right-context share (step + 1) / N, keyed by noise seed, step and row; at N - 1 nothing is added any more."""
    trainer = annealed_trainer(tmp_path, noise_seed=5)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = []
    trainer.model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    attended = batch["attention_mask"]
    rows = batch["row_index"][:, None].expand_as(attended)
    for step, share in ((0, 0.25), (1, 0.5), (2, 0.75)):
        fresh = dict(batch)
        trainer.corrupt_batches([fresh], step=step, epoch=0)
        trainer.compute_loss(trainer.model, fresh)
        expected = annealed_attention(attended, rows, RightContext(share, 5, step))
        both = attended[:, None, :, None] & attended[:, None, None, :]
        assert torch.equal(seen[-1] & both.bool(), expected & both.bool())
        assert (seen[-1].diagonal(dim1=2, dim2=3)).all()


def test_after_annealing_training_is_that_without_it_to_the_bit(tmp_path):
    annealed = annealed_trainer(tmp_path)
    plain = annealed_trainer(tmp_path, annealing_steps=None)
    items = [plain.train_dataset[i] for i in range(len(plain.train_dataset))]
    results = {}
    for name, trainer in (("annealed", annealed), ("plain", plain)):
        for step in (2, 3, 50):
            batch = trainer.data_collator(items)
            trainer.model.zero_grad()
            trainer.corrupt_batches([batch], step=step, epoch=0)
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
            results[name, step] = loss.item(), gradient, "right_context" in batch
    assert results["annealed", 2][2]
    assert abs(results["annealed", 2][0] - results["plain", 2][0]) > 1e-3
    for step in (3, 50):
        assert results["annealed", step][0] == results["plain", step][0]
        assert torch.equal(results["annealed", step][1], results["plain", step][1])
        assert not results["annealed", step][2]


def test_annealed_gradients_do_not_depend_on_the_cut_into_microbatches(tmp_path):
    results = []
    for microbatches in (1, 2, 8):
        recorder = GradientRecorder()
        trainer = annealed_trainer(
            tmp_path,
            per_device_train_batch_size=8 // microbatches,
            gradient_accumulation_steps=microbatches,
            max_grad_norm=0.0,
            callbacks=[recorder],
        )
        trainer.train()
        results.append((losses(trainer)[0], flat(recorder.steps[0])))
    loss, gradient = results[0]
    assert gradient.norm() > 0.01
    for other_loss, other in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_annealed_as_unpacked_ones(tmp_path, attention):
    """And so see nothing of each other: loss and gradient are those of the rows by themselves."""
    trainers = []
    for packing in (True, False):
        model = tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True)
        model.set_attn_implementation(attention)
        trainers.append(annealed_trainer(tmp_path, ROWS, model=model, packing=packing, max_length=48))
    packed, plain = trainers
    items = [packed.train_dataset[i] for i in range(len(packed.train_dataset))]
    batches = [packed.data_collator(items[:2]), packed.data_collator(items[2:])]
    order = torch.cat([batch["row_index"] for batch in batches]).tolist()
    unpacked = [plain.data_collator([plain.train_dataset[i] for i in order])]
    loss, gradient = gradients(packed, batches)
    assert all("right_context" in batch for batch in batches)
    expected_loss, expected = gradients(plain, unpacked)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert expected.norm() > 0.01
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_an_adapter_and_checkpointing_take_the_same_mask(tmp_path):
    results = {}
    for checkpointing in (False, True):
        recorder = GradientRecorder()
        adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = annealed_trainer(
            tmp_path, peft_config=adapter, callbacks=[recorder], gradient_checkpointing=checkpointing
        )
        trainer.train()
        results[checkpointing] = losses(trainer)[0], flat(recorder.steps[0])
    plain = annealed_trainer(tmp_path)
    plain.train()
    assert results[False][0] == pytest.approx(losses(plain)[0], rel=1e-6), "a fresh adapter changes nothing"
    assert results[True][0] == results[False][0]
    assert results[False][1].norm() > 1e-4
    torch.testing.assert_close(results[True][1], results[False][1])


def test_a_resumed_run_anneals_as_if_it_had_not_stopped(tmp_path):
    settings = {"max_steps": 4, "annealing_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = annealed_trainer(tmp_path, **settings)
    whole.train()
    shares = [entry["attention_right_context"] for entry in whole.state.log_history if "loss" in entry]
    assert shares == [0.25, 0.5, 0.75, 1.0]
    resumed = annealed_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_evaluation_attends_in_both_directions(tmp_path):
    annealed = annealed_trainer(tmp_path, annealing_steps=100, eval_rows=PAIRS[:5]).evaluate()
    plain = annealed_trainer(tmp_path, annealing_steps=None, eval_rows=PAIRS[:5]).evaluate()
    assert annealed["eval_nelbo"] == plain["eval_nelbo"]


def test_a_run_that_ends_before_full_attention_says_so(tmp_path, caplog):
    trainer = annealed_trainer(tmp_path, annealing_steps=8, max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "attention_annealing_steps=8 is more than the 2 steps of this run" in caplog.text
    assert "seen 25% of those behind them" in caplog.text
    caplog.clear()
    trainer = annealed_trainer(tmp_path, annealing_steps=2, max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "attention_annealing_steps" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_annealing_steps": -1}, r"attention_annealing_steps=-1 must be a number of steps"),
        ({"attention_annealing_steps": 1}, r"attention_annealing_steps=1 has no effect"),
        (
            {"attention_annealing_steps": 8, "guidance_distillation_scale": 1.0},
            r"attention_annealing_steps=8 does not go with guidance_distillation_scale=1\.0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    DiffusionConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, attention_annealing_steps=0)


def test_models_that_cannot_be_annealed_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="a llada checkpoint was trained with attention in both directions"):
        annealed_trainer(tmp_path, model=tiny_llada())
    model = tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        annealed_trainer(tmp_path, model=model)
