"""Chains of element-wise operations as one kernel each: every pass over an activation saved is time saved.

On a GPU these are bound by memory; what they take is what they read and write.
"""

import mlx.core as mx
import mlx.nn as nn

from ..operations import one_operation


@one_operation
@mx.compile
def affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """x * weight + bias."""
    return x * weight + bias


@one_operation
@mx.compile
def affine_silu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """silu(x * weight + bias)."""
    return nn.silu(x * weight + bias)


@one_operation
@mx.compile
def add(x: mx.array, y: mx.array, bias: mx.array) -> mx.array:
    """x + y + bias."""
    return x + (y + bias)


@one_operation
@mx.compile
def geglu(value: mx.array, gate: mx.array) -> mx.array:
    """value * gelu(gate)."""
    return value * nn.gelu(gate)


@one_operation
@mx.compile
def blend(x: mx.array, y: mx.array, alpha: mx.array) -> mx.array:
    """alpha * x + (1 - alpha) * y."""
    return alpha * x + (1 - alpha) * y
