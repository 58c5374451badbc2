"""`dlm-tune generate`: complete prompts."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dlm_tune.commands.arguments import GenerateArguments
from dlm_tune.commands.checkpoint import inference_device_map, load_checkpoint
from dlm_tune.commands.run import say
from dlm_tune.generation import generate
from dlm_tune.recipe import Recipe

Prompt = str | list[dict[str, str]]


def run_generate(recipe: Recipe) -> None:
    """Complete the prompts of a file or of the command line, print them, and write them to `output_file`."""
    checkpoint, arguments, generation_config = recipe.build()
    prompts = read_prompts(arguments)
    model, tokenizer = load_checkpoint(
        checkpoint, adapter=checkpoint.adapter, device_map=inference_device_map(checkpoint.use_cpu)
    )
    wrap = wraps_text(arguments.chat_template, checkpoint.model_name_or_path, model)
    texts = [format_prompt(tokenizer, prompt, wrap) for prompt in prompts]
    completions, num_tokens, num_passes = [], 0, 0
    start = time.perf_counter()
    for first in range(0, len(texts), arguments.batch_size):
        batch = encode_prompts(tokenizer, texts[first : first + arguments.batch_size], model.device)
        rows = torch.arange(first, first + len(batch["input_ids"]), device=model.device)
        output = generate(model, **batch, generation_config=generation_config, row_keys=rows)
        num_passes += output.num_forward_passes
        for row in output.sequences[:, batch["input_ids"].shape[1] :]:
            ids = _until_end(row.tolist(), tokenizer)
            num_tokens += len(ids)
            completions.append(tokenizer.decode(ids, skip_special_tokens=True))
            _print_completion(prompts[len(completions) - 1], completions[-1])
    seconds = time.perf_counter() - start
    say(
        f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, {num_tokens} tokens, {num_passes} forward passes, "
        f"{num_tokens / seconds:.1f} tokens/s"
    )
    if arguments.output_file:
        lines = [
            json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        Path(arguments.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output_file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"Written to {arguments.output_file}")


def read_prompts(arguments: GenerateArguments) -> list[Prompt]:
    """Prompts of the command line, then those of the file.

    Raises:
        ValueError: a line of the file that is no prompt.
    """
    prompts: list[Prompt] = list(arguments.prompt or [])
    if arguments.prompts_file is None:
        return prompts
    path = Path(arguments.prompts_file)
    if not path.is_file():
        raise ValueError(f"prompts_file={path} does not exist (from {Path.cwd()}).")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if path.suffix in (".jsonl", ".json"):
            if line.strip():
                prompts.append(_prompt_of_row(line, f"{path}:{number}"))
        elif line.strip():
            prompts.append(line)
    if not prompts:
        raise ValueError(f"prompts_file={path} holds no prompt: write one a line.")
    return prompts


def _prompt_of_row(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: is not JSON ({error.msg}). A .jsonl file has one object a line.") from error
    prompt = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    is_messages = isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    if not (is_messages and prompt) and not isinstance(prompt, str):
        raise ValueError(f'{place}: needs "prompt" (text or a list of messages) or "messages".')
    if is_messages and prompt[-1]["role"] == "assistant":
        return prompt[:-1]  # the answer to be predicted
    return prompt


def wraps_text(choice: str, name: str, model: Any) -> bool:
    """Whether text prompts become a user's turn: `auto` goes by "instruct" or "chat" in the checkpoint's name."""
    if choice != "auto":
        return choice == "always"
    names = f"{name} {getattr(model.config, '_name_or_path', '')}".lower()
    wrap = "instruct" in names or "chat" in names
    if wrap:
        say("Prompts are wrapped as a user's turn (--chat_template never for plain text).")
    return wrap


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, wrap: bool) -> str:
    """Text of a prompt: messages, and text where `wrap`, through the chat template with an open assistant turn."""
    if isinstance(prompt, str) and not wrap:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, P), padded on the left."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(len(row) for row in rows)
    pads = [length - len(row) for row in rows]
    input_ids = [[tokenizer.pad_token_id] * pad + row for pad, row in zip(pads, rows, strict=True)]
    attention_mask = [[0] * pad + [1] * (length - pad) for pad in pads]
    return {
        "input_ids": torch.tensor(input_ids, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(attention_mask, dtype=torch.long, device=device),
    }


def _until_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    return ids[: ends[0]] if ends else ids


def _print_completion(prompt: Prompt, completion: str) -> None:
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    say(f"> {shown}", completion, "")
