import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from dlm_tune.diffusion import NOISE_SCHEDULES, NoiseStream, corrupt, counter_uniform
from dlm_tune.diffusion.timesteps import stratified
from dlm_tune.models import load_model
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import MASK_ID, SHORT_RUN, save_tiny_checkpoint, tiny_dream, tiny_llada, tiny_tokenizer

PAIRS = [
    {"prompt": f"say {word}: ", "completion": word * repeat}
    for word, repeat in [("ab", 1), ("xyz", 4), ("q", 2), ("hello", 1), ("no", 6), ("w", 1), ("much", 3), ("to", 2)]
]


def make_trainer(tmp_path, model=None, rows=PAIRS, eval_rows=None, callbacks=None, peft_config=None, **arguments):
    settings = SHORT_RUN | {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 1,
        "eos_policy": "one",
    }
    return DiffusionTrainer(
        model=model or tiny_llada(),
        args=DiffusionConfig(output_dir=str(tmp_path), **(settings | arguments)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of each optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
def test_gradients_do_not_depend_on_the_cut_into_microbatches(tmp_path, normalization, masking):
    """One global batch of 8 ragged rows in 1, 2, 4 and 8 microbatches: same loss, gradients to 1e-6 relative."""
    results = {}
    for microbatches in (1, 2, 4, 8):
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=8 // microbatches,
            gradient_accumulation_steps=microbatches,
            loss_normalization=normalization,
            masking=masking,
            max_grad_norm=0.0,
            callbacks=[recorder],
        )
        trainer.train()
        gradient = torch.cat([g.flatten() for g in recorder.steps[0].values()])
        results[microbatches] = (losses(trainer)[0], gradient)
    loss, gradient = results[1]
    assert gradient.norm() > 0.01
    for microbatches in (2, 4, 8):
        assert results[microbatches][0] == pytest.approx(loss, rel=1e-6)
        assert (results[microbatches][1] - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_loss_of_a_step_equals_the_formula_on_dense_logits(tmp_path, normalization, make_model):
    """LLaDA eq. 6 written out over the full logits, with the noise drawn again from its keys."""
    model = make_model().double()
    settings = {"noise_schedule": "linear", "noise_seed": 5, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, model, loss_normalization=normalization, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()

    input_ids, targets, rows = batch["input_ids"], batch["target_mask"], batch["row_index"]
    noisy = corrupt(
        input_ids,
        targets,
        stratified(5, 0, torch.arange(8), 8),
        counter_uniform(5, NoiseStream.MASK, 0, rows[:, None], torch.arange(input_ids.shape[1])),
        schedule=NOISE_SCHEDULES["linear"],
        masking="exact_count",
        mask_token_id=MASK_ID,
    )
    with torch.no_grad():
        logits = model(input_ids=noisy.noisy_input_ids, attention_mask=batch["attention_mask"]).logits
    if model.config.logits_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    cross_entropy = -logits.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    total, per_row = 0.0, []
    for row in range(8):
        answer, masked = int(targets[row].sum()), noisy.masked[row]
        nelbo = answer / int(masked.sum()) * float(cross_entropy[row][masked].sum())
        total += nelbo
        per_row.append(nelbo / answer)
    expected = total / int(targets.sum()) if normalization == "tokens" else sum(per_row) / 8
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-6)


def test_prompts_are_never_masked_and_padding_is_never_attended(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = tiny_tokenizer()
    for step in range(20):
        trainer.corrupt_batches([batch], step=step, epoch=step)
        noisy = batch["noisy"]
        assert not (noisy.masked & ~batch["target_mask"]).any()
        assert not (batch["target_mask"] & ~batch["attention_mask"].bool()).any()
    for row, index in enumerate(batch["row_index"].tolist()):
        pair = PAIRS[index]
        attended = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tokenizer.decode(attended, skip_special_tokens=True) == pair["prompt"] + pair["completion"]
        answer = batch["input_ids"][row][batch["target_mask"][row]]
        assert tokenizer.decode(answer) == pair["completion"] + tokenizer.eos_token


def test_noise_is_fresh_in_every_epoch_and_the_same_in_every_run(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))

    def masks(step, epoch):
        trainer.corrupt_batches([batch], step=step, epoch=epoch)
        return batch["noisy"].masked

    assert torch.equal(masks(3, 1), masks(3, 1))
    assert not torch.equal(masks(3, 1), masks(3, 2))
    assert not torch.equal(masks(3, 1), masks(4, 1))


def test_masks_are_keyed_by_the_pass_over_the_data(tmp_path, monkeypatch):
    """Seven rows in microbatches of two, two of them a step: two steps a pass, the last one ragged."""
    trainer = make_trainer(
        tmp_path, rows=PAIRS[:7], per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5
    )
    seen, corrupt_batches = [], trainer.corrupt_batches

    def record(batches, step, epoch):
        seen.append((step, epoch))
        corrupt_batches(batches, step, epoch)

    monkeypatch.setattr(trainer, "corrupt_batches", record)
    trainer.train()
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]


def test_strata_span_all_devices_of_a_process(tmp_path):
    """Without a launcher, transformers gives each of two visible GPUs `per_device_train_batch_size` rows."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.args._n_gpu = 2
    rows = [trainer.train_dataset[index] for index in range(8)]
    batches = [trainer.data_collator(rows[:4]), trainer.data_collator(rows[4:])]
    trainer.corrupt_batches(batches, step=0, epoch=0)
    timesteps = torch.cat([batch["noisy"].timesteps for batch in batches])
    assert (timesteps * 8).long().sort().values.tolist() == list(range(8))


def test_position_zero_is_never_a_target_of_a_shifted_model(tmp_path):
    trainer = make_trainer(tmp_path, tiny_dream(), rows=[{"text": "abcdef"}, {"text": "gh"}], eos_policy="one")
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["target_mask"][:, 0].any()
    assert batch["target_mask"][:, 1].all()


def test_conversations_train_on_assistant_turns_only(tmp_path):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "second"},
    ]
    trainer = make_trainer(tmp_path, rows=[{"messages": messages}])
    batch = next(iter(trainer.get_train_dataloader()))
    assert tiny_tokenizer().decode(batch["input_ids"][batch["target_mask"]]) == "first<|eot_id|>second<|eot_id|>"


def test_evaluation_is_repeatable_and_independent_of_batch_size_and_training_noise(tmp_path):
    evaluations = [
        make_trainer(tmp_path, eval_rows=PAIRS[:7], per_device_eval_batch_size=size).evaluate()
        for size in (7, 7, 3, 1)
    ]
    assert evaluations[0]["eval_nelbo"] == evaluations[1]["eval_nelbo"], "same rows, same noise: equal to the bit"
    for evaluation in evaluations[2:]:
        for key in ("eval_nelbo", "eval_nelbo_standard_error", "eval_masked_accuracy", "eval_nll_masked_75_100"):
            assert evaluation[key] == pytest.approx(evaluations[0][key], rel=1e-6)
    other_seed = make_trainer(tmp_path, eval_rows=PAIRS[:7], noise_seed=1).evaluate()
    assert other_seed["eval_nelbo"] != evaluations[0]["eval_nelbo"]
    assert evaluations[0]["eval_num_rows"] == 7
    assert evaluations[0]["eval_perplexity_bound"] == pytest.approx(math.exp(evaluations[0]["eval_nelbo"]))


def test_evaluation_in_the_middle_does_not_change_training(tmp_path):
    with_evaluation = make_trainer(
        tmp_path, max_steps=4, per_device_train_batch_size=4, eval_rows=PAIRS[:3], eval_strategy="steps", eval_steps=2
    )
    without = make_trainer(tmp_path, max_steps=4, per_device_train_batch_size=4)
    with_evaluation.train()
    without.train()
    assert losses(with_evaluation) == losses(without)


def test_evaluation_agrees_with_the_enumerated_bound(tmp_path):
    """Answers of up to 5 tokens: 2**5 - 1 masked sets each; many samples come within 4 standard errors."""
    from dlm_tune.evaluation import estimate_nelbo

    rows = [pair for pair in PAIRS if len(pair["completion"]) < 5]
    trainer = make_trainer(tmp_path, eval_rows=rows, eval_noise_samples=400)
    metrics = trainer.evaluate()
    nats = tokens = 0.0
    for batch in trainer.get_eval_dataloader():
        exact = estimate_nelbo(
            trainer.model, batch["input_ids"], batch["target_mask"], batch["attention_mask"], estimator="enumeration"
        )
        nats += float(exact.nats.sum())
        tokens += int(exact.num_tokens.sum())
    assert metrics["eval_nelbo"] == pytest.approx(nats / tokens, rel=0.01)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_resume_continues_the_same_run(tmp_path, peft):
    """Stop at step 3 in the middle of an epoch and go on: same losses and weights as without the stop."""

    def run(directory, **arguments):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if peft else None
        return make_trainer(
            directory, per_device_train_batch_size=2, max_steps=6, peft_config=config, learning_rate=1e-2, **arguments
        )

    whole = run(tmp_path / "whole")
    whole.train()
    stopped = run(tmp_path / "stopped", save_strategy="steps", save_steps=3)
    stopped.train()
    resumed = run(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for (name, ours), (_, theirs) in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert resumed.state.log_history[-2]["num_tokens"] == whole.state.log_history[-2]["num_tokens"]


def test_saved_checkpoint_has_the_original_layout_and_evaluates_the_same(tmp_path):
    base = save_tiny_checkpoint(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", str(base), eval_rows=PAIRS[:4], max_steps=3, model_init_kwargs=None)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    again = make_trainer(tmp_path / "out2", load_model(str(tmp_path / "saved")), eval_rows=PAIRS[:4]).evaluate()
    assert again["eval_nelbo"] == metrics["eval_nelbo"]


def test_adapter_trains_saves_and_loads(tmp_path):
    base = save_tiny_checkpoint(tmp_path / "base")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = make_trainer(
        tmp_path / "out",
        load_model(str(base)),
        eval_rows=PAIRS,
        max_steps=60,
        learning_rate=2e-2,
        peft_config=config,
    )
    before = trainer.evaluate()["eval_nelbo"]
    trainer.train()
    after = trainer.evaluate()["eval_nelbo"]
    assert after < before - 1
    trainer.save_model(tmp_path / "adapter")
    loaded = load_model(str(base), adapter=str(tmp_path / "adapter"))
    assert make_trainer(tmp_path / "out2", loaded, eval_rows=PAIRS).evaluate()["eval_nelbo"] == pytest.approx(
        after, rel=1e-6
    )


def test_overfits_eight_pairs(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llada(init_std=0.05), max_steps=150, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[0] > 3.5
    assert losses(trainer)[-1] < 1.0


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(model.parameters()).data.fill_(float("nan"))

    trainer = make_trainer(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=2, callbacks=[Poison()], per_device_train_batch_size=4
    )
    with pytest.raises(FloatingPointError, match="loss is nan at step 4") as error:
        trainer.train()
    assert "learning_rate" in str(error.value)
    assert "row_index" in str(error.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_gradient_that_is_not_finite_stops_before_the_optimiser(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))

    trainer = make_trainer(tmp_path, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match="gradient norm is"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_log_has_what_the_documentation_promises(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    for key in ("loss", "nelbo", "masked_accuracy", "mean_timestep", "fraction_masked", "num_tokens", "grad_norm"):
        assert key in entry
    assert any(key.startswith("nll_masked_") for key in entry)
    assert entry["nelbo"] == pytest.approx(entry["loss"], rel=1e-5)
    attended = sum(len(pair["prompt"]) + len(pair["completion"]) + 1 for pair in PAIRS)
    assert entry["num_tokens"] == attended
    json.dumps(trainer.state.log_history)


def test_progress_is_one_short_line_a_log_entry(tmp_path, capsys):
    make_trainer(tmp_path, eval_rows=PAIRS[:2], eval_strategy="steps", eval_steps=1, disable_tqdm=False).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1:")]
    assert len(lines) == 3
    assert all(len(line) < 100 for line in lines)
    assert "loss" in lines[0]
    assert "held-out nelbo" in lines[1]
    assert "trained in" in lines[2]


def test_refusals_name_the_remedy(tmp_path):
    with pytest.raises(TypeError, match=r"Load it with\s+dlm_tune\.load_model"):
        make_trainer(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="map-style"):
        DiffusionTrainer(
            model=tiny_llada(),
            args=DiffusionConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
            train_dataset=Dataset.from_list(PAIRS).to_iterable_dataset(),
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(ValueError, match="compute_metrics and compute_loss_func would have no effect"):
        DiffusionTrainer(
            model=tiny_llada(),
            args=DiffusionConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tiny_tokenizer(),
            compute_metrics=print,
        )


def test_rows_are_checked_before_tokenisation(tmp_path):
    with pytest.raises(ValueError, match="invalid_rows"):
        make_trainer(tmp_path, rows=[*PAIRS, {"prompt": "empty: ", "completion": None}])
    assert (
        len(
            make_trainer(
                tmp_path, rows=[*PAIRS, {"prompt": "x", "completion": None}], invalid_rows="drop"
            ).train_dataset
        )
        == 8
    )


def test_completion_mask_of_tokenised_rows_is_honoured(tmp_path):
    trainer = make_trainer(tmp_path, rows=[{"input_ids": [10, 11, 12, 13], "completion_mask": [0, 0, 1, 1]}])
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["target_mask"][0].tolist() == [False, False, True, True, True], "two tokens and the EOS"


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab"):
        make_trainer(tmp_path, rows=[{"input_ids": [10, 5000]}])


def test_formatting_functions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="formatting_func would be ignored"):
        DiffusionTrainer(
            model=tiny_llada(),
            args=DiffusionConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tiny_tokenizer(),
            formatting_func=str,
        )


@pytest.mark.parametrize(
    ("rows", "policy", "block_length"),
    [
        (PAIRS, "pad_to_block", 32),
        ([{"text": "plain text"}] * 8, "one", None),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8,
            "pad_to_block",
            32,
        ),
        ([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}] * 8, "pad_to_block", 32),
        ([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 8, "one", None),
        ([{"input_ids": [5, 6, 7]}] * 8, "one", None),
    ],
)
def test_answers_are_filled_to_a_block_and_plain_text_is_not(tmp_path, rows, policy, block_length):
    """With one EOS, the canvas of an answer would tell its length."""
    trainer = make_trainer(tmp_path, rows=rows, eos_policy=None)
    assert (trainer.args.eos_policy, trainer.args.block_length) == (policy, block_length)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    if policy == "pad_to_block":
        assert int(batch["target_mask"].sum()) == 32


def test_block_length_of_plain_text_needs_its_policy(tmp_path):
    with pytest.raises(ValueError, match="block_length=8 has no effect on plain text"):
        make_trainer(tmp_path, rows=[{"text": "plain text"}] * 8, eos_policy=None, block_length=8)
    trainer = make_trainer(tmp_path, eos_policy=None, block_length=8)
    assert (trainer.args.eos_policy, trainer.args.block_length) == ("pad_to_block", 8)
