"""Activation functions by diffusers' names."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": nn.mish,
    "gelu": nn.gelu,  # the exact one, by erf
    "relu": nn.relu,
}


def get_activation(name: str) -> Callable[[mx.array], mx.array]:
    """The activation that diffusers calls `name`, in any case; ValueError for any other name."""
    try:
        return ACTIVATIONS[name.lower()]
    except KeyError:
        raise ValueError(f"act_fn={name!r} is not known; use one of {sorted(ACTIVATIONS)}") from None
