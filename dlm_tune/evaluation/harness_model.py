"""The questions of the lm-evaluation-harness, answered by a diffusion language model.

A harness model answers three questions; each has its own meaning for a diffusion model.

- `loglikelihood`: a lower bound, minus the NELBO of the continuation given its context (LLaDA, eq. 6). `is_greedy` is
  whether unmasking the most confident position at a time writes the continuation.
- `loglikelihood_rolling`: the text is cut into windows whose scored tokens are disjoint; each is scored given the
  tokens before it that fit `max_length` with it. The sum is a lower bound for the model with that context.
- `generate_until`: the sampler fills a canvas of the task's `max_gen_toks`; stop strings are applied to the text.

`guidance_scale` guides the first and the last; texts without a condition cannot be guided.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dlm_tune.evaluation.likelihood import log_likelihood
from dlm_tune.generation import (
    DiffusionGenerationConfig,
    config_for_tokenizer,
    decode_completion,
    generate,
    pad_prompts,
)
from dlm_tune.generation.guidance import row_scales
from dlm_tune.generation.sampler import with_overrides

logger = logging.getLogger(__name__)


class DiffusionHarnessMethods:
    """The three questions of the harness; `harness_model_class` joins them with its `LM` base class."""

    cache_hook: Any

    def __init__(
        self,
        pretrained: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        batch_size: int = 16,
        num_samples: int = 128,
        seed: int = 0,
        check_greedy: bool = True,
        max_length: int | None = None,
        rolling_stride: int | None = None,
        adapter: str | None = None,
        **generation_options: Any,
    ):
        """Wrap a model.

        Args:
            pretrained: a model of `dlm_tune.load_model`, or the path or Hub name of one.
            tokenizer: its tokenizer; loaded from `pretrained` if that is a name.
            generation_config: options of `generate_until`; the task sets length and temperature. `guidance_scale` also
                holds for `loglikelihood`, whose scores then bound the likelihood under guided sampling.
            batch_size: rows per forward pass.
            num_samples: forward passes for each likelihood.
            seed: noise seed of likelihoods and samples.
            check_greedy: compute `is_greedy`; otherwise it is reported as False.
            max_length: most tokens in a forward pass; the model's positions if None.
            rolling_stride: tokens scored in each window after the first of a long text; half of `max_length` if None.
            adapter: adapter to load onto `pretrained`, if that is a name.
            **generation_options: fields of the generation configuration, for the harness's `model_args`.

        Raises:
            ValueError: options that cannot be honoured.
            TypeError: an unknown option.
        """
        super().__init__()
        if isinstance(pretrained, str | Path):
            from dlm_tune.models import load_model, load_tokenizer

            tokenizer = tokenizer or load_tokenizer(str(pretrained))
            pretrained = load_model(str(pretrained), adapter=adapter)
        elif adapter is not None:
            raise ValueError(f"adapter={adapter!r} needs pretrained to be a name. Load the adapter onto the model.")
        if tokenizer is None:
            raise ValueError("tokenizer=None: a model object needs its tokenizer. Pass tokenizer=load_tokenizer(...).")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1.")
        config = with_overrides(generation_config or DiffusionGenerationConfig(), generation_options)
        if config.temperature > 0:
            raise ValueError(
                f"temperature={config.temperature} would have no effect: the harness's tasks set it. Pass "
                "gen_kwargs={'do_sample': True, 'temperature': ...} instead."
            )
        config.check_guidance()
        self.model, self.tokenizer = pretrained, tokenizer
        self.generation_config = config_for_tokenizer(config, tokenizer, pretrained)
        self.batch_size, self.num_samples, self.seed = batch_size, num_samples, seed
        self.check_greedy = check_greedy
        self.max_length: int = max_length or pretrained.config.max_position_embeddings
        self.rolling_stride: int = rolling_stride or self.max_length // 2
        if not 0 < self.rolling_stride <= self.max_length:
            raise ValueError(
                f"rolling_stride={self.rolling_stride} must be between 1 and max_length={self.max_length}."
            )
        self._device = next(pretrained.parameters()).device

    # What the harness asks of a model beside the three questions.

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, in the keys of the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template, recorded in the results; the harness passes True to apply it."""
        if isinstance(chat_template, str):
            raise ValueError(f"apply_chat_template={chat_template!r}: the tokenizer has one template. Pass True.")
        return self.tokenizer.chat_template or "" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    # The three questions.

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """`(lower bound of the log-likelihood in nats, is_greedy)` of each (context, continuation)."""
        schedule = self.generation_config.guidance_schedule
        if schedule != "constant":
            raise ValueError(
                f"guidance_schedule='{schedule}' goes by the steps of the sampler, which likelihoods do not have. Use "
                "'constant' for tasks of likelihoods."
            )
        pairs = [self._fit(*self._encode_pair(*request.args)) for request in requests]
        # the choices of one question share their context, and so their noise: they are compared on equal terms
        keys = [_context_key(context) if context else index for index, (context, _) in enumerate(pairs)]
        scores = self._score(pairs, keys)
        greedy = self._is_greedy(pairs) if self.check_greedy else [False] * len(pairs)
        results = list(zip(scores, greedy, strict=True))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Lower bound of the log-likelihood of each text, in nats.

        Raises:
            ValueError: guidance.
        """
        if self.generation_config.guidance_scale != 0:
            raise ValueError(
                f"guidance_scale={self.generation_config.guidance_scale} has no condition to strengthen in the "
                "likelihood of whole texts. Use guidance_scale=0 for tasks of perplexity."
            )
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        prefix = self._prefix()
        room = self.max_length - len(prefix)
        for index, request in enumerate(requests):
            token_ids = self._encode(request.args[0])
            for context_start, start, end in rolling_windows(len(token_ids), room, min(self.rolling_stride, room)):
                pairs.append((prefix + token_ids[context_start:start], token_ids[start:end]))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(pairs), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts up to the first stop string, EOS or end of turn."""
        prompts = [self._encode(request.args[0]) for request in requests]
        options = [self._task_options(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        progress = tqdm(total=len(requests), desc="Generating", unit="row")
        for config in {repr(config): config for config, _ in options}.values():
            indices = [index for index, option in enumerate(options) if option[0] == config]
            indices.sort(key=lambda index: -len(prompts[index]))
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                room = self.max_length - config.max_new_tokens
                rows = self._generate([self._keep_end(prompts[index], room) for index in batch], config, batch)
                for index, row in zip(batch, rows, strict=True):
                    texts[index] = self._cut(row, options[index][1])
                    self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                progress.update(len(batch))
        progress.close()
        return texts

    # How they are answered.

    def _encode(self, text: str) -> list[int]:
        """Token ids as in training; a chat template has already written its special tokens."""
        bos_token = self.tokenizer.bos_token
        has_special_tokens = bos_token is not None and text.startswith(bos_token)
        return list(self.tokenizer(text, add_special_tokens=not has_special_tokens)["input_ids"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut from those of the whole; white space between them belongs to the continuation."""
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        context_ids = self._encode(context)
        return context_ids or self._prefix(), self._encode(context + continuation)[len(context_ids) :]

    def _prefix(self) -> list[int]:
        """What precedes a text without context: a token where position 0 has no predictor, else nothing."""
        if not self.model.config.logits_shift:
            return []
        bos_token_id = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if bos_token_id is None else bos_token_id]

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Drop the beginning of a context that is too long."""
        room = self.max_length - len(continuation)
        if room < len(self._prefix()):
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit max_length={self.max_length}. Raise "
                "max_length, or score the text with a loglikelihood_rolling task."
            )
        return self._keep_end(context, room), continuation

    def _keep_end(self, context: list[int], room: int) -> list[int]:
        if len(context) > room:
            logger.warning(
                "A context of %d tokens lost its beginning: %d fit max_length=%d.", len(context), room, self.max_length
            )
        return context[max(0, len(context) - room) :]

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], row_keys: Sequence[int] | None = None
    ) -> list[float]:
        prompts, completions = [context for context, _ in pairs], [continuation for _, continuation in pairs]
        bounds = log_likelihood(
            self.model,
            prompts,
            completions,
            num_samples=self.num_samples,
            seed=self.seed,
            batch_size=self.batch_size,
            row_keys=row_keys,
            show_progress=True,
            guidance_scale=self.generation_config.guidance_scale,
        )
        return bounds.log_likelihood.tolist()

    def _is_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether unmasking the most confident position at a time, at the given length, gives the continuation."""
        result = [True] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][1]))
        progress = tqdm(total=len(pairs), desc="Greedy check", unit="row")
        while order:
            length = len(pairs[order[0]][1])
            batch = [index for index in order[: self.batch_size] if len(pairs[index][1]) == length]
            order = order[len(batch) :]
            if length:
                config = DiffusionGenerationConfig(
                    max_new_tokens=length,
                    steps=length,
                    block_length=None,
                    stop_at_eos=False,
                    guidance_scale=self.generation_config.guidance_scale,
                    guidance_batching=self.generation_config.guidance_batching,
                )
                rows = self._generate([pairs[index][0] for index in batch], config, batch)
                for index, row in zip(batch, rows, strict=True):
                    result[index] = row == pairs[index][1]
            progress.update(len(batch))
        progress.close()
        return result

    def _generate(
        self, prompts: list[list[int]], config: DiffusionGenerationConfig, row_keys: list[int]
    ) -> list[list[int]]:
        input_ids, attention_mask = pad_prompts(prompts, self.tokenizer.pad_token_id, self._device)
        keys, scales = torch.tensor(row_keys), row_scales(config, len(prompts))
        output = generate(self.model, input_ids, attention_mask, config, row_keys=keys, guidance_scales=scales)
        return output.sequences[:, input_ids.shape[1] :].tolist()

    def _task_options(self, generation_kwargs: dict[str, Any]) -> tuple[DiffusionGenerationConfig, list[str]]:
        """The configuration for a task's `generation_kwargs`, and its stop strings."""
        from lm_eval.models.utils import normalize_gen_kwargs

        base = self.generation_config
        options = normalize_gen_kwargs(generation_kwargs, base.max_new_tokens)
        until, max_new_tokens = options.pop("until", []), options.pop("max_gen_toks")
        temperature = options.pop("temperature", 0.0) if options.pop("do_sample", False) else 0.0
        options.pop("temperature", None)
        neutral: dict[str, tuple[Any, ...]] = {"top_p": (None, 1, 1.0), "top_k": (None, 0, -1)}
        unknown = {name: value for name, value in options.items() if value not in neutral.get(name, ())}
        if unknown:
            raise ValueError(
                f"generation_kwargs {unknown} of the task cannot be honoured: the sampler knows until, max_gen_toks, "
                "do_sample and temperature. Override them with gen_kwargs."
            )
        block_length = min(base.block_length or max_new_tokens, max_new_tokens)
        canvas = -(-max_new_tokens // block_length) * block_length
        if canvas >= self.max_length:
            raise ValueError(
                f"max_gen_toks={max_new_tokens} of the task leaves no room for a prompt in max_length="
                f"{self.max_length}. Override it with gen_kwargs={{'max_gen_toks': ...}}."
            )
        # As many tokens a step as configured, whatever the length of the task's canvas.
        steps = max(round(canvas * base.steps / base.max_new_tokens), canvas // block_length)
        config = dataclasses.replace(
            base,
            max_new_tokens=canvas,
            steps=steps,
            block_length=block_length,
            temperature=float(temperature),
            seed=self.seed,
        )
        return config, until if isinstance(until, list) else [until]

    def _cut(self, token_ids: list[int], until: list[str]) -> str:
        """Text before the first stop string; those may be special tokens, so these are removed last."""
        ends = self.generation_config.eos_token_ids or []
        text = decode_completion(self.tokenizer, token_ids, ends, skip_special_tokens=False)
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text


def _context_key(token_ids: Sequence[int]) -> int:
    """63 bits that depend on the tokens of a context only: not on the order or the number of requests."""
    digest = hashlib.sha256(repr(list(token_ids)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def rolling_windows(num_tokens: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """`(context start, start, end)` of windows that score each of `num_tokens` once: tokens `start..end-1`.

    The first window scores `max_length` tokens, the others `stride` each (the last one what is left), after as many
    tokens of context as fit `max_length`. `stride` is at most `max_length`.
    """
    windows, start = [], 0
    while start < num_tokens:
        end = min(num_tokens, start + (stride if start else max_length))
        windows.append((max(0, end - max_length) if start else 0, start, end))
        start = end
    return windows
