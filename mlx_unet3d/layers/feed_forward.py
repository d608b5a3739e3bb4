"""Feed-forward layers of a transformer block."""

import mlx.core as mx
import mlx.nn as nn

from .. import cpu
from .activations import geglu, gelu


class GEGLU(nn.Module):
    """Linear to twice the width, one half gating the other through GELU (arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.proj(x), 2, axis=-1)
        return geglu(value, gate)


class GELU(nn.Module):
    """Linear and the exact GELU; diffusers' class of that name."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(self.proj(x))


_ACTIVATIONS = {"geglu": GEGLU, "gelu": GELU}


class FeedForward(nn.Module):
    """An activation at four times the width, "geglu" or "gelu", and a linear back; diffusers' class."""

    def __init__(self, dim: int, dropout: float = 0.0, activation: str = "geglu"):
        super().__init__()
        self.net = [_ACTIVATIONS[activation](dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)]

    def __call__(self, x: mx.array) -> mx.array:
        # Unlike a GPU, the CPU gains by keeping what lies between the products in its cache.
        rows = max(512, 2 * cpu.PIECE // (8 * x.shape[-1])) if cpu.active(x) else x.size
        return cpu.in_rows(self._all, x, rows)

    def _all(self, x: mx.array) -> mx.array:
        for layer in self.net:
            x = layer(x)
        return x
