"""Chains of element-wise operations, one kernel each: every saved pass over an activation saves time.

On a GPU they are bound by memory bandwidth.
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
