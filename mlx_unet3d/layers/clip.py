"""The transformer that CLIP's text and image encoders share.

Source: Radford et al., arXiv:2103.00020; names are those of transformers' `CLIPEncoder`. Letters: B batch,
L tokens or patches, E channels, H W pixels, C channels of an image, p pixels of a patch each way.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .. import operations
from ..operations import one_operation
from .normalization import LayerNorm

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": one_operation(nn.gelu),  # exact, by erf
    "quick_gelu": one_operation(nn.gelu_fast_approx),  # x * sigmoid(1.702 x)
}
"""By the names of `hidden_act`: OpenCLIP's and OpenAI's."""


class CLIPAttention(nn.Module):
    """Multi-head self-attention; with `causal`, a token sees only itself and the tokens before it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        # In transformers' order, on which files of unnamed adapters depend.
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.mask = "causal" if causal else None

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, E) -> (B, L, E)."""
        batch, length, width = x.shape
        query, key, value = (
            # (B, L, E) -> (B, heads, L, E / heads)
            proj(x).reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = operations.attention(query, key, value, scale=self.scale, mask=self.mask)
        # (B, heads, L, E / heads) -> (B, L, E)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(batch, length, width))


class CLIPMLP(nn.Module):
    """Two linears with the activation between."""

    def __init__(self, width: int, inner: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.act = ACTIVATIONS[act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a skip."""

    def __init__(self, width: int, heads: int, inner: int, act: str, eps: float, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.self_attn = CLIPAttention(width, heads, causal)
        self.layer_norm2 = LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(width, inner, act)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """A stack of `layers` layers."""

    def __init__(
        self, layers: int, width: int, heads: int, inner: int, act: str, eps: float, causal: bool
    ) -> None:
        super().__init__()
        self.layers = [CLIPEncoderLayer(width, heads, inner, act, eps, causal) for _ in range(layers)]

    def __call__(self, x: mx.array, num_layers: int | None = None) -> mx.array:
        """(B, L, E) through the first `num_layers` layers, all by default."""
        for layer in self.layers[:num_layers]:
            x = layer(x)
        return x

    def hidden_states(self, x: mx.array) -> tuple[mx.array, ...]:
        """Return the input (B, L, E) and the output of each layer."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class PatchEmbedding(nn.Conv2d):
    """A convolution without bias whose stride equals its kernel, computed as one product per patch.

    Pixels beyond the last complete patch are left out.
    """

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__(in_channels, width, patch, stride=patch, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H // p, W // p, E)."""
        batch, height, width, channels = x.shape
        p = self.stride[0]
        rows, columns = height // p, width // p
        x = x[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
        return x @ self.weight.reshape(self.weight.shape[0], -1).T
