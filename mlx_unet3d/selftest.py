"""A one-second numeric self-test of the machine: each operation against a plain computation in fp32.

A wrong MLX build or driver shows here before it shows as a black video.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

# Largest error over the largest value that is still rounding. On GPUs fp32 may run as TF32, and fp16
# 3x3 convolutions through Winograd, which stores intermediates in fp16.
_LIMITS = {mx.float32: 1e-2, mx.float16: 1e-1}


@dataclass(frozen=True)
class Check:
    """An operation in a dtype: its largest error relative to the largest value, and whether that will do."""

    name: str
    dtype: str
    error: float
    passed: bool


def _normal(seed: int, shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _attention(dtype: mx.Dtype, dim: int) -> tuple[mx.array, mx.array]:
    q, k, v = (_normal(i, (1, 4, 64, dim)).astype(dtype) for i in range(3))
    pad = [(0, 0)] * 3 + [(0, -dim % 64)]
    fused = mx.fast.scaled_dot_product_attention(
        *(mx.pad(x, pad) for x in (q, k, v)), scale=1 / math.sqrt(dim)
    )[..., :dim]
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    return fused, mx.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(dim), axis=-1) @ v


def _conv_3x3(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    # Large enough for MLX's Winograd kernel on Metal; the flipped form takes another one.
    x = _normal(0, (1, 64, 64, 128)).astype(dtype)
    w = (_normal(1, (128, 3, 3, 128)) / 34).astype(dtype)
    plain = mx.conv2d(x, w, padding=1)
    flipped = mx.contiguous(w[:, ::-1, ::-1, :])
    other = mx.conv_general(x.astype(mx.float32), flipped.astype(mx.float32), padding=1, flip=True)
    return plain, other


def _temporal_conv(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    x = _normal(0, (2, 8, 64, 64)).astype(dtype)
    w = (_normal(1, (64, 3, 1, 64)) / 14).astype(dtype)
    conv = mx.conv2d(x, w, padding=(1, 0))
    padded = mx.pad(x.astype(mx.float32), [(0, 0), (1, 1), (0, 0), (0, 0)])
    taps = [padded[:, i : i + 8] @ w[:, i, 0].astype(mx.float32).T for i in range(3)]
    return conv, taps[0] + taps[1] + taps[2]


def _group_norm(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    x = (20 * _normal(0, (2, 1024, 64)) + 5).astype(dtype)
    norm = nn.GroupNorm(8, 64, pytorch_compatible=True)
    norm.set_dtype(dtype)
    wide = x.astype(mx.float32).reshape(2, 1024, 8, 8)
    mean = wide.mean(axis=(1, 3), keepdims=True)
    variance = (wide - mean).square().mean(axis=(1, 3), keepdims=True)
    return norm(x), ((wide - mean) * mx.rsqrt(variance + 1e-5)).reshape(x.shape)


OPERATIONS: dict[str, Callable[[mx.Dtype], tuple[mx.array, mx.array]]] = {
    "attention, head dim 64": lambda dtype: _attention(dtype, 64),
    "attention, head dim 40 padded to 64": lambda dtype: _attention(dtype, 40),
    "3x3 convolution": _conv_3x3,
    "temporal convolution": _temporal_conv,
    "group norm": _group_norm,
}


def run_self_test(dtypes: tuple[mx.Dtype, ...] = (mx.float32, mx.float16)) -> list[Check]:
    """Run all operations in all dtypes on the default device, by fixed random keys."""
    checks = []
    for dtype in dtypes:
        for name, operation in OPERATIONS.items():
            result, expected = (x.astype(mx.float32) for x in operation(dtype))
            error = (mx.abs(result - expected).max() / mx.abs(expected).max()).item()
            mx.synchronize()
            # An error of NaN is a failure too.
            checks.append(Check(name, str(dtype).removeprefix("mlx.core."), error, error <= _LIMITS[dtype]))
    return checks
