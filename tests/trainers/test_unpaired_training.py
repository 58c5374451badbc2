"""Unpaired text, prompt dropout and prompt noising: what the model sees, what is scored, and how much it counts."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from dlm_tune.data import DiffusionCollator, UnpairedMixture
from dlm_tune.diffusion import mask_prompt
from dlm_tune.models import load_model
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from dlm_tune.trainers.step_noise import corrupt_step
from tests.tiny_models import BOS_ID, EOS_ID, MASK_ID, SHORT_RUN, tiny_dream, tiny_llada, tiny_tokenizer

PAIRS = [
    {"prompt": f"say {word}: ", "completion": word * (1 + i % 3)} for i, word in enumerate(["ab", "xyz", "q", "hello"])
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in PAIRS
]
TEXTS = [{"text": text} for text in ("one", "twotwo", "three", "4", "five five")]


def make_trainer(tmp_path, model=None, rows=PAIRS, texts=TEXTS, tokenizer=None, peft_config=None, **arguments):
    settings = SHORT_RUN | {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 1,
        "block_length": 4,
    }
    return DiffusionTrainer(
        model=model or tiny_llada(),
        args=DiffusionConfig(output_dir=str(tmp_path), **(settings | arguments)),
        train_dataset=Dataset.from_list(rows),
        unpaired_dataset=Dataset.from_list(texts) if texts else None,
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=peft_config,
    )


def first_batch(trainer):
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batches[0]


def step_of(num_rows, keep=(), epoch=0, first_target_position=0, num_unpaired=0, **arguments):
    """Rows of BOS, three prompt tokens and five targets; unpaired rows have fifteen."""
    rows = []
    for index in range(num_rows):
        num_tokens = 18 if index < num_unpaired else 8
        ids = [BOS_ID, *(10 + (5 * index + position) % 50 for position in range(num_tokens))]
        labels = [-100] * 4 + ids[4:]
        row = {"input_ids": ids, "labels": labels, "row_index": index}
        rows.append(row | ({"is_unpaired": index < num_unpaired} if num_unpaired else {}))
    batch = DiffusionCollator(pad_token_id=0, eos_token_id=EOS_ID, eos_policy="none")(rows)
    args = DiffusionConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **arguments)
    corrupt_step(
        [batch],
        args,
        step=0,
        epoch=epoch,
        mask_token_id=MASK_ID,
        first_target_position=first_target_position,
        keep_token_ids=keep,
    )
    return batch


# What the model sees


@pytest.mark.parametrize("keep", [(), (BOS_ID,)])
def test_a_dropped_prompt_is_masked_and_not_scored(keep):
    batch = step_of(200, keep=keep, prompt_dropout=0.3)
    hidden, noisy = batch["prompt_hidden"], batch["noisy"]
    assert abs(float(hidden.double().mean()) - 0.3) < 4 * (0.21 / 200) ** 0.5
    assert (noisy.noisy_input_ids[hidden][:, 1:4] == MASK_ID).all()
    assert (noisy.noisy_input_ids[hidden][:, 0] == (BOS_ID if keep else MASK_ID)).all()
    assert torch.equal(noisy.noisy_input_ids[~hidden][:, :4], batch["input_ids"][~hidden][:, :4])
    assert not noisy.masked[:, :4].any()
    assert not batch["loss_weights"][:, :4].any()
    plain = step_of(200)
    assert torch.equal(plain["noisy"].masked, noisy.masked)
    assert torch.equal(plain["loss_weights"], batch["loss_weights"])  # weight and denominator stay
    assert not plain["prompt_hidden"].any()


def test_dropout_is_drawn_anew_in_each_epoch_and_for_each_row():
    hidden = torch.stack([step_of(100, epoch=epoch, prompt_dropout=0.5)["prompt_hidden"] for epoch in range(40)])
    assert torch.equal(hidden[0], step_of(100, prompt_dropout=0.5)["prompt_hidden"])
    shares = hidden.double().mean(dim=0)
    assert float(shares.min()) > 0.1
    assert float(shares.max()) < 0.9
    # a batch-wide draw, as in SMDM's code, would give rows of 0 and 1
    assert float(hidden.double().mean(dim=1).min()) > 0.25
    assert step_of(50, prompt_dropout=1.0)["prompt_hidden"].all()


@pytest.mark.parametrize("first_target_position", [0, 1])
def test_a_noised_prompt_is_a_target(first_target_position):
    batch = step_of(300, prompt_noising=0.4, first_target_position=first_target_position)
    noised = batch["target_mask"][:, 1:4].all(dim=1)
    assert torch.equal(noised, batch["target_mask"][:, 1:4].any(dim=1))
    assert abs(float(noised.double().mean()) - 0.4) < 4 * (0.24 / 300) ** 0.5
    assert torch.equal(batch["target_mask"][:, 0], noised & (first_target_position == 0))
    assert batch["noisy"].masked[noised][:, 1:4].any(dim=0).all()
    total = batch["target_mask"].sum()
    assert (batch["row_items"] == total).all()


def test_kept_tokens_are_never_noised_and_hidden_prompts_never_scored():
    batch = step_of(300, keep=(BOS_ID,), prompt_noising=1.0, prompt_dropout=0.5)
    hidden = batch["prompt_hidden"]
    assert not batch["target_mask"][:, 0].any()
    assert torch.equal(batch["target_mask"][:, 1], ~hidden)
    assert (batch["noisy"].noisy_input_ids[:, 0] == BOS_ID).all()


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_an_unpaired_row_is_seen_as_the_unconditional_branch(tmp_path, rows, family):
    """Its text is tokenised as an answer and ends like one; its prompt is some row's prompt, hidden."""
    tokenizer = tiny_tokenizer(family)
    model = tiny_llada() if family == "llada" else tiny_dream()
    keep = tokenizer.all_special_tokens
    trainer = make_trainer(
        tmp_path, model, rows, tokenizer=tokenizer, unpaired_fraction=0.5, guidance_keep_tokens=keep
    )
    assert isinstance(trainer.train_dataset, UnpairedMixture)
    assert model.config.guidance_keep_token_ids == sorted(
        tokenizer.convert_tokens_to_ids(token) for token in set(keep)
    )
    pairs = {tuple(row["input_ids"]): row["labels"] for row in trainer.train_dataset.paired}
    prompts = {ids[: labels.index(next(filter(lambda label: label != -100, labels)))] for ids, labels in pairs.items()}
    seen = set()
    for _ in range(2):
        for batch in trainer.get_train_dataloader():
            trainer.corrupt_batches([batch], step=0, epoch=0)
            noisy = batch["noisy"]
            for row in batch["is_unpaired"].nonzero()[:, 0].tolist():
                is_prompt = batch["attention_mask"][row].bool() & ~batch["target_mask"][row]
                prompt = batch["input_ids"][row][is_prompt]
                assert tuple(prompt.tolist()) in prompts
                shown = mask_prompt(prompt[None], prompt[None] > -1, MASK_ID, trainer.guidance_keep_token_ids)
                assert torch.equal(noisy.noisy_input_ids[row][is_prompt], shown[0])
                answer = batch["input_ids"][row][batch["target_mask"][row]].tolist()
                assert len(answer) % 4 == 0  # filled to a block
                seen.add(tokenizer.decode(answer, skip_special_tokens=True).strip())
            for row in (~batch["is_unpaired"]).nonzero()[:, 0].tolist():
                is_prompt = batch["attention_mask"][row].bool() & ~batch["target_mask"][row]
                assert torch.equal(noisy.noisy_input_ids[row][is_prompt], batch["input_ids"][row][is_prompt])
        trainer.state.epoch = 1.0
    assert seen == {row["text"] for row in TEXTS}


def test_chat_text_ends_as_an_assistants_turn(tmp_path):
    trainer = make_trainer(tmp_path, rows=CHATS)
    end_of_turn = tiny_tokenizer().convert_tokens_to_ids("<|eot_id|>")
    assert all(row["input_ids"][-1] == end_of_turn for row in trainer.train_dataset.unpaired)
    plain = make_trainer(tmp_path)
    assert all(row["input_ids"][-1] == EOS_ID for row in plain.train_dataset.unpaired)


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_turns_of_messages_end_like_completions(tmp_path, family):
    """Answers are filled to a block behind the end of turn, in `messages` too; no prompt follows an answer."""
    tokenizer = tiny_tokenizer(family)
    messages = [{"messages": [*row["prompt"], *row["completion"]]} for row in CHATS]
    for rows in (CHATS, messages):
        trainer = make_trainer(
            tmp_path, tiny_llada() if family == "llada" else tiny_dream(), rows, tokenizer=tokenizer
        )
        batch = first_batch(trainer)
        for row in range(len(batch["input_ids"])):
            targets = batch["target_mask"][row].nonzero()[:, 0]
            assert len(targets) % 4 == 0
            assert int(targets[-1]) == int(batch["attention_mask"][row].nonzero()[-1])


# How much it counts


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_gradient_is_the_weighted_sum_of_the_parts(tmp_path, normalization, fraction):
    """Each part normalised by its own targets or rows, computed from dense logits in float64."""
    model = tiny_llada().double()
    trainer = make_trainer(
        tmp_path,
        model,
        PAIRS * 2,
        unpaired_fraction=fraction,
        per_device_train_batch_size=8,
        loss_normalization=normalization,
        loss_weighting="nelbo",
    )
    trainer.create_optimizer()
    batch = first_batch(trainer)
    unpaired, noisy = batch["is_unpaired"], batch["noisy"]
    assert int(unpaired.sum()) == 8 * fraction
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()

    logits = model(input_ids=noisy.noisy_input_ids, attention_mask=batch["attention_mask"]).logits
    nll = -logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None])[..., 0]
    per_row = noisy.weights * (nll * noisy.masked).sum(dim=1)
    targets = batch["target_mask"].sum(dim=1)
    parts = []
    for members in (~unpaired, unpaired):
        if normalization == "tokens":
            parts.append(per_row[members].sum() / targets[members].sum())
        else:
            parts.append((per_row / targets)[members].mean())
    expected = (1 - fraction) * parts[0] + fraction * parts[1]
    expected.backward()
    reference = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert (gradient - reference).norm() < 1e-6 * reference.norm()


def test_parts_of_different_length_have_equal_say():
    """Long unpaired rows do not drown short answers: each part counts by its share of the rows."""
    batch = step_of(8, num_unpaired=2)
    assert batch["target_mask"].sum(dim=1).tolist() == [15] * 2 + [5] * 6
    assert batch["row_items"].tolist() == pytest.approx([30 * 8 / 2] * 2 + [30 * 8 / 6] * 6)
    # so that the weights of all targets of a part sum to its share of the rows
    sums = batch["target_mask"].sum(dim=1) / batch["row_items"]
    assert float(sums[:2].sum()) == pytest.approx(2 / 8)
    assert (batch["loss_weights"].sum(dim=1) > 0).all()


def test_a_step_of_one_kind_has_the_full_weight():
    for num_unpaired in (0, 8):
        batch = step_of(8, num_unpaired=num_unpaired)
        assert (batch["row_items"] == batch["target_mask"].sum()).all()


def test_both_parts_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, per_device_train_batch_size=8)
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"nelbo_paired", "nelbo_unpaired", "masked_accuracy_paired", "masked_accuracy_unpaired"} <= log.keys()
    assert (
        min(log["nelbo_paired"], log["nelbo_unpaired"])
        < log["nelbo"]
        < max(log["nelbo_paired"], log["nelbo_unpaired"])
    )


# Runs


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resume_continues_the_same_stream_over_epochs(tmp_path):
    arguments = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "unpaired_fraction": 0.3,
        "prompt_dropout": 0.2,
    }
    whole = make_trainer(tmp_path / "run", **arguments)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert whole.state.epoch > 2
    assert losses(resumed) == losses(whole)


def test_workers_read_the_same_stream(tmp_path):
    plain, workers = (make_trainer(tmp_path, max_steps=4, dataloader_num_workers=number) for number in (0, 2))
    for trainer in (plain, workers):
        trainer.train()
    assert losses(plain) == losses(workers)


def test_what_stays_visible_is_stored_with_the_model(tmp_path):
    trainer = make_trainer(tmp_path, guidance_keep_tokens=["<|startoftext|>"], prompt_dropout=0.1, texts=None)
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["guidance_keep_token_ids"] == [BOS_ID]
    loaded = load_model(tmp_path)
    assert loaded.config.guidance_keep_token_ids == [BOS_ID]
    # a later run without the key keeps it
    again = make_trainer(tmp_path / "again", loaded, texts=None)
    assert again.guidance_keep_token_ids == [BOS_ID]


def test_what_stays_visible_is_stored_with_an_adapter(tmp_path):
    base = tiny_llada()
    base.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "adapter",
        load_model(tmp_path / "base"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        guidance_keep_tokens=["<|startoftext|>"],
    )
    trainer.save_model()
    assert load_model(tmp_path / "adapter").get_base_model().config.guidance_keep_token_ids == [BOS_ID]
    assert not hasattr(load_model(tmp_path / "base").config, "guidance_keep_token_ids")


@pytest.mark.parametrize(
    ("arguments", "texts", "message"),
    [
        ({"unpaired_fraction": 0.5}, None, "unpaired_fraction=0.5 has no effect without an unpaired_dataset"),
        ({"packing": True, "max_length": 64}, TEXTS, "packing=True does not go with an unpaired_dataset"),
        (
            {"train_sampling_strategy": "group_by_length"},
            TEXTS,
            "train_sampling_strategy='group_by_length' does not go",
        ),
        ({"guidance_keep_tokens": ["<|nothing|>"]}, None, r"guidance_keep_tokens=.*<\|nothing\|>.*does not have"),
        ({"unpaired_fraction": 1.0}, TEXTS, "unpaired_fraction=1.0 must lie between 0 and 1"),
        ({"unpaired_fraction": 1e-12}, TEXTS, "unpaired_fraction=1e-12 must lie between 0 and 1"),
        ({"prompt_dropout": 1.0, "prompt_noising": 0.5}, None, "prompt_noising=0.5 has no effect with prompt_dropout"),
        ({"prompt_dropout": 1.5}, None, "prompt_dropout=1.5 must lie between 0 and 1"),
        ({}, [{"text": "a<|mdm_mask|>b"}], "mask token"),
        ({"max_length": 4}, [{"text": "much too long a text"}], "max_length"),
    ],
)
def test_bad_settings_are_refused(tmp_path, arguments, texts, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, texts=texts, **arguments)


@pytest.mark.parametrize("key", ["prompt_dropout", "prompt_noising"])
def test_plain_text_has_no_prompt_to_hide(tmp_path, key):
    with pytest.raises(ValueError, match=f"{key}=0.1 has no effect on plain text"):
        make_trainer(tmp_path, rows=TEXTS, texts=None, block_length=None, **{key: 0.1})


@pytest.mark.parametrize(
    ("rows", "setting"),
    [
        (PAIRS, {"completion_only_loss": False}),
        ([{"messages": row["prompt"] + row["completion"]} for row in CHATS], {"assistant_only_loss": False}),
    ],
    ids=["text", "chat"],
)
@pytest.mark.parametrize("given", [{"prompt_dropout": 0.1}, {"prompt_noising": 0.1}, {"unpaired_fraction": 0.5}, {}])
def test_prompts_that_are_targets_are_not_hidden(tmp_path, rows, setting, given):
    """Unpaired text would stand alone, where sampling puts it behind a masked prompt."""
    has_text = not given or "unpaired_fraction" in given
    name = next(iter(given), "unpaired_dataset")
    with pytest.raises(ValueError, match=f"{name}.* has no effect where prompts are targets.*{next(iter(setting))}"):
        make_trainer(tmp_path, rows=rows, texts=TEXTS if has_text else None, **given, **setting)


def test_plain_text_is_not_mixed_with_unpaired_text(tmp_path):
    with pytest.raises(ValueError, match="unpaired_dataset has no effect on plain text"):
        make_trainer(tmp_path, rows=TEXTS, block_length=None)
