"""Generated answers against references: figures by hand, order of rows, batches, and bad rows."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from dlm_tune.evaluation.completions import edit_error_rate, evaluate_completions
from dlm_tune.generation import DiffusionGenerationConfig
from tests.tiny_models import MASK_ID, tiny_llada, tiny_tokenizer

CONFIG = DiffusionGenerationConfig(max_new_tokens=8, block_length=None, steps=8)


class Repeater(nn.Module):
    """Answers with the last letters of the prompt before the colon, in capitals, then EOS: `abc:` -> ` ABC`."""

    def __init__(self, tokenizer, end_token="<|endoftext|>"):
        super().__init__()
        self.tokenizer, self.end = tokenizer, tokenizer.convert_tokens_to_ids(end_token)
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(mask_token_id=MASK_ID, pad_token_id=0)

    def get_output_embeddings(self):
        return nn.Linear(2, 128)

    def forward(self, input_ids, attention_mask, position_mask):
        logits = torch.zeros(*input_ids.shape, 128)
        start = input_ids.shape[1] - CONFIG.max_new_tokens
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids[:start], skip_special_tokens=True)
            answer = self.tokenizer(" " + text.split(":")[0].split()[-1].upper())["input_ids"] + [self.end] * 8
            for place in range(CONFIG.max_new_tokens):
                logits[row, start + place, answer[place]] = 9 - place
        return SimpleNamespace(logits=logits[position_mask])


ROWS = [
    {"prompt": "ab:", "completion": " AB"},
    {"prompt": "a longer prompt abcd:", "completion": "ABxD\n"},
    {"prompt": "abc:", "completion": " ABC<|endoftext|>"},
    {"prompt": "x:", "completion": "Y"},
]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_figures_by_hand(batch_size):
    report = evaluate_completions(
        Repeater(tiny_tokenizer()), tiny_tokenizer(), Dataset.from_list(ROWS), CONFIG, batch_size, show_progress=False
    )
    assert report.samples == [
        ("ab:", "AB", "AB"),
        ("a longer prompt abcd:", "ABxD", "ABCD"),
        ("abc:", "ABC", "ABC"),
        ("x:", "Y", "X"),
    ]
    assert (report.exact_match, report.num_rows) == (0.5, 4)
    assert report.exact_match_standard_error == pytest.approx(torch.tensor([1.0, 0, 1, 0]).std().item() / 2)
    assert report.error_rate == pytest.approx(2 / 10)
    assert "samples" not in repr(report)


def test_conversations_end_at_the_end_of_turn():
    tokenizer = tiny_tokenizer()
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "abc:"}],
            "completion": [{"role": "assistant", "content": "user"}],
        }
    ]

    class LastHeader(Repeater):
        def forward(self, input_ids, attention_mask, position_mask):
            text = self.tokenizer.decode(input_ids[0], skip_special_tokens=False)
            assert "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n" in text
            return super().forward(input_ids, attention_mask, position_mask)

    report = evaluate_completions(LastHeader(tokenizer, "<|eot_id|>"), tokenizer, rows, CONFIG, show_progress=False)
    assert report.samples == [("abc:", "user", "ABC")]
    assert math.isnan(report.exact_match_standard_error)


def test_figures_do_not_depend_on_the_batch_size():
    tokenizer, model = tiny_tokenizer(), tiny_llada(seed=1).double()
    rows = [{"prompt": f"{'word ' * (i % 3)}{i}:", "completion": "x"} for i in range(9)]
    config = DiffusionGenerationConfig(max_new_tokens=6, block_length=3, steps=6, temperature=1.0)
    reports = [evaluate_completions(model, tokenizer, rows, config, size, show_progress=False) for size in (1, 4, 9)]
    assert reports[0].samples == reports[1].samples == reports[2].samples
    assert len({generated for _, _, generated in reports[0].samples}) > 4


def test_many_short_rows_take_seconds():
    tokenizer, model = tiny_tokenizer(), tiny_llada()
    rows = [{"prompt": f"past of word{i}:", "completion": f"word{i}ed"} for i in range(256)]
    config = DiffusionGenerationConfig(max_new_tokens=16, block_length=None, steps=16)
    start = time.perf_counter()
    report = evaluate_completions(model, tokenizer, rows, config, batch_size=256, show_progress=False)
    assert time.perf_counter() - start < 20
    assert report.num_forward_passes <= 16


@pytest.mark.parametrize(
    ("generated", "reference", "unit", "expected"),
    [
        (["kitten"], ["sitting"], "character", 3 / 7),
        (["K AH T", ""], ["K AE T S", "AA"], "word", 3 / 5),
        (["abcdef"], ["a"], "character", 5.0),
        ([""], ["ab"], "character", 1.0),
    ],
)
def test_edit_error_rate(generated, reference, unit, expected):
    assert edit_error_rate(generated, reference, unit) == pytest.approx(expected)


def test_edit_error_rate_of_empty_references_is_not_a_number():
    assert math.isnan(edit_error_rate(["x"], [""]))


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "no rows"),
        ([ROWS[0], {"prompt": "a:"}], {}, "row 1: completion=None"),
        ([{"text": "a"}], {}, "row 0: prompt=None"),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], {}, "row 0.*both be strings"),
        (ROWS, {"batch_size": 0}, "batch_size=0"),
        (ROWS, {"error_unit": "phoneme"}, "error_unit='phoneme'.*'word'"),
    ],
)
def test_bad_input(rows, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate_completions(tiny_llada(), tiny_tokenizer(), rows, CONFIG, **options)


def test_guidance_needs_a_prompt_in_some_row():
    config = DiffusionGenerationConfig(max_new_tokens=8, block_length=None, steps=2, guidance_scale=1.0)
    rows = [{"prompt": "", "completion": "x"}] * 2
    with pytest.raises(ValueError, match=r"guidance_scale=1\.0 cannot guide"):
        evaluate_completions(tiny_llada(), tiny_tokenizer(), rows, config)
    rows = [*rows, {"prompt": "a:", "completion": "x"}]
    report = evaluate_completions(tiny_llada(), tiny_tokenizer(), rows, config, batch_size=1, show_progress=False)
    assert report.num_row_passes > report.num_forward_passes
