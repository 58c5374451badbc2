"""Counter-based noise: uniform numbers that are a pure function of integer keys.

A generator with state gives other numbers when the batch size, the number of processes or the point of a resume
changes. Here every number is a hash of its keys (seed, stream, epoch, row, position, ...), so the same row gets the
same noise wherever and whenever it is processed, and CPU and GPU agree to the bit.

The hash chains the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) over the keys.
"""

from enum import IntEnum, unique

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB
_WORD = 0xFFFFFFFFFFFFFFFF


@unique
class NoiseStream(IntEnum):
    """First key after the seed: keeps the uses of noise independent of each other."""

    TIMESTEP_ORDER = 0
    TIMESTEP = 1
    MASK = 2
    SAMPLER = 3
    EVALUATION_TIMESTEP = 4
    EVALUATION_MASK = 5
    RANDOM_LENGTH_CHOICE = 6
    RANDOM_LENGTH = 7
    PROMPT_DROPOUT = 8
    PROMPT_NOISING = 9
    RIGHT_CONTEXT = 10


def _as_int64(value: int) -> int:
    """The signed 64-bit integer with the same bits as `value` modulo 2**64."""
    value &= _WORD
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _add(left: int | Tensor, right: int | Tensor) -> int | Tensor:
    """Sum modulo 2**64; a tensor if one of the two is."""
    if isinstance(left, int) and isinstance(right, int):
        return (left + right) & _WORD
    return (_as_int64(left) if isinstance(left, int) else left) + (
        _as_int64(right) if isinstance(right, int) else right
    )


def _mix(bits: int | Tensor) -> int | Tensor:
    """The finaliser of SplitMix64, in Python's integers or elementwise in int64 (whose products wrap)."""
    if isinstance(bits, int):
        bits = (bits ^ (bits >> 30)) * _FIRST_MULTIPLIER & _WORD
        bits = (bits ^ (bits >> 27)) * _SECOND_MULTIPLIER & _WORD
        return bits ^ (bits >> 31)
    bits = (bits ^ _shift_right(bits, 30)) * _as_int64(_FIRST_MULTIPLIER)
    bits = (bits ^ _shift_right(bits, 27)) * _as_int64(_SECOND_MULTIPLIER)
    return bits ^ _shift_right(bits, 31)


def counter_uniform(seed: int, stream: int, *keys: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits, one for each combination of keys.

    Args:
        seed: run seed.
        stream: a `NoiseStream`.
        keys: integers or int64 tensors, which broadcast against each other; the order of keys matters.
        device: where the result is made; by default that of the first tensor key.

    Returns:
        float64 tensor of the broadcast shape of `keys`.
    """
    if device is None:
        device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    # integers are hashed in Python and enter kernels as scalars: copying them to a GPU would synchronise it
    state: int | Tensor = 0
    for key in (seed, stream, *keys):
        part = key.to(device=device, dtype=torch.int64) if isinstance(key, Tensor) else int(key)
        state = _mix(_add(_add(state, _GOLDEN_GAMMA), _mix(_add(part, _GOLDEN_GAMMA))))
    if isinstance(state, int):
        state = torch.full((), _as_int64(state), dtype=torch.int64, device=device)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53
