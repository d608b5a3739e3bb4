"""Activation functions by diffusers' names."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .. import cpu
from ..operations import one_operation
from . import fused

_silu, _gelu = map(one_operation, (nn.silu, nn.gelu))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return cpu.silu(x) if cpu.active(x) else _silu(x)


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), exact, by erf."""
    return cpu.gelu(x) if cpu.active(x) else _gelu(x)


def geglu(value: mx.array, gate: mx.array) -> mx.array:
    """value * gelu(gate)."""
    return value * cpu.gelu(gate) if cpu.active(gate) else fused.geglu(value, gate)


class SiLU(nn.Module):
    """`silu` as a layer without parameters."""

    def __call__(self, x: mx.array) -> mx.array:
        return silu(x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": silu,
    "swish": silu,
    "mish": one_operation(nn.mish),
    "gelu": gelu,
    "relu": one_operation(nn.relu),
}


def get_activation(name: str) -> Callable[[mx.array], mx.array]:
    """Return the activation by diffusers' name, in any case; ValueError for unknown names."""
    try:
        return ACTIVATIONS[name.lower()]
    except KeyError:
        raise ValueError(f"act_fn={name!r} is not known; use one of {sorted(ACTIVATIONS)}") from None
