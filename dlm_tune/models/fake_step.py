"""One training step on fake tensors: shapes and types without memory, and a count of the bytes that are live."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dlm_tune.models import lm_head
from dlm_tune.models.adapters import complete_peft_config
from dlm_tune.models.fused_head import LinearHead, score_rows

_HEAD, _CAST, _GRADIENT = "lm_head", "cast_weights", "gradients"


@dataclass(frozen=True)
class StepSetup:
    """What a training step holds beside the model's config.

    Attributes:
        num_sequences: sequences of a microbatch, B.
        length: tokens of each, L.
        num_targets: masked positions that the LM head scores, at most B L.
        has_mask: whether attention gets a (B, 1, L, L) mask: rows of unequal length, or packed ones.
        dtype: of the weights.
        autocast_dtype: of mixed precision; None without.
        quantization: None, "4bit" or "8bit".
        double_quantization: 4 bits: whether the scales are quantised too.
        peft_config: the adapter; None trains all weights.
        gradient_checkpointing: whether layers are run again in the backward pass.
        accumulates: whether gradients of earlier microbatches are there.
        optim: transformers' name of the optimiser.
        on_accelerator: there torch's optimisers that are not fused update all parameters at once (`foreach`).
        attn_implementation: as in transformers; flash attention counts as sdpa without a mask.
    """

    num_sequences: int
    length: int
    num_targets: int
    has_mask: bool = True
    dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    quantization: str | None = None
    double_quantization: bool = True
    peft_config: PeftConfig | None = None
    gradient_checkpointing: bool = False
    accumulates: bool = False
    optim: str = "adamw_torch_fused"
    on_accelerator: bool = False
    attn_implementation: str | None = None


def meta_model(config: PreTrainedConfig, setup: StepSetup) -> Any:
    """The model as the trainer prepares it, without memory."""
    attention = setup.attn_implementation or "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=setup.dtype, attn_implementation="eager" if attention == "eager" else "sdpa"
        )
        if setup.peft_config is not None:
            model = get_peft_model(model, complete_peft_config(setup.peft_config, model))
    if setup.gradient_checkpointing:
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if setup.peft_config is not None:
            model.enable_input_require_grads()
    return model.train()


def _plain_head(base: Any) -> nn.Linear | None:
    """The linear layer that `score_targets` reads directly; None where it calls the head as a module."""
    head = base.get_output_embeddings()
    if type(head) is ModulesToSaveWrapper:
        head = head.modules_to_save["default"]
    return head if type(head) is nn.Linear else None


def place_on_fake_cpu(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake ones, which autocast and kernels take for real."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in replaced:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live, by the phase that made them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.phase = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kinds: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for parameter in parameters:
            self._parameters[parameter.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self._parameters
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self.note(output, _CAST if is_cast else self.phase)
        return outputs

    def note(self, tensor: Tensor, kind: str) -> None:
        """Count the tensor's storage under a kind from now on."""
        storage = tensor.untyped_storage()
        if storage in self._parameters:
            return
        entry = self._kinds.get(storage)
        if entry is None:
            entry = self._kinds[storage] = _Entry(kind, storage.nbytes(), self.live)
        entry.move_to(kind)
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = self.live.copy()


class _Entry:
    """Bytes of one storage; gives them back when the storage is gone, and with it the entry."""

    def __init__(self, kind: str, size: int, live: Counter[str]) -> None:
        self.kind, self.size, self.live = kind, size, live
        live[kind] += size

    def move_to(self, kind: str) -> None:
        # what the forward pass made stays its own, also where the backward pass writes into it
        if kind == _GRADIENT:
            self.live[self.kind] -= self.size
            self.kind = kind
            self.live[kind] += self.size

    def __del__(self) -> None:
        self.live[self.kind] -= self.size


def run_step(model: Any, setup: StepSetup) -> dict[str, int]:
    """Run forward and backward of one microbatch; return the live bytes of each kind at the largest moment."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracker = _LiveBytes(list(model.parameters()))
    base = model.get_base_model() if setup.peft_config is not None else model
    tokens = torch.zeros(setup.num_sequences, setup.length, dtype=torch.int64)
    chosen = torch.zeros(setup.num_targets, dtype=torch.int64)
    autocast = torch.autocast("cpu", setup.autocast_dtype) if setup.autocast_dtype is not None else nullcontext()
    with tracker, _gradients_noted(trainable, tracker):
        if setup.accumulates:
            for parameter in trainable:
                parameter.grad = torch.empty_like(parameter)
                tracker.note(parameter.grad, _GRADIENT)
        with autocast:
            mask = _attention_mask(setup, base.config)
            positions = torch.arange(setup.length)[None]
            hidden = base.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            selected = hidden.last_hidden_state.flatten(0, 1)[chosen]
            del hidden, mask
            tracker.phase = _HEAD
            loss, gradient = _run_head(base, selected, tracker)
            del selected
        tracker.phase = "backward"
        loss.backward(gradient)
        for parameter in trainable:
            parameter.grad = None
    return {kind: size for kind, size in tracker.peak.items() if size}


def _run_head(base: Any, selected: Tensor, tracker: _LiveBytes) -> tuple[Tensor, Tensor | None]:
    """What the backward pass starts from, and its gradient: `score_targets` with weights, step by step.

    A plain linear head makes its gradients in the forward pass. `score_targets` does not take fake weights for plain,
    and its backward pass reads a value, which fake tensors do not have; so its parts are called here.
    """
    softcap = getattr(base.config, "final_logit_softcapping", None)
    targets = torch.zeros(len(selected), dtype=torch.int64)
    weights = torch.zeros(len(selected))
    plain_head = _plain_head(base)
    if plain_head is None:
        head = base.get_output_embeddings()
        vocab_size = base.get_input_embeddings().weight.shape[0]
        loss, _, _ = lm_head.score_targets(
            head, selected, targets, vocab_size, token_weights=weights, logit_softcap=softcap
        )
        assert loss is not None  # token_weights were given
        return loss, None
    weight = plain_head.weight
    rows = max(1, lm_head.MAX_CHUNK_LOGITS // len(weight))
    settings = LinearHead(weight, plain_head.bias, softcap, rows)
    gradient = torch.empty_like(selected)
    some = min(len(selected), 2 * rows)  # every chunk takes what the first ones take
    wants = (True, weight.requires_grad, False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # compared, not read
        scores = score_rows(settings, selected[:some].detach(), targets[:some], weights[:some], wants)
    weight_gradient = scores.gradients[1]
    if weight_gradient is not None:
        weight_gradient = weight_gradient.to(weight.dtype)
        if weight.grad is None:
            weight.grad = weight_gradient
            tracker.note(weight_gradient, _GRADIENT)
    return selected, gradient


@contextmanager
def _gradients_noted(trainable: list[nn.Parameter], tracker: _LiveBytes) -> Iterator[None]:
    """Count gradients as such as soon as they belong to a parameter."""

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None  # the hook runs after it was accumulated
        tracker.note(parameter.grad, _GRADIENT)

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in trainable]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_mask(setup: StepSetup, config: Any) -> Tensor | None:
    if not setup.has_mask or (setup.attn_implementation or "").startswith(("flash", "flex")):
        return None
    shape = (setup.num_sequences, 1, setup.length, setup.length)
    is_eager = config._attn_implementation == "eager"
    return torch.ones(shape, dtype=setup.dtype if is_eager else torch.bool)
