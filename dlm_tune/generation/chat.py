"""A terminal chat that shows the answer while its masks are being filled."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dlm_tune.generation.config import DiffusionGenerationConfig, unknown_name
from dlm_tune.generation.prompts import Prompt, config_for_tokenizer, decode_completion, pad_prompts, tokenize_prompt
from dlm_tune.generation.sampler import generate

MASK_SYMBOL = "░"

_HELP = """/set NAME VALUE  change an option of generation, e.g. /set steps 64
/set             show all options
/reset           forget the conversation
/quit            leave (also Ctrl-D); Ctrl-C stops an answer"""


def run_chat(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: DiffusionGenerationConfig | None = None,
    console: Console | None = None,
    input_fn: Callable[[str], str] = input,
) -> None:
    """Chat in the terminal until `/quit` or the end of the input.

    With a chat template the whole conversation is the prompt; without one (base models) each line is completed by
    itself. On a terminal the canvas is shown after every step; elsewhere only the finished answer is printed.

    Args:
        model: a model of `dlm_tune.load_model`, or a `PeftModel` of one.
        tokenizer: its tokenizer.
        generation_config: options to start with; the defaults if None.
        console: where to print; standard output if None.
        input_fn: called with the prompt string, returns a line; `EOFError` ends the chat.
    """
    chat = _Chat(model, tokenizer, generation_config or DiffusionGenerationConfig(), console or Console())
    mode = "Conversation" if tokenizer.chat_template else "The tokenizer has no chat template: plain completion"
    chat.say(f"{mode}. /help lists the commands.", style="dim")
    while True:
        try:
            line = input_fn("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            chat.run_command(line)
        elif line:
            chat.answer(line)


class _Chat:
    """The conversation so far, and the options as changed by `/set`."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, config: DiffusionGenerationConfig, console: Console
    ):
        self.model, self.tokenizer, self.config, self.console = model, tokenizer, config, console
        self.messages: list[dict[str, str]] = []
        self.num_answers = 0

    def say(self, text: str, style: str = "") -> None:
        """Print text as it is: brackets in a model's answer are no markup."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def run_command(self, line: str) -> None:
        """`/help`, `/reset` and `/set`; a mistake is reported and changes nothing."""
        command, *arguments = line.split(maxsplit=2)
        if command == "/help":
            self.say(_HELP)
        elif command == "/reset":
            self.messages = []
            self.say("The conversation is forgotten.", style="dim")
        elif command == "/set" and len(arguments) == 2:
            self._set_option(*arguments)
        elif command == "/set" and not arguments:
            for name, value in dataclasses.asdict(self.config).items():
                self.say(f"{name} {value}")
        elif command == "/set":
            self.say(f"/set {arguments[0]} needs a value, e.g. /set steps 64.", style="red")
        else:
            self.say(unknown_name("command", command, ("/help", "/quit", "/reset", "/set")), style="red")

    def _set_option(self, name: str, value: str) -> None:
        names = [field.name for field in dataclasses.fields(self.config)]
        if name not in names:
            self.say(unknown_name("option", name, names), style="red")
            return
        try:
            self.config = dataclasses.replace(self.config, **{name: yaml.safe_load(value)})
        except (ValueError, yaml.YAMLError) as error:
            self.say(str(error), style="red")
        else:
            self.say(f"{name} = {getattr(self.config, name)}", style="dim")

    def answer(self, line: str) -> None:
        """Generate the answer to `line`, print it, and add both to the conversation."""
        messages = [*self.messages, {"role": "user", "content": line}]
        prompt: Prompt = messages if self.tokenizer.chat_template else line
        try:
            text, cost = self._generate(prompt)
        except ValueError as error:
            self.say(f"{error}\n/reset forgets the conversation, /set changes an option.", style="red")
            return
        except KeyboardInterrupt:
            self.say("Stopped; the question is forgotten.", style="dim")
            return
        self.say(text)
        self.say(cost, style="dim")
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def _generate(self, prompt: Prompt) -> tuple[str, str]:
        """The answer, and what it cost."""
        device = next(self.model.parameters()).device
        token_ids = tokenize_prompt(self.tokenizer, prompt)
        input_ids, attention_mask = pad_prompts([token_ids], self.tokenizer.pad_token_id, device)
        config = config_for_tokenizer(self.config, self.tokenizer, self.model)
        live = Live(console=self.console, transient=True, auto_refresh=False) if self.console.is_terminal else None

        def show(step: int, block: int, sequences: Tensor) -> None:
            if live is not None:
                live.update(self._render(sequences[0, len(token_ids) :].tolist()), refresh=True)

        # A key of its own for each answer: asking again at temperature > 0 gives another sample.
        row_keys = torch.tensor([self.num_answers])
        self.num_answers += 1
        with live or nullcontext():
            output = generate(self.model, input_ids, attention_mask, config, row_keys=row_keys, on_step=show)
        new_tokens = output.sequences[0, len(token_ids) :].tolist()
        text = decode_completion(self.tokenizer, new_tokens, config.eos_token_ids or [])
        cost = f"{output.num_forward_passes} forward passes"
        if output.num_row_passes > output.num_forward_passes:
            cost += f" of {output.num_row_passes} rows"
        return text.strip(), cost

    def _render(self, token_ids: list[int]) -> Text:
        """The canvas as text, with a dim symbol for each mask; runs of tokens are decoded together."""
        rendered, run = Text(), []
        for token_id in [*token_ids, None]:
            if token_id is not None and token_id != self.model.config.mask_token_id:
                run.append(token_id)
                continue
            if run:
                rendered.append(self.tokenizer.decode(run, skip_special_tokens=True))
                run = []
            if token_id is not None:
                rendered.append(MASK_SYMBOL, style="dim")
        return rendered
