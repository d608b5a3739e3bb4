"""Feed-forward layers of a transformer block."""

import mlx.core as mx
import mlx.nn as nn

from .. import cpu
from .activations import geglu, gelu


class GEGLU(nn.Module):
    """A linear layer to twice the width, half of which gates the other half through GELU
    (arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.proj(x), 2, axis=-1)
        return geglu(value, gate)


class GELU(nn.Module):
    """A linear layer and the exact GELU; diffusers' class of that name."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(self.proj(x))


_ACTIVATIONS = {"geglu": GEGLU, "gelu": GELU}


class FeedForward(nn.Module):
    """An activation at another width, "geglu" or "gelu", and a linear layer; diffusers' class of that name.

    Args:
        dim: channels of the input.
        dim_out: of the output; None for `dim`.
        inner: of the activation; None for four times `dim`.
        bias: of both linears.
    """

    def __init__(
        self,
        dim: int,
        dropout: float = 0.0,
        activation: str = "geglu",
        *,
        dim_out: int | None = None,
        inner: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        inner = 4 * dim if inner is None else inner
        last = nn.Linear(inner, dim if dim_out is None else dim_out, bias=bias)
        self.net = [_ACTIVATIONS[activation](dim, inner, bias), nn.Dropout(dropout), last]

    def __call__(self, x: mx.array) -> mx.array:
        # Unlike a GPU, the CPU gains by keeping the activations between both products in its cache.
        rows = max(512, 2 * cpu.PIECE // (8 * x.shape[-1])) if cpu.active(x) else x.size
        return cpu.in_rows(self._all, x, rows)

    def _all(self, x: mx.array) -> mx.array:
        for layer in self.net:
            x = layer(x)
        return x
