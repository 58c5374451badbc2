"""The data set formats and the checks on rows that are not tokenised yet.

The formats are TRL's (https://huggingface.co/docs/trl/dataset_formats): `text` | `prompt` + `completion` (strings or
message lists) | `messages` | `conversations` | `input_ids` (with `labels` or `completion_mask`).
"""

from collections.abc import Callable
from typing import Any, Literal

from datasets import Dataset

from dlm_tune.data.arguments import INVALID_ROWS, check_choice, did_you_mean
from dlm_tune.data.row_report import RowReport

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of the roles in `conversations`
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# columns that TRL reads beside those of the format
COMPANION_COLUMNS = ("tools", "chat_template_kwargs")
_BATCH_SIZE = 1000

Row = dict[str, Any]


def find_format(column_names: list[str], *, text_field: str = "text", source: str = "the data set") -> list[str]:
    """Return the columns of the one format that `column_names` has, e.g. `["prompt", "completion"]`.

    Args:
        column_names: The columns of the data set.
        text_field: The column of plain text (`dataset_text_field` of the recipe).
        source: What to call the data set in an error.

    Raises:
        ValueError: If the columns make no format or more than one.
    """
    formats = [["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"], [text_field]]
    found = [columns for columns in formats if set(columns) <= set(column_names)]
    if ["input_ids"] in found:
        return [name for name in ("input_ids", "labels", "completion_mask") if name in column_names]
    if len(found) == 1:
        return found[0]
    listing = " | ".join(" + ".join(columns) for columns in formats)
    if found:
        raise ValueError(
            f"{source} has the columns of several formats: {', '.join(' + '.join(columns) for columns in found)}. "
            "Name those to use: `datasets: [{path: ..., columns: [...]}]`."
        )
    wanted = sorted({name for columns in formats for name in columns} - set(column_names))
    nearest = [(name, did_you_mean(name, wanted)) for name in column_names]
    hints = "".join(f" Column {name!r}:{hint}" for name, hint in nearest if hint)
    if {"chosen", "rejected"} <= set(column_names):
        hints += " `chosen` and `rejected` are for preference training, not for this command."
    if len({"prompt", "completion"} & set(column_names)) == 1:
        missing = ({"prompt", "completion"} - set(column_names)).pop()
        hints += f" Column {missing!r} is missing."
    raise ValueError(
        f"{source} has the columns {sorted(column_names)}, which is none of the formats {listing}.{hints} Rename the "
        "columns, or set `dataset_text_field` for plain text."
    )


def select_format(dataset: Dataset, *, text_field: str = "text", source: str = "the data set") -> Dataset:
    """Return `dataset` in a form that TRL prepares as meant.

    Columns outside the format are left out: a lone `prompt` beside `messages` would be taken for another format.
    `conversations` become `messages`, with ShareGPT's roles (human, gpt) renamed. A `completion_mask` becomes
    `labels`, because TRL reads the mask of tokenised rows only if `completion_only_loss` is set.

    Raises:
        ValueError: As `find_format`.
    """
    columns = find_format(dataset.column_names, text_field=text_field, source=source)
    companions = [name for name in COMPANION_COLUMNS if name in dataset.column_names]
    if columns == ["conversations"]:
        dataset = dataset.select_columns(columns + companions)
        return dataset.map(_to_messages, batched=True, remove_columns=columns, desc="Reading conversations")
    if "completion_mask" in columns:
        columns = ["input_ids", "labels"]
        if "labels" not in dataset.column_names:
            dataset = dataset.map(_to_labels, batched=True, desc="Reading completion masks")
    if dataset.column_names == columns + companions:
        return dataset
    return dataset.select_columns(columns + companions)


def _to_messages(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return `messages` for `conversations`; what is no message stays as it is, for `check_raw_rows` to report."""

    def convert(message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        role = message.get("from", message.get("role"))
        content = message.get("value", message.get("content"))
        return {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": content}

    return {"messages": [rows and [convert(message) for message in rows] for rows in batch["conversations"]]}


def _to_labels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    labels = []
    for row_tokens, row_mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        tokens, mask = row_tokens or [], row_mask or []
        # a mask of another length leaves labels of that length, which `check_raw_rows` reports
        labels.append([token if chosen else -100 for token, chosen in zip(tokens, mask, strict=False)])
        labels[-1] += [-100] * (len(mask) - len(tokens))
    return {"labels": labels}


def check_raw_rows(
    dataset: Dataset, invalid_rows: Literal["error", "drop"], name: str, *, text_field: str = "text"
) -> Dataset:
    """Return `dataset` with the columns of its format and without rows that cannot be tokenised into a target.

    Args:
        dataset: Rows in one of the formats above, not tokenised (tokenised ones only have their lengths compared).
        invalid_rows: Whether a bad row is an error or is left out (and counted in the log).
        name: What to call the data set in messages, `train` or `eval`.
        text_field: The column of plain text.

    Raises:
        ValueError: If the columns are no known format, if a row is bad and `invalid_rows` is `error`, or if no row
            is left.
    """
    dataset = select_format(dataset, text_field=text_field, source=f"the {name} data set")
    columns = [column for column in dataset.column_names if column not in COMPANION_COLUMNS]
    find_fault = _fault_finder(columns)
    check_choice("invalid_rows", invalid_rows, INVALID_ROWS)
    report = RowReport(name, len(dataset))
    if find_fault is not None:
        position = 0
        for batch in dataset.select_columns(columns).iter(batch_size=_BATCH_SIZE):
            for values in zip(*(batch[column] for column in columns), strict=True):
                fault = find_fault(dict(zip(columns, values, strict=True)))
                if fault is not None:
                    report.add([position], fault[0], [fault[1]], policy=invalid_rows)
                position += 1
    return report.finish(dataset)


def _fault_finder(columns: list[str]) -> Callable[[Row], tuple[str, str] | None] | None:
    """Return the function that tells what is wrong with a row: a reason and the row's own detail."""
    if columns[0] == "input_ids":
        return _tokenised_fault if len(columns) > 1 else None
    if columns[0] == "prompt":
        return _pair_fault
    if columns[0] == "messages":
        return lambda row: _messages_fault("messages", row["messages"], needs_assistant=True)
    return lambda row: _text_fault(columns[0], row[columns[0]])


def _text_fault(column: str, value: Any, *, may_be_empty: bool = False) -> tuple[str, str] | None:
    if value is None:
        return f"`{column}` is missing (null)", ""
    if not isinstance(value, str):
        return f"`{column}` is not text", f"{type(value).__name__} {value!r}"
    if not value.strip() and not may_be_empty:
        return f"`{column}` is empty", repr(value)
    return None


def _pair_fault(row: Row) -> tuple[str, str] | None:
    prompt, completion = row["prompt"], row["completion"]
    if prompt is None or completion is None:
        return f"`{'prompt' if prompt is None else 'completion'}` is missing (null)", ""
    if isinstance(prompt, list) != isinstance(completion, list):
        return "`prompt` and `completion` are of different kinds (both text or both message lists)", ""
    if isinstance(prompt, list):
        fault = _messages_fault("prompt", prompt, needs_assistant=False)
        return fault or _messages_fault("completion", completion, needs_assistant=True)
    # an empty prompt is a legitimate unconditional row
    return _text_fault("prompt", prompt, may_be_empty=True) or _text_fault("completion", completion)


def _messages_fault(column: str, messages: Any, *, needs_assistant: bool) -> tuple[str, str] | None:
    if messages is None:
        return f"`{column}` is missing (null)", ""
    if not isinstance(messages, list):
        return f"`{column}` is not a list of messages", f"{type(messages).__name__} {messages!r}"
    if not messages:
        return f"`{column}` is an empty list", ""
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            return f"a message of `{column}` is not a mapping with role and content", repr(message)
        role = str(message.get("role"))
        if role not in ROLES:
            hint = f" Write {SHAREGPT_ROLES[role]!r}." if role in SHAREGPT_ROLES else did_you_mean(role, ROLES)
            return f"unknown role in `{column}` (the roles are {', '.join(ROLES)})", f"{role!r}.{hint}"
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            return f"a message of `{column}` has no content", f"role {role!r}"
        if content is not None and not isinstance(content, str):
            return f"the content of a message of `{column}` is not text", f"{type(content).__name__} {content!r}"
        turns.append((role, bool((content or "").strip() or message.get("tool_calls"))))
    if needs_assistant and ("assistant", True) not in turns:
        return f"`{column}` has no assistant turn with content", f"roles {[role for role, _ in turns]}"
    return None


def _tokenised_fault(row: Row) -> tuple[str, str] | None:
    num_labels, num_tokens = len(row["labels"] or ()), len(row["input_ids"] or ())
    if num_labels != num_tokens:
        return "`labels` (or `completion_mask`) and `input_ids` differ in length", f"{num_labels} and {num_tokens}"
    return None
