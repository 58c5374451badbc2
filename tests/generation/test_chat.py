"""The chat with scripted input: conversation, commands, mistakes, and the live canvas."""

import io

import pytest
from rich.console import Console

from dlm_tune.generation import (
    DiffusionGenerationConfig,
    config_for_tokenizer,
    decode_completion,
    generate,
    pad_prompts,
    tokenize_prompt,
)
from dlm_tune.generation.chat import MASK_SYMBOL, run_chat
from tests.tiny_models import tiny_llada, tiny_tokenizer

CONFIG = DiffusionGenerationConfig(max_new_tokens=6, block_length=3, steps=6, stop_at_eos=False)


def chat(lines, tokenizer=None, terminal=False, config=CONFIG, model=None):
    """Run a chat on scripted lines (an exception in the list is raised) and return what it printed."""
    script = iter(lines)

    def read(prompt):
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None)
    run_chat(model or tiny_llada(), tokenizer or tiny_tokenizer(), config, console=console, input_fn=read)
    return output.getvalue()


def expected_answer(prompt, tokenizer=None, **options):
    tokenizer, model = tokenizer or tiny_tokenizer(), tiny_llada()
    ids = tokenize_prompt(tokenizer, prompt)
    config = config_for_tokenizer(CONFIG, tokenizer, model)
    output = generate(model, *pad_prompts([ids], 0), config, **options)
    return decode_completion(tokenizer, output.sequences[0, len(ids) :].tolist(), config.eos_token_ids).strip()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_the_conversation_is_the_prompt_until_reset():
    first = expected_answer([user("hello")])
    second = expected_answer([user("hello"), assistant(first), user("more")])
    alone = expected_answer([user("more")])
    assert len({first, second, alone}) == 3
    lines = chat(["hello", "", "more", "/reset", "more", "/quit", "never read"]).splitlines()
    answers = [line.rstrip() for line in lines[1:] if "forward passes" not in line and "forgotten" not in line]
    assert answers == [text.rstrip() for text in (first, second, alone)]
    assert lines.count("6 forward passes") == 3


def test_without_a_chat_template_lines_are_completed_by_themselves():
    tokenizer = tiny_tokenizer(chat_template=False)
    printed = chat(["hello", "hello"], tokenizer)
    assert "no chat template" in printed
    assert printed.count(expected_answer("hello", tokenizer)) == 2


def test_set_changes_the_options():
    printed = chat(["/set steps 2", "hello", "/set block_length null", "/set steps 1", "again", "/set"])
    assert "2 forward passes" in printed
    assert "1 forward passes" in printed
    assert "block_length None" in printed
    assert "steps 1" in printed


def test_guidance_is_set_option_by_option():
    """Each order that leads somewhere; what does not fit together is said at the answer."""
    printed = chat(
        [
            "/set guidance_scale 3",
            "hello",
            "/reset",
            "/set guidance_schedule interval",
            "hello",
            "/set guidance_interval [0.0, 0.5]",
            "hello",
        ]
    )
    assert expected_answer([user("hello")], guidance_scale=3.0) in printed
    assert "6 forward passes of 12 rows" in printed
    assert "guidance_schedule='interval' needs guidance_interval" in printed
    options = {"guidance_scale": 3.0, "guidance_schedule": "interval", "guidance_interval": [0.0, 0.5]}
    assert expected_answer([user("hello")], **options) in printed
    assert "6 forward passes of 9 rows" in printed
    assert "guidance_interval = [0.0, 0.5]" in printed


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/set step 3", ["unknown option 'step'", "Did you mean 'steps'?"]),
        ("/set steps 1", ["steps=1 is fewer than the 2 blocks"]),
        ("/set steps [", ["expected"]),
        ("/set steps", ["/set steps needs a value"]),
        ("/rest", ["unknown command '/rest'", "Did you mean '/reset'?"]),
    ],
)
def test_mistakes_are_reported_and_change_nothing(command, words):
    printed = chat([command, "hello"])
    for word in words:
        assert word in printed
    assert "6 forward passes" in printed


def test_a_conversation_that_is_too_long_says_how_to_go_on():
    printed = chat(["x" * 300, "hello"])
    assert "the model has 256" in printed
    assert "/reset" in printed
    assert expected_answer([user("hello")]) in printed, "the line that failed is not part of the conversation"


def test_interrupts_leave_the_answer_or_the_chat():
    class Interrupting(type(tiny_llada())):
        def forward(self, *args, **kwargs):
            raise KeyboardInterrupt

    printed = chat(["hello", "/set", KeyboardInterrupt()], model=Interrupting(tiny_llada().config))
    assert "Stopped" in printed
    assert "steps 6" in printed


def test_the_terminal_shows_masks_and_pipes_do_not():
    assert MASK_SYMBOL not in chat(["hello"])
    shown = chat(["hello"], terminal=True)
    pictures = [line.count(MASK_SYMBOL) for line in shown.split("\r")]
    assert [count for count in pictures if count] == [5, 4, 3, 2, 1], "one picture a step, one token more in each"
    assert expected_answer([user("hello")]) in shown


def test_answers_are_printed_as_they_are():
    """A model may write what rich would read as markup."""
    tokenizer = tiny_tokenizer()
    brackets = tokenizer("[red]")["input_ids"]
    keep = DiffusionGenerationConfig(
        max_new_tokens=5, block_length=1, steps=5, suppress_tokens=sorted(set(range(128)) - set(brackets))
    )
    printed = chat(["hello"] * 4, tokenizer, config=keep)
    assert sum(line.strip("[red]") == "" and line != "" for line in printed.splitlines()) == 4


def test_asking_again_gives_another_sample():
    config = DiffusionGenerationConfig(max_new_tokens=6, block_length=3, steps=6, temperature=1.0)
    lines = chat(["hello", "/reset", "hello"], config=config).splitlines()
    assert lines[1] != lines[4]
