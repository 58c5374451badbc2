"""The second branch of guidance sees exactly what training without a prompt showed the model."""

import pytest
import torch
from datasets import Dataset

from dlm_tune.diffusion import TIMESTEP_SAMPLERS
from dlm_tune.generation import generate, pad_prompts, tokenize_prompt
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import MASK_ID, tiny_dream, tiny_llada, tiny_tokenizer

CANVAS = 8
TEXTS = [
    {"prompt": f"say {word}: ", "completion": word}
    for word in ("ab", "xyz", "q", "hello", "a longer one"[: CANVAS - 2])
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"][:4]}],
    }
    for row in TEXTS
]


class Seen:
    """What the transformer is called with: `(tokens, positions)` of the attended tokens of each row."""

    def __init__(self, model):
        self.calls = []
        model.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        input_ids, attention_mask, position_ids = (
            kwargs[f"{name}"] for name in ("input_ids", "attention_mask", "position_ids")
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        assert attention_mask.ndim == 2, "all attended tokens attend to each other"
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        attended = attention_mask.bool()
        self.calls.append(
            [
                (ids[is_attended].tolist(), positions[is_attended].tolist())
                for ids, positions, is_attended in zip(input_ids, position_ids, attended, strict=True)
            ]
        )


def train_on_rows_without_prompts(tmp_path, monkeypatch, model, tokenizer, rows, keep):
    """One step in which every prompt is dropped and every target masked; the rows in their order."""
    monkeypatch.setitem(TIMESTEP_SAMPLERS, "all", lambda seed, step, slots, num_slots: torch.ones(len(slots)).double())
    args = DiffusionConfig(
        output_dir=str(tmp_path),
        prompt_dropout=1.0,
        guidance_keep_tokens=keep,
        eos_policy="pad_to_block",
        block_length=CANVAS,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
    )
    args.timestep_sampling = "all"
    trainer = DiffusionTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    trainer.corrupt_batches([batch], step=0, epoch=0)
    assert batch["noisy"].masked.equal(batch["target_mask"])
    assert batch["target_mask"].sum(1).tolist() == [CANVAS] * len(rows)
    trainer.compute_loss(model, batch)


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("keeps_special_tokens", [False, True])
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_sampling_sees_what_training_showed(tmp_path, monkeypatch, family, rows, keeps_special_tokens, is_batched):
    tokenizer = tiny_tokenizer(family)
    model = (tiny_llada if family == "llada" else tiny_dream)()
    keep = tokenizer.all_special_tokens if keeps_special_tokens else None
    seen = Seen(model)
    train_on_rows_without_prompts(tmp_path, monkeypatch, model, tokenizer, rows, keep)
    trained = seen.calls.pop()
    prompts = [tokenize_prompt(tokenizer, row["prompt"]) for row in rows]
    generate(
        model,
        *pad_prompts(prompts, tokenizer.pad_token_id),
        max_new_tokens=CANVAS,
        block_length=None,
        steps=2,
        guidance_scale=1.0,
        guidance_batching=is_batched,
    )
    sampled = seen.calls[0][len(rows) :] if is_batched else seen.calls[1]
    assert sampled == trained
    for (tokens, _), prompt in zip(sampled, prompts, strict=True):
        assert tokens[len(prompt) :] == [MASK_ID] * CANVAS
        visible = [token for token in tokens if token != MASK_ID]
        assert visible == [token for token in prompt if keep and token in tokenizer.all_special_ids]
    assert any(token != MASK_ID for tokens, _ in sampled for token in tokens) == bool(keep and rows is CHATS)
    conditional = seen.calls[0][: len(rows)]
    assert [tokens[: len(prompt)] for (tokens, _), prompt in zip(conditional, prompts, strict=True)] == prompts
    assert [positions for _, positions in conditional] == [positions for _, positions in sampled]
