"""`dlm-tune generate`: complete prompts."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from dlm_tune.commands.arguments import GenerateArguments
from dlm_tune.commands.checkpoint import inference_device_map, load_checkpoint
from dlm_tune.commands.console import say
from dlm_tune.generation import config_for_tokenizer, decode_completion, generate, pad_prompts, tokenize_prompt
from dlm_tune.generation.guidance import check_prompts, row_scales
from dlm_tune.recipe import Recipe

Prompt = str | list[dict[str, str]]


def run_generate(recipe: Recipe) -> None:
    """Complete the prompts of a file or of the command line, print them, and write them to `output_file`."""
    checkpoint, arguments, generation_config = recipe.build()
    prompts = read_prompts(arguments)
    generation_config.check_guidance()
    if arguments.negative_prompt is not None and generation_config.guidance_scale == 0:
        raise ValueError("negative_prompt has no effect with guidance_scale=0. Set guidance_scale, for example to 1.")
    model, tokenizer = load_checkpoint(
        checkpoint, adapter=checkpoint.adapter, device_map=inference_device_map(checkpoint.use_cpu)
    )
    if wraps_text(arguments.chat_template, checkpoint.model_name_or_path, model):
        prompts = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
    config = config_for_tokenizer(generation_config, tokenizer, model)
    prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    if arguments.negative_prompt is None:
        check_prompts(model.config, config, prompt_ids)
    completions: list[str] = []
    num_tokens, num_passes, num_row_passes, start = 0, 0, 0, time.perf_counter()
    for first in range(0, len(prompts), arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        token_ids = prompt_ids[first : first + arguments.batch_size]
        input_ids, attention_mask = pad_prompts(token_ids, tokenizer.pad_token_id, model.device)
        rows = torch.arange(first, first + len(token_ids))
        negative_input_ids, negative_attention_mask = _negative_prompts(arguments, batch, tokenizer, model)
        output = generate(
            model,
            input_ids,
            attention_mask,
            config,
            row_keys=rows,
            guidance_scales=row_scales(config, len(batch)),
            negative_input_ids=negative_input_ids,
            negative_attention_mask=negative_attention_mask,
        )
        num_passes += output.num_forward_passes
        num_row_passes += output.num_row_passes
        for row in output.sequences[:, input_ids.shape[1] :].tolist():
            ends = [position for position, token in enumerate(row) if token in (config.eos_token_ids or [])]
            num_tokens += ends[0] + 1 if ends else len(row)
            completions.append(decode_completion(tokenizer, row, config.eos_token_ids or []))
            _print_completion(prompts[len(completions) - 1], completions[-1])
    seconds = time.perf_counter() - start
    say(
        f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, {num_tokens} tokens, {num_passes} forward passes "
        f"of {num_row_passes} rows, {num_tokens / seconds:.1f} tokens/s"
    )
    if arguments.output_file:
        lines = [
            json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        Path(arguments.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output_file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"Written to {arguments.output_file}")


def _negative_prompts(
    arguments: GenerateArguments, prompts: list[Prompt], tokenizer: Any, model: Any
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The negative prompt for each prompt, a user's turn where that is one: ids and attention mask."""
    text = arguments.negative_prompt
    if text is None:
        return None, None
    negative = [text if isinstance(prompt, str) else [{"role": "user", "content": text}] for prompt in prompts]
    token_ids = [tokenize_prompt(tokenizer, prompt) for prompt in negative]
    return pad_prompts(token_ids, tokenizer.pad_token_id, model.device)


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
    # only line feeds end a line (JSON may hold other separators); a byte order mark is not part of the first prompt
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
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
    is_messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
    )
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


def _print_completion(prompt: Prompt, completion: str) -> None:
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    say(f"> {shown}", completion, "")
