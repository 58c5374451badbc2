"""The formats: what is refused before tokenisation, and what the loss sees after TRL's own preparation."""

import logging

import pytest
from datasets import Dataset, disable_progress_bars

from dlm_tune.data import check_raw_rows, find_format
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import tiny_dream, tiny_llada, tiny_tokenizer

disable_progress_bars()

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}


def batch_of(rows, tmp_path, family="llada", **options):
    """Return the tokenizer and the training batch of `rows`, through the real trainer and TRL's preparation."""
    tokenizer = tiny_tokenizer(family)
    model = {"llada": tiny_llada, "Dream": tiny_dream}[family]()
    options = {"eos_policy": "one"} | options
    args = DiffusionConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, **options)
    dataset = check_raw_rows(Dataset.from_list(rows), "error", "train")
    trainer = DiffusionTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    return tokenizer, trainer.data_collator(list(trainer.train_dataset))


def seen(tokenizer, batch, row=0):
    """Return the text that is context and the text that the loss sees; what is not attended must be neither."""
    ids, is_target, attended = (batch[key][row] for key in ("input_ids", "target_mask", "attention_mask"))
    attended = attended.bool()
    assert not (is_target & ~attended).any()
    return tokenizer.decode(ids[attended & ~is_target]), tokenizer.decode(ids[is_target])


EOS, TURN = "<|endoftext|>", "<|eot_id|>"
HEADER = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
OPENING = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("row", "context", "targets"),
    [
        ({"text": "abc"}, "", "abc" + EOS),
        ({"text": "abc" + EOS}, "", "abc" + EOS),
        ({"prompt": "walk -> ", "completion": "walked"}, "walk -> ", "walked" + EOS),
        ({"prompt": "", "completion": "walked"}, "", "walked" + EOS),
        ({"prompt": [USER], "completion": [ASSISTANT]}, HEADER + OPENING, "yes" + TURN),
        ({"messages": [USER, ASSISTANT]}, HEADER + OPENING, "yes" + TURN),
        (
            {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}]},
            HEADER + OPENING,
            "yes" + TURN,
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            HEADER + OPENING,
            "yes" + TURN,
        ),
    ],
    ids=[
        "text",
        "text with eos",
        "strings",
        "empty prompt",
        "prompt messages",
        "messages",
        "conversations",
        "ShareGPT",
    ],
)
def test_the_loss_sees_the_answer_with_one_end(row, context, targets, tmp_path):
    tokenizer, batch = batch_of([row], tmp_path)
    assert seen(tokenizer, batch) == (context, targets)


def test_only_assistant_turns_are_targets(tmp_path):
    again = {"role": "user", "content": "sure?"}
    no = {"role": "assistant", "content": "no"}
    tokenizer, batch = batch_of(
        [{"messages": [USER, ASSISTANT, again, no]}, {"messages": [USER, ASSISTANT]}], tmp_path
    )
    assert seen(tokenizer, batch)[1] == f"yes{TURN}no{TURN}"
    assert seen(tokenizer, batch, 1)[1] == f"yes{TURN}"


def test_the_line_break_after_chatmls_end_of_turn_does_not_bring_a_second_end(tmp_path):
    tokenizer, batch = batch_of([{"prompt": [USER], "completion": [ASSISTANT]}], tmp_path, "Dream")
    context, targets = seen(tokenizer, batch)
    assert context.endswith("<|im_start|>assistant\n")
    assert targets == "yes<|im_end|>\n"


def test_with_shifted_logits_the_first_token_is_context(tmp_path):
    tokenizer, batch = batch_of([{"text": "abc"}], tmp_path, "Dream")
    assert seen(tokenizer, batch) == ("a", "bc" + EOS)


@pytest.mark.parametrize("marks", [{"labels": [-100, -100, 42, 43]}, {"completion_mask": [0, 0, 1, 1]}])
def test_tokenised_rows(marks, tmp_path):
    _, batch = batch_of([{"input_ids": [40, 41, 42, 43], **marks}], tmp_path)
    assert batch["input_ids"].tolist() == [[40, 41, 42, 43, 0]]
    assert batch["target_mask"].tolist() == [[False, False, True, True, True]]


@pytest.mark.parametrize(
    ("policy", "options", "filling"),
    [("one", {}, 0), ("pad_to_block", {"block_length": 8}, 1), ("pad_to_max", {}, 3), ("none", {}, 0)],
)
def test_eos_policies_through_the_trainer(policy, options, filling, tmp_path):
    rows = [{"prompt": "walk -> ", "completion": "walked"}, {"prompt": "sing -> ", "completion": "sung long"}]
    tokenizer, batch = batch_of(rows, tmp_path, eos_policy=policy, **options)
    assert seen(tokenizer, batch)[1] == "walked" + EOS * (1 + filling)
    assert int(batch["eos_padding_mask"][0].sum()) == filling


GOOD = {
    "text": {"text": "abc"},
    "pair": {"prompt": "a", "completion": "b"},
    "chat pair": {"prompt": [USER], "completion": [ASSISTANT]},
    "messages": {"messages": [USER, ASSISTANT]},
}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("text", {"text": None}, r"`text` is missing \(null\)"),
        ("text", {"text": " \n"}, "`text` is empty"),
        ("pair", {"prompt": "a", "completion": ""}, "`completion` is empty"),
        ("pair", {"prompt": "a", "completion": None}, r"`completion` is missing \(null\)"),
        ("pair", {"prompt": None, "completion": "b"}, r"`prompt` is missing \(null\)"),
        ("chat pair", {"prompt": [USER], "completion": [USER]}, r"`completion` has no assistant turn.*\['user'\]"),
        ("chat pair", {"prompt": [], "completion": [ASSISTANT]}, "`prompt` is an empty list"),
        ("messages", {"messages": []}, "`messages` is an empty list"),
        ("messages", {"messages": None}, r"`messages` is missing \(null\)"),
        ("messages", {"messages": [USER]}, "`messages` has no assistant turn with content"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "has no content: role 'assistant'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, "no assistant turn with content"),
        (
            "messages",
            {"messages": [{"role": "human", "content": "a"}, ASSISTANT]},
            "unknown role.*'human'. Write 'user'",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "asistant", "content": "a"}]},
            "'asistant'. Did you mean 'assistant'",
        ),
    ],
)
def test_bad_rows_are_named_before_tokenisation(kind, row, words):
    rows = Dataset.from_list([GOOD[kind], row, GOOD[kind]])
    with pytest.raises(ValueError, match=words) as caught:
        check_raw_rows(rows, "error", "train")
    assert "row 1: " in str(caught.value)
    assert "1 of 3 rows of the train data set cannot be used" in str(caught.value)
    assert "`invalid_rows: drop`" in str(caught.value)
    assert check_raw_rows(rows, "drop", "train").num_rows == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"prompt": ["a"], "completion": [42]}, "`completion` is not text: int 42"),
        ({"prompt": [3], "completion": ["b"]}, "`prompt` is not text: int 3"),
        ({"prompt": ["a"], "completion": [[ASSISTANT]]}, "of different kinds"),
        ({"conversations": [[{"from": "bot", "value": "a"}]]}, "unknown role in `messages`.*'bot'"),
        ({"conversations": [["hello"]]}, "a message of `messages` is not a mapping"),
        ({"messages": ["hello"]}, "`messages` is not a list of messages: str 'hello'"),
        ({"messages": [["hello"]]}, "a message of `messages` is not a mapping"),
        (
            {"input_ids": [[1, 2]], "completion_mask": [[1]]},
            r"`labels` \(or `completion_mask`\) and `input_ids` differ in length: 1 and 2",
        ),
    ],
)
def test_columns_of_the_wrong_kind(rows, words):
    with pytest.raises(ValueError, match=words):
        check_raw_rows(Dataset.from_dict(rows), "error", "eval")


def test_dropping_is_counted_in_the_log(caplog):
    rows = Dataset.from_list([GOOD["pair"], {"prompt": "a", "completion": ""}])
    with caplog.at_level(logging.WARNING, logger="dlm_tune"):
        check_raw_rows(rows, "drop", "train")
    assert "Left out 1 of 2 rows of the train data set: 1 x `completion` is empty" in caplog.text


def test_good_rows_pass_unchanged():
    for row in GOOD.values():
        rows = Dataset.from_list([row, row])
        assert check_raw_rows(rows, "error", "train").to_list() == rows.to_list()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "url"], ["text"]),
        (["completion", "prompt", "id"], ["prompt", "completion"]),
        (["prompt", "messages"], ["messages"]),
        (["text", "input_ids", "labels"], ["input_ids", "labels"]),
        (["conversations"], ["conversations"]),
    ],
)
def test_find_format(columns, expected):
    assert find_format(columns) == expected


def test_find_format_with_a_text_column_of_another_name():
    assert find_format(["content"], text_field="content") == ["content"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["question", "answer"], r"\['answer', 'question'\], which is none of the formats input_ids \| prompt"),
        (["prompts", "completion"], "Column 'prompts': Did you mean 'prompt'"),
        (["prompt", "response"], "Column 'completion' is missing"),
        (["messages", "text"], "the columns of several formats: messages, text"),
    ],
)
def test_columns_of_no_format(columns, words):
    with pytest.raises(ValueError, match=words):
        find_format(columns)
