"""What `DiffusionTrainer` refuses before it starts."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from dlm_tune.data import PackedRows
from dlm_tune.data.rows import IGNORED_LABEL
from dlm_tune.models import DiffusionMixin, check_packed_attention
from dlm_tune.models.annealing import check_annealed_attention
from dlm_tune.trainers.diffusion_config import DEFAULT_BLOCK_LENGTH, DiffusionConfig


def check_arguments(
    args: Any, train_dataset: Any, eval_dataset: Any, unpaired_dataset: Any, kwargs: dict[str, Any]
) -> None:
    """Refuse arguments of the trainer that it could not honour."""
    if not isinstance(args, DiffusionConfig):
        raise TypeError(f"args is a {type(args).__name__}: pass a dlm_tune.DiffusionConfig.")
    parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    others = [("unpaired", unpaired_dataset), *(("eval", part) for part in parts)]
    for name, dataset in [("train", train_dataset), *((name, part) for name, part in others if part is not None)]:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"{name}_dataset is a {type(dataset).__name__}; noise is keyed by the row's index, so a "
                "map-style `datasets.Dataset` is needed. Load it without streaming."
            )
    _check_unpaired(args, unpaired_dataset)
    if kwargs.get("compute_metrics") or kwargs.get("compute_loss_func"):
        raise ValueError(
            "compute_metrics and compute_loss_func would have no effect: evaluation reports likelihood bounds and "
            "the loss is theirs too. Subclass DiffusionTrainer and override compute_loss instead."
        )
    if kwargs.get("data_collator") and (args.packing or args.eval_packing):
        raise ValueError("data_collator cannot be given with packing: its layout is made by DiffusionCollator.")
    if kwargs.get("formatting_func"):
        raise ValueError(
            "formatting_func would be ignored on some data sets (TRL keeps `messages`). Map the rows before: "
            "train_dataset = train_dataset.map(lambda row: {'text': ...}, remove_columns=...)."
        )


def check_model(model: Any, args: DiffusionConfig) -> None:
    """Refuse a model that cannot be trained here, or not with these arguments."""
    if not isinstance(model, DiffusionMixin):
        raise TypeError(
            f"model is a {type(model).__name__}, which cannot score masked positions. Load it with "
            "dlm_tune.load_model(path), which also turns Llama- and Qwen-style decoders into diffusion models."
        )
    if args.packing or args.eval_packing:
        check_packed_attention(model)
    if args.attention_annealing_steps:
        check_annealed_attention(model)


def _check_unpaired(args: DiffusionConfig, unpaired_dataset: Any) -> None:
    if unpaired_dataset is None:
        if args.unpaired_fraction is not None:
            raise ValueError(
                f"unpaired_fraction={args.unpaired_fraction} has no effect without an unpaired_dataset. Give one, or "
                "remove it."
            )
        return
    if args.packing:
        raise ValueError(
            "packing=True does not go with an unpaired_dataset, whose share is kept in rows: sequences hold different "
            "numbers of them. Set packing=False."
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy='{args.train_sampling_strategy}' does not go with an unpaired_dataset, "
            "whose rows have their places in the stream. Remove it."
        )


def read_first_row(
    row: dict[str, Any], args: DiffusionConfig, tokenizer: PreTrainedTokenizerBase, *, has_unpaired: bool = False
) -> None:
    """Decides `assistant_only_loss` and `eos_policy` by the data, and refuses what does not fit them."""
    if is_conversational(row) and not tokenizer.chat_template and not args.chat_template_path:
        raise ValueError(
            "the rows are conversations, but the tokenizer has no chat template. Load it with "
            "dlm_tune.load_tokenizer, or set chat_template_path (a .jinja file)."
        )
    if args.random_length_probability and ("prompt" in row or is_conversational(row)):
        raise ValueError(
            f"random_length_probability={args.random_length_probability} has no effect on prompts with answers: "
            "it shortens rows of plain text only. Remove it."
        )
    if args.assistant_only_loss is None:
        args.assistant_only_loss = is_conversational(row) and "prompt" not in row
    check_prompts(row, args, has_unpaired=has_unpaired)
    if args.eos_policy is None:
        _choose_eos_policy(row, args)


def check_prompts(row: dict[str, Any], args: DiffusionConfig, *, has_unpaired: bool = False) -> None:
    """Refuse what is done with prompts where every token is a target, by the first training row."""
    is_chat = is_conversational(row)
    is_answer_only = "prompt" in row and args.completion_only_loss is not False
    if is_answer_only or (is_chat and args.assistant_only_loss is not False) or _has_context(row):
        return
    names = ("prompt_dropout", "prompt_noising", "unpaired_fraction", "guidance_distillation_scale")
    found = [f"{name}={getattr(args, name)}" for name in names if getattr(args, name)]
    if has_unpaired and "labels" not in row:  # of tokenised rows the first need not tell
        found.append("unpaired_dataset")
    if not found:
        return
    if "prompt" in row or is_chat:
        setting = "completion_only_loss" if "prompt" in row else "assistant_only_loss"
        raise ValueError(
            f"{found[0]} has no effect where prompts are targets themselves, and so never hidden. Remove it, or "
            f"{setting}=False."
        )
    raise ValueError(
        f"{found[0]} has no effect on plain text, which has no prompts. Remove it: pretraining on text trains the "
        "unconditional branch as it is."
    )


def _choose_eos_policy(row: dict[str, Any], args: DiffusionConfig) -> None:
    """Fill answers up to a block: with one EOS only, the number of masks would tell the model the answer's length."""
    if "prompt" in row or is_conversational(row) or _has_context(row):
        args.eos_policy, args.block_length = "pad_to_block", args.block_length or DEFAULT_BLOCK_LENGTH
    elif args.block_length is not None:
        raise ValueError(
            f"block_length={args.block_length} has no effect on plain text, whose rows end with one EOS. Remove it, "
            "or set eos_policy='pad_to_block'."
        )
    else:
        args.eos_policy = "one"


def _has_context(row: dict[str, Any]) -> bool:
    """Whether a tokenised row has tokens that are no targets."""
    return IGNORED_LABEL in row["labels"][1:] if "labels" in row else "completion_mask" in row


def is_prepared(dataset: Any) -> bool:
    """Whether the rows come from a trainer: tokenised, checked and numbered."""
    return isinstance(dataset, PackedRows) or {"input_ids", "labels", "row_index"} <= set(dataset.column_names)


def check_row_index(dataset: Any, name: str) -> None:
    """Refuse prepared rows that share an index."""
    rows = dataset.rows if isinstance(dataset, PackedRows) else dataset
    if len(rows.unique("row_index")) < len(rows):
        raise ValueError(
            f"the prepared {name} rows repeat a row_index, which keys a row's noise and what an evaluation "
            "counts. Number them anew: remove_columns('row_index').add_column('row_index', range(len(dataset)))."
        )
