"""Configuration of `DiffusionTrainer`."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import SFTConfig

from dlm_tune.data.arguments import EOS_POLICIES, INVALID_ROWS, OVERLONG_ROWS
from dlm_tune.diffusion import LOSS_WEIGHTINGS, MASKINGS, NOISE_SCHEDULES, NORMALIZATIONS, TIMESTEP_SAMPLERS

DEFAULT_NOISE_EPSILON = 1e-3
DEFAULT_CART_P = 0.3
DEFAULT_BLOCK_LENGTH = 32
DEFAULT_UNPAIRED_FRACTION = 0.5

# Arguments of SFTConfig and TrainingArguments that cannot be honoured here, each with the reason and the way out.
# They are errors as soon as they differ from their default.
_REFUSED = {
    "label_smoothing_factor": "the loss is a likelihood bound; smoothed labels would no longer bound anything",
    "loss_type": "the loss is that of masked diffusion; choose it with `loss_weighting` and `loss_normalization`",
    "packing_strategy": "rows are packed whole, best-fit decreasing; use `overlong_rows` for rows that are too long",
    "padding_free": "a bidirectional model needs an explicit mask between rows; set `packing: true` instead",
    "truncation_mode": "rows are never cut silently; choose with `overlong_rows`",
    "average_tokens_across_devices": "the denominator is always counted over all processes; leave it true",
    "router_aux_loss_coef": "only the diffusion loss is computed; no model family here has a router loss",
    "use_liger_kernel": "liger replaces the model's forward, which scores masked positions only; use "
    "`model_init_kwargs: {use_kernels: true}`",
    "include_for_metrics": "evaluation computes likelihood bounds and no predictions",
    "batch_eval_metrics": "evaluation computes likelihood bounds and no predictions",
    "eval_accumulation_steps": "evaluation keeps a few numbers per row and no predictions",
    "eval_do_concat_batches": "evaluation keeps a few numbers per row and no predictions",
    "auto_find_batch_size": "the noise of a step is laid out over the global batch, which must not change in a run",
    "trust_remote_code": "checkpoints are loaded by the native classes; remote code is never executed",
}


@dataclass
class DiffusionConfig(SFTConfig):
    """Arguments of `DiffusionTrainer`: those of `trl.SFTConfig`, and the fields below.

    Attributes:
        noise_schedule: `alpha(t)`, a name in `NOISE_SCHEDULES`. The bound does not depend on it, its variance does.
        noise_schedule_power: `k` of `noise_schedule: polynomial`, `alpha = 1 - t**k` (default 1.25).
        noise_epsilon: smallest `t` with `masking: bernoulli` (LLaDA's `eps`, default 1e-3).
        timestep_sampling: how the timesteps of a global batch depend on each other, a name in `TIMESTEP_SAMPLERS`; all
            are unbiased.
        masking: `exact_count` (LLaDA eq. 6: lowest variance) or `bernoulli` (LLaDA's training recipe).
        loss_weighting: `nelbo` (a likelihood bound), `uniform` (every masked token counts 1, as in BERT) or `cart`
            (Dream: the closer the visible tokens, the more a masked one counts). `nelbo` is logged whatever it is.
        cart_geometric_p: parameter of `loss_weighting: cart` (default 0.3).
        unpaired_fraction: share of unpaired rows in the stream, with an `unpaired_dataset` (default 0.5); exact to one
            row in every window.
        prompt_dropout: share of paired rows whose prompt is masked, drawn anew in each epoch (standard classifier-free
            guidance: 0.1; unsupervised guidance: 0).
        prompt_noising: share of paired rows whose prompt is noised and scored like the answer (joint training), among
            those whose prompt is not masked by `prompt_dropout`.
        guidance_keep_tokens: tokens that the unconditional branch of guidance still sees in a prompt, such as BOS and
            the headers of a chat template; written to the checkpoint's config as `guidance_keep_token_ids`.
        guidance_distillation_scale: w. The loss is the divergence from what guidance of scale w would give with the
            model as it was when training began, instead of the true tokens' likelihood; sample then without guidance.
            `nelbo` is still logged. See `trainers.distillation`.
        attention_annealing_steps: optimiser steps over which attention grows from causal to bidirectional, for
            checkpoints trained to predict the next token (DiffuLLaMA); 0 or None: bidirectional from the start.
            Evaluations always attend in both directions.
        loss_normalization: `tokens` (nats per target token over the whole step) or `sequences` (mean over rows of
            nats per target token, LLaDA SFT). Exact under accumulation and over processes.
        eos_policy: `one` EOS, `pad_to_block` or `pad_to_max` with learned EOS, or `none`. By default answers to
            prompts are filled to a block, and plain text ends with one EOS.
        block_length: with `eos_policy: pad_to_block`, answers are filled with EOS to a multiple of it (default 32
            where the policy is chosen by the data).
        packing: several rows in a sequence of `max_length`, best-fit decreasing; they do not see each other, and loss
            and gradient of a global batch do not change. `eval_packing` follows it unless set.
        random_length_probability: share of the rows of plain text that are cut to a random length (LLaDA pretraining:
            0.01), so that other lengths than the usual one are seen.
        eval_noise_samples: corruptions per evaluation row, the same ones at every evaluation.
        noise_seed: key of all training and evaluation noise.
        invalid_rows: `error`, or `drop` rows without targets, with mask tokens, or with a prompt that fills
            `max_length`.
        overlong_rows: `error`, `drop`, `truncate` the answer's end, or `split` plain text into windows.

    Defaults that differ from `SFTConfig`: `assistant_only_loss` is chosen by the data (true for `messages`),
    `logging_nan_inf_filter` is false since a loss that is not finite stops the run,
    `ddp_find_unused_parameters` is false since every parameter takes part in every step, and
    `greater_is_better` is true for accuracies only, since all other metrics of an evaluation are bounds to minimise.

    Raises:
        ValueError: all faults at once, each with field, value, reason and remedy.
    """

    noise_schedule: str = field(
        default="polynomial",
        metadata={
            "help": "Noise schedule alpha(t); polynomial takes noise_schedule_power.",
            "choices": NOISE_SCHEDULES,
        },
    )
    noise_schedule_power: float | None = field(
        default=None,
        metadata={"help": "Power k of `noise_schedule: polynomial` only, alpha = 1 - t**k (default 1.25)."},
    )
    noise_epsilon: float | None = field(
        default=None, metadata={"help": "Smallest timestep, with `masking: bernoulli` only (default 1e-3)."}
    )
    timestep_sampling: str = field(
        default="stratified",
        metadata={"help": "How the timesteps of a global batch are drawn.", "choices": TIMESTEP_SAMPLERS},
    )
    masking: str = field(
        default="exact_count",
        metadata={"help": "Mask a drawn number of targets, or each independently.", "choices": list(MASKINGS)},
    )
    loss_weighting: str = field(
        default="nelbo",
        metadata={"help": "Weight of each masked token in the loss.", "choices": list(LOSS_WEIGHTINGS)},
    )
    cart_geometric_p: float | None = field(
        default=None, metadata={"help": "Geometric parameter of `loss_weighting: cart` only (default 0.3)."}
    )
    random_length_probability: float = field(
        default=0.0, metadata={"help": "Share of plain-text rows cut to a random length (LLaDA pretraining: 0.01)."}
    )
    unpaired_fraction: float | None = field(
        default=None, metadata={"help": "Share of unpaired rows, with `unpaired_dataset` only (default 0.5)."}
    )
    prompt_dropout: float = field(
        default=0.0, metadata={"help": "Share of rows whose prompt is masked (standard guidance: 0.1)."}
    )
    prompt_noising: float = field(
        default=0.0, metadata={"help": "Share of rows whose prompt is noised and scored too (joint training)."}
    )
    guidance_keep_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Prompt tokens that the unconditional branch of guidance sees, e.g. BOS and chat headers."},
    )
    guidance_distillation_scale: float | None = field(
        default=None,
        metadata={
            "help": "Train towards the initial model under guidance of this scale, e.g. 1.0; unset, towards data."
        },
    )
    attention_annealing_steps: int | None = field(
        default=None,
        metadata={"help": "Steps from causal to full attention, for next-token checkpoints; by default full at once."},
    )
    loss_normalization: str = field(
        default="tokens",
        metadata={"help": "Nats per target token, over tokens or over rows.", "choices": list(NORMALIZATIONS)},
    )
    eos_policy: str | None = field(
        default=None,
        metadata={
            "help": "Learned EOS at the end; by default pad_to_block for answers to prompts and one for plain text.",
            "choices": list(EOS_POLICIES),
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Answer length is filled to a multiple of it, with `eos_policy: pad_to_block`."},
    )
    eval_noise_samples: int = field(
        default=8, metadata={"help": "Corruptions per evaluation row, fixed by noise_seed."}
    )
    noise_seed: int = field(default=0, metadata={"help": "Key of all training and evaluation noise."})
    invalid_rows: str = field(
        default="error",
        metadata={"help": "What to do with rows that cannot be trained on.", "choices": list(INVALID_ROWS)},
    )
    overlong_rows: str = field(
        default="error",
        metadata={"help": "What to do with rows longer than max_length.", "choices": list(OVERLONG_ROWS)},
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Only assistant turns are targets; by default true for `messages` data and false otherwise."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay false: a loss that is not finite stops the run."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Direction of metric_for_best_model; by default up for accuracies and down for all else."},
    )
    # every parameter takes part in every step, also where no token of a microbatch is masked
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters without a gradient under DDP; not needed here."}
    )

    def __post_init__(self) -> None:
        faults = self._refused_arguments() + self._invalid_choices() + self._ineffective_arguments()
        if faults:
            plural = "s" if len(faults) > 1 else ""
            raise ValueError(f"{len(faults)} problem{plural} in DiffusionConfig:\n  " + "\n  ".join(faults))
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # transformers takes every metric whose name does not end with "loss" for one to maximise, `nelbo` too
            self.greater_is_better = "accuracy" in self.metric_for_best_model
        super().__post_init__()
        if self.masking == "bernoulli" and self.noise_epsilon is None:
            self.noise_epsilon = DEFAULT_NOISE_EPSILON

    def _refused_arguments(self) -> list[str]:
        faults = []
        for definition in fields(self):
            reason = _REFUSED.get(definition.name)
            value = getattr(self, definition.name)
            if reason and value != _default(definition):
                faults.append(f"{definition.name}={value!r} cannot be honoured: {reason}.")
        if self.logging_nan_inf_filter:
            faults.append(
                "logging_nan_inf_filter=True cannot be honoured: a loss that is not finite stops the run. Remove it."
            )
        if self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            faults.append(
                f"hub_strategy={str(self.hub_strategy)!r} cannot be honoured: states of optimisers are pickle files "
                "and are not pushed. Use every_save or end."
            )
        return faults

    def _invalid_choices(self) -> list[str]:
        faults = []
        for definition in fields(DiffusionConfig):
            choices = definition.metadata.get("choices")
            value = getattr(self, definition.name)
            if value is None and definition.default is None:
                continue
            if definition.name in DiffusionConfig.__annotations__ and choices and value not in choices:
                faults.append(f"{definition.name}={value!r} is unknown: choose one of {', '.join(choices)}.")
        if self.noise_epsilon is not None and not 0 < self.noise_epsilon < 1:
            faults.append(f"noise_epsilon={self.noise_epsilon} must lie between 0 and 1; LLaDA uses 1e-3.")
        if self.block_length is not None and self.block_length < 1:
            faults.append(f"block_length={self.block_length} must be at least 1; LLaDA and dLLM use 32.")
        if self.noise_schedule_power is not None and not 0 < self.noise_schedule_power < math.inf:
            faults.append(
                f"noise_schedule_power={self.noise_schedule_power} must be above 0 and finite; 1 is the linear "
                "schedule."
            )
        if self.cart_geometric_p is not None and not 0 < self.cart_geometric_p < 1:
            faults.append(f"cart_geometric_p={self.cart_geometric_p} must lie between 0 and 1; the default is 0.3.")
        if not 0 <= self.random_length_probability <= 1:
            faults.append(
                f"random_length_probability={self.random_length_probability} must lie between 0 and 1; LLaDA: 0.01."
            )
        for name in ("prompt_dropout", "prompt_noising"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name}={getattr(self, name)} must lie between 0 and 1: it is a share of the rows.")
        scale = self.guidance_distillation_scale
        if scale is not None and (scale == 0 or not math.isfinite(scale)):
            faults.append(
                f"guidance_distillation_scale={scale} must be finite and not 0, which is no guidance; 1.0 is usual. "
                "Remove it to train on the data."
            )
        # UnpairedMixture takes it as a ratio of integers below 1e9
        if self.unpaired_fraction is not None and not 1e-9 <= self.unpaired_fraction <= 1 - 1e-9:
            faults.append(f"unpaired_fraction={self.unpaired_fraction} must lie between 0 and 1; the default is 0.5.")
        if self.attention_annealing_steps is not None and self.attention_annealing_steps < 0:
            faults.append(
                f"attention_annealing_steps={self.attention_annealing_steps} must be a number of steps, such as 10000 "
                "(DiffuLLaMA); 0 is attention in both directions from the start."
            )
        if self.eval_noise_samples < 1:
            faults.append(f"eval_noise_samples={self.eval_noise_samples} must be at least 1; the default is 8.")
        return faults

    def _ineffective_arguments(self) -> list[str]:
        faults = []
        if self.noise_epsilon is not None and self.masking != "bernoulli":
            faults.append(
                f"noise_epsilon={self.noise_epsilon} has no effect with masking='{self.masking}', which never draws "
                "an empty mask. Remove it or set masking='bernoulli'."
            )
        if self.block_length is not None and self.eos_policy not in (None, "pad_to_block"):
            faults.append(
                f"block_length={self.block_length} has no effect with eos_policy='{self.eos_policy}'. Remove it or "
                "set eos_policy='pad_to_block'."
            )
        if self.eos_policy == "pad_to_block" and self.block_length is None:
            faults.append("eos_policy='pad_to_block' needs block_length, for example block_length=32.")
        if self.noise_schedule_power is not None and self.noise_schedule != "polynomial":
            faults.append(
                f"noise_schedule_power={self.noise_schedule_power} has no effect with "
                f"noise_schedule='{self.noise_schedule}'. Remove it or set noise_schedule='polynomial'."
            )
        if self.cart_geometric_p is not None and self.loss_weighting != "cart":
            faults.append(
                f"cart_geometric_p={self.cart_geometric_p} has no effect with loss_weighting='{self.loss_weighting}'. "
                "Remove it or set loss_weighting='cart'."
            )
        if self.prompt_dropout == 1 and self.prompt_noising:
            faults.append(
                f"prompt_noising={self.prompt_noising} has no effect with prompt_dropout={self.prompt_dropout}, which "
                "masks every prompt. Remove one of them."
            )
        if self.guidance_distillation_scale is not None and self.prompt_noising:
            faults.append(
                f"prompt_noising={self.prompt_noising} does not go with guidance_distillation_scale="
                f"{self.guidance_distillation_scale}: a prompt that is a target is no condition, so that row would "
                "learn unguided answers. Remove one of them."
            )
        if self.guidance_distillation_scale is not None and self.completion_only_loss is False:
            faults.append(
                f"guidance_distillation_scale={self.guidance_distillation_scale} has no effect with "
                "completion_only_loss=False: prompts are then targets, and nothing is left to guide by. Remove one."
            )
        if self.guidance_distillation_scale is not None and self.attention_annealing_steps:
            faults.append(
                f"attention_annealing_steps={self.attention_annealing_steps} does not go with "
                f"guidance_distillation_scale={self.guidance_distillation_scale}: its teacher is the model before "
                "training, which must be a diffusion model already. Remove one of them."
            )
        if self.attention_annealing_steps == 1:
            faults.append(
                "attention_annealing_steps=1 has no effect: attention is bidirectional from the first step on. Remove "
                "it."
            )
        return faults + self._packing_faults()

    def _packing_faults(self) -> list[str]:
        faults = []
        is_packed = self.packing or self.eval_packing
        if is_packed and self.max_length is None:
            faults.append("packing needs max_length, the length of the packed sequences, for example max_length=2048.")
        if is_packed and self.eos_policy == "pad_to_max":
            faults.append(
                "eos_policy='pad_to_max' fills rows to the longest of their batch, which packing does not have. Set "
                "eos_policy='pad_to_block' or 'one', or packing=False."
            )
        if is_packed and self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            which = "packing" if self.packing else "eval_packing"
            faults.append(
                f"train_sampling_strategy='{self.train_sampling_strategy}' does not go with {which}=True: it sorts "
                "by length, and packed sequences are all of like length. Remove one of them."
            )
        if is_packed and (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            faults.append(
                "dataset_kwargs={'skip_prepare_dataset': True} would leave out packing too. Remove it: rows that are "
                "prepared already are only packed."
            )
        if self.overlong_rows != "error" and self.max_length is None:
            faults.append(f"overlong_rows='{self.overlong_rows}' has no effect with max_length=None. Set max_length.")
        return faults


def _default(definition: Any) -> Any:
    return definition.default_factory() if definition.default is MISSING else definition.default
