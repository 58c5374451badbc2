"""Unpaired text beside the training rows, and what the unconditional branch of guidance sees."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dlm_tune.data import UnpairedMixture, answers_without_prompts, check_rows
from dlm_tune.trainers.diffusion_config import DEFAULT_UNPAIRED_FRACTION, DiffusionConfig


def mix_unpaired(trainer: Any, unpaired_dataset: Dataset, is_chat: bool) -> UnpairedMixture:
    """Return the trainer's prepared rows mixed with text, which is tokenised as their answers are.

    Args:
        trainer: a `DiffusionTrainer` with its training rows prepared.
        unpaired_dataset: rows of text.
        is_chat: whether the training rows are conversations, so that text is an assistant's turn.
    """
    args: DiffusionConfig = trainer.args
    first_target_position = 1 if trainer.logits_shift else 0
    with args.main_process_first(desc="preparing the unpaired rows"):
        rows = _as_answers(unpaired_dataset, args.dataset_text_field, is_chat)
    tokenised = trainer.tokenize_answers(rows, "unpaired")  # TRL lets the main process go first by itself
    with args.main_process_first(desc="checking the tokenised unpaired rows"):
        rows = check_rows(
            answers_without_prompts(tokenised),
            mask_token_id=trainer.mask_token_id,
            # behind a prompt of one token at least where nothing predicts the first token of a row
            max_length=None if args.max_length is None else args.max_length - first_target_position,
            invalid_rows=args.invalid_rows,
            overlong_rows=args.overlong_rows,
            name="unpaired",
            vocab_size=trainer.vocab_size,
        )
    return UnpairedMixture(
        trainer.train_dataset,
        rows,
        fraction=DEFAULT_UNPAIRED_FRACTION if args.unpaired_fraction is None else args.unpaired_fraction,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy != "sequential",
        max_length=args.max_length,
    )


def _as_answers(rows: Dataset, text_field: str, is_chat: bool) -> Dataset:
    """Rows of text as answers to an empty prompt; tokenised rows stay as they are."""
    if "input_ids" in rows.column_names:
        return rows

    def answer(row: dict[str, str]) -> dict[str, Any]:
        if is_chat:
            prompt = [{"role": "user", "content": ""}]
            return {"prompt": prompt, "completion": [{"role": "assistant", "content": row[text_field]}]}
        return {"prompt": "", "completion": row[text_field]}

    return rows.map(answer, remove_columns=rows.column_names)


def set_guidance_keep_tokens(
    config: PreTrainedConfig, args: DiffusionConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write `guidance_keep_tokens` to the model's config as ids; without the argument the config stays as it is.

    Raises:
        ValueError: a token that is not in the vocabulary.
    """
    if args.guidance_keep_tokens is None:
        return
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in args.guidance_keep_tokens if token not in vocabulary]
    if unknown:
        raise ValueError(
            f"guidance_keep_tokens={args.guidance_keep_tokens} names {unknown}, which the tokenizer does not have. "
            f"Write tokens as in its vocabulary, for example {tokenizer.all_special_tokens[:3]}."
        )
    config.guidance_keep_token_ids = sorted({vocabulary[token] for token in args.guidance_keep_tokens})
