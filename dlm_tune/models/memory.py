"""Memory of a training step, from a model's config alone.

One step is run with fake tensors (torch's FakeTensorMode: shapes and types without memory), through the model's own
layers, adapters, gradient checkpointing and LM head, while the bytes of all live tensors are counted. So what autograd
keeps for the backward pass needs no formula per architecture. Weights, optimiser state and the update are counted
from the parameters.

Not counted: buffers inside matrix libraries, fragmentation, and the data. Everything is per process, without sharding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dlm_tune.models.fake_step import StepSetup, meta_model, place_on_fake_cpu, run_step

__all__ = ["MemoryEstimate", "StepSetup", "count_parameters", "estimate_step_memory", "optimizer_state_bytes"]

# Numbers per trainable parameter that an optimiser keeps, and bytes of each; None: those of the parameter. Paged
# states count too: they move to main memory only when the device is full.
_OPTIMIZER_STATES: dict[str, tuple[int, float | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "sgd": (0, None),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), (2, 4.0)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "paged_lion", "rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 4.0)),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit", "paged_ademamix"), (3, 4.0)),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), (2, 1 + 4 / 256)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 1 + 4 / 256)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), (3, 1 + 4 / 256)),
}
# Copies of all parameters that torch's `foreach` updates make: the root of the second moment, and Adagrad's step
_UPDATE_COPIES = {"adamw_torch": 1, "rmsprop": 1, "adagrad": 2}
_MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the state of smaller tensors in float32
# 4 bits, a byte of scale for 64 weights and a float32 for 256 scales; or a float32 for 64 weights; 8 bits: see below
_BYTES_4BIT = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step on one device.

    Attributes:
        num_parameters: all parameters, the adapter's too.
        num_trainable: those that are trained.
        weights: all of them, in their types.
        optimizer_state: kept between steps; None for an optimiser whose state is not known here.
        gradients: of all trainable parameters, complete.
        peak: what else is live at the largest moment of forward and backward, by kind: `activations` (made in the
            forward pass), `lm_head`, `cast_weights` (weights in autocast's type), `backward` (made in the backward
            pass) and `gradients` (those that exist by then).
        optimizer_update: temporary tensors of the optimiser's update.
    """

    num_parameters: int
    num_trainable: int
    weights: int
    optimizer_state: int | None
    gradients: int
    peak: dict[str, int] = field(default_factory=dict)
    optimizer_update: int = 0

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes by kind at the two moments that can be the largest of a step."""
        kept = {"weights": self.weights, "optimizer_state": self.optimizer_state or 0}
        update = {"gradients": self.gradients, "optimizer_update": self.optimizer_update}
        return {"forward and backward": kept | self.peak, "optimiser update": kept | update}

    @property
    def total(self) -> int:
        """Bytes at the largest moment."""
        return max(sum(terms.values()) for terms in self.phases.values())


def count_parameters(config: PreTrainedConfig) -> int:
    """Return the number of a model's parameters; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def estimate_step_memory(config: PreTrainedConfig, setup: StepSetup) -> MemoryEstimate:
    """Return the memory of one training step in the steady state (optimiser state allocated).

    Args:
        config: of the model, as `load_config` returns it.
        setup: batch, types, adapter, optimiser.
    """
    model = meta_model(config, setup)
    with FakeTensorMode(allow_non_fake_inputs=True):
        place_on_fake_cpu(model)
        parameters = list(dict.fromkeys(model.parameters()))
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        frozen_linear = _quantized_weights(model) if setup.quantization else set()
        peak = run_step(model, setup)
        return MemoryEstimate(
            num_parameters=sum(parameter.numel() for parameter in parameters),
            num_trainable=sum(parameter.numel() for parameter in trainable),
            weights=sum(_weight_bytes(parameter, setup, parameter in frozen_linear) for parameter in parameters),
            optimizer_state=optimizer_state_bytes(setup.optim, trainable),
            gradients=sum(map(_num_bytes, trainable)),
            peak=peak,
            optimizer_update=_update_bytes(setup, trainable),
        )


def _quantized_weights(model: nn.Module) -> set[Tensor]:
    """Weights that bitsandbytes replaces: those of all linear layers but the LM head and the adapter."""
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name and not module.weight.requires_grad
    }


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weight_bytes(parameter: nn.Parameter, setup: StepSetup, is_quantized: bool) -> int:
    if not is_quantized:
        return _num_bytes(parameter)
    if setup.quantization == "8bit":  # and a float32 scale a row
        return parameter.numel() + 4 * parameter.shape[0]
    return int(parameter.numel() * _BYTES_4BIT[setup.double_quantization])


def optimizer_state_bytes(optim: str, trainable: list[nn.Parameter]) -> int | None:
    """Return the bytes of an optimiser's state, or None where it is not known.

    Args:
        optim: transformers' name of the optimiser.
        trainable: its parameters.
    """
    if optim == "adafactor":  # second moments by row and by column of a matrix
        return sum(4 * (sum(p.shape[-2:]) if p.dim() > 1 else p.numel()) for p in trainable)
    if optim not in _OPTIMIZER_STATES:
        return None
    count, size = _OPTIMIZER_STATES[optim]
    total = 0.0
    for parameter in trainable:
        own = parameter.element_size() if size is None else size
        if own < 2 and parameter.numel() < _MIN_8BIT_SIZE:
            own = 4
        total += count * parameter.numel() * own
    return int(total)


def _update_bytes(setup: StepSetup, trainable: list[nn.Parameter]) -> int:
    """Temporary tensors of torch's unfused optimisers: like all parameters with `foreach`, else like three at most.

    The three are two of a parameter and one that is left of the one before. Fused kernels and those of bitsandbytes
    work in place.
    """
    if setup.optim not in _UPDATE_COPIES or not trainable:
        return 0
    if setup.on_accelerator:
        return _UPDATE_COPIES[setup.optim] * sum(map(_num_bytes, trainable))
    return 3 * max(map(_num_bytes, trainable))
