"""Packing changes what a sequence holds, not what is trained on."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from dlm_tune.data import PackedRows
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import tiny_dream, tiny_llada, tiny_tokenizer
from tests.trainers.test_diffusion_trainer import GradientRecorder, losses, make_trainer

ROWS = [
    {"prompt": f"say {letter * (1 + i % 3)}: ", "completion": letter * (1 + 5 * i % 11)}
    for i, letter in enumerate("abcdefghijklmnopq")
]


def gradients(trainer, batches):
    """Loss and gradient of one optimiser step over the given microbatches."""
    trainer.model.zero_grad()
    trainer.corrupt_batches(batches, step=2, epoch=1)
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(trainer.model, batch)
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("weighting", ["nelbo", "cart"])
def test_packed_and_unpacked_rows_have_the_same_loss_and_gradient(tmp_path, make_model, normalization, weighting):
    settings = {"max_length": 48, "loss_normalization": normalization, "loss_weighting": weighting}
    packed = make_trainer(tmp_path, make_model(), rows=ROWS, packing=True, **settings)
    plain = make_trainer(tmp_path, make_model(), rows=ROWS, **settings)
    assert isinstance(packed.train_dataset, PackedRows)
    assert packed.train_dataset.max_rows > 1
    items = [packed.train_dataset[i] for i in range(len(packed.train_dataset))]
    middle = len(items) // 2
    batches = [packed.data_collator(items[:middle]), packed.data_collator(items[middle:])]
    order = torch.cat([batch["row_index"] for batch in batches]).tolist()
    assert sorted(order) == list(range(len(ROWS)))
    assert max(int(batch["packed_shape"][0]) for batch in batches) < len(ROWS) / 2
    unpacked = [plain.data_collator([plain.train_dataset[i] for i in order])]

    loss, gradient = gradients(packed, batches)
    expected_loss, expected = gradients(plain, unpacked)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert expected.norm() > 0.01
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_a_packed_run_does_not_depend_on_the_cut_into_microbatches(tmp_path):
    results = []
    for batch_size in (1, 2, 4):
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            rows=ROWS,
            packing=True,
            max_length=48,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_grad_norm=0.0,
            callbacks=[recorder],
        )
        trainer.train()
        results.append((losses(trainer)[0], torch.cat([g.flatten() for g in recorder.steps[0].values()])))
    loss, gradient = results[0]
    for other_loss, other in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - gradient).norm() < 1e-6 * gradient.norm()


def test_packed_evaluation_has_the_numbers_of_unpacked_evaluation(tmp_path):
    settings = {"rows": ROWS, "eval_rows": ROWS[:11], "max_length": 48}
    plain = make_trainer(tmp_path, eval_packing=False, packing=True, **settings).evaluate()
    for batch_size in (1, 3):
        packed = make_trainer(tmp_path, packing=True, per_device_eval_batch_size=batch_size, **settings)
        assert isinstance(packed.eval_dataset, PackedRows)
        metrics = packed.evaluate()
        assert metrics["eval_num_rows"] == 11
        for key in plain:
            if not key.endswith(("runtime", "per_second", "preparation_time")):
                assert metrics[key] == pytest.approx(plain[key], rel=1e-5), key
    # a data set given to evaluate() is packed too
    again = packed.evaluate(Dataset.from_list(ROWS[:11]))
    assert again["eval_nelbo"] == pytest.approx(plain["eval_nelbo"], rel=1e-5)


def test_a_packed_run_trains_saves_and_counts(tmp_path):
    trainer = make_trainer(
        tmp_path,
        rows=ROWS * 2,
        packing=True,
        max_length=48,
        per_device_train_batch_size=2,
        max_steps=30,
        learning_rate=1e-2,
        gradient_checkpointing=True,
    )
    assert trainer.train_dataset.efficiency > 0.8
    trainer.train()
    logged = losses(trainer)
    assert sum(logged[-5:]) < 0.9 * sum(logged[:5])
    assert trainer.state.log_history[-2]["tokens_per_second"] > 0


def packed_trainer(tmp_path, model=None, dataset=None, **arguments):
    config = DiffusionConfig(
        output_dir=str(tmp_path),
        packing=True,
        max_length=48,
        eos_policy="one",
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return DiffusionTrainer(
        model=model or tiny_llada(),
        args=config,
        train_dataset=dataset or Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        **arguments,
    )


def test_rows_that_are_prepared_already_are_packed_too(tmp_path):
    first = packed_trainer(tmp_path)
    again = packed_trainer(tmp_path, dataset=first.train_dataset.rows)
    assert isinstance(again.train_dataset, PackedRows)
    assert len(again.train_dataset) == len(first.train_dataset)


def test_what_packing_refuses(tmp_path):
    with pytest.raises(ValueError, match="data_collator cannot be given with packing"):
        packed_trainer(tmp_path, data_collator=lambda rows: rows)
    model = tiny_llada()
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"cannot keep packed documents apart\. Load the model with one of sdpa"):
        packed_trainer(tmp_path, model=model)


def test_random_lengths_are_for_plain_text(tmp_path):
    with pytest.raises(ValueError, match=r"random_length_probability=0\.5 has no effect on prompts"):
        make_trainer(tmp_path, rows=ROWS, random_length_probability=0.5)
    text = [{"text": "some words in a row"}, {"text": "and others here"}]
    trainer = make_trainer(tmp_path, rows=text, random_length_probability=0.5, packing=True, max_length=48)
    trainer.train()
    assert losses(trainer)[0] > 0


def test_only_the_nelbo_weighting_is_the_bound(tmp_path):
    """The logged `nelbo` is that of the same noise whatever the weighting of the loss."""
    logs = {}
    for weighting in ("nelbo", "uniform", "cart"):
        trainer = make_trainer(tmp_path, loss_weighting=weighting)
        trainer.train()
        logs[weighting] = trainer.state.log_history[0]
    assert logs["nelbo"]["loss"] == pytest.approx(logs["nelbo"]["nelbo"], rel=1e-5)
    for weighting in ("uniform", "cart"):
        assert logs[weighting]["nelbo"] == pytest.approx(logs["nelbo"]["nelbo"], rel=1e-5)
        assert logs[weighting]["loss"] < 0.9 * logs[weighting]["nelbo"]


def test_prepared_rows_that_repeat_an_index_are_refused(tmp_path):
    rows = packed_trainer(tmp_path).train_dataset.rows
    with pytest.raises(ValueError, match="the prepared train rows repeat a row_index"):
        packed_trainer(tmp_path, dataset=concatenate_datasets([rows, rows]))
