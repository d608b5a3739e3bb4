"""The projections of IP-Adapters: embeddings of images -> context tokens for cross-attention.

Source: diffusers' classes of the same names in `models/embeddings.py`; arXiv:2308.06721. Letters: B batch, n
images of a sample, M rows (B*n), L tokens of an image encoder, C their channels, T tokens made, D their
channels.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .attention import Attention
from .feed_forward import FeedForward
from .normalization import LayerNorm


class _Projection(nn.Module):
    """The base of the projections.

    Attributes:
        channels: C.
        axes: names of the axes of one image's embeddings, except the channels.
    """

    axes: tuple[str, ...] = ()
    channels: int

    @property
    def dtype(self) -> mx.Dtype:
        return tree_flatten(self.parameters())[0][1].dtype


class ImageProjection(_Projection):
    """One embedding of an image -> T tokens, (M, C) -> (M, T, D), by a linear layer and a norm."""

    def __init__(
        self, image_embed_dim: int = 768, cross_attention_dim: int = 768, num_image_text_embeds: int = 32
    ):
        super().__init__()
        self.image_embeds = nn.Linear(image_embed_dim, num_image_text_embeds * cross_attention_dim)
        self.norm = LayerNorm(cross_attention_dim)
        self.num_image_text_embeds = num_image_text_embeds
        self.channels = image_embed_dim

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.image_embeds(x).reshape(x.shape[0], self.num_image_text_embeds, -1))


class IPAdapterFullImageProjection(_Projection):
    """Each token of an image encoder -> one token, (M, L, C) -> (M, L, D), by a feed-forward and a norm."""

    axes = ("tokens",)

    def __init__(self, image_embed_dim: int = 1024, cross_attention_dim: int = 1024):
        super().__init__()
        self.ff = FeedForward(
            image_embed_dim, activation="gelu", dim_out=cross_attention_dim, inner=image_embed_dim
        )
        self.norm = LayerNorm(cross_attention_dim)
        self.channels = image_embed_dim

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.ff(x))


class IPAdapterFaceIDImageProjection(_Projection):
    """One embedding of a face -> T tokens, (M, C) -> (M, T, D), by a feed-forward and a norm."""

    def __init__(
        self,
        image_embed_dim: int = 1024,
        cross_attention_dim: int = 1024,
        mult: int = 1,
        num_tokens: int = 1,
    ):
        super().__init__()
        self.ff = FeedForward(
            image_embed_dim,
            activation="gelu",
            dim_out=num_tokens * cross_attention_dim,
            inner=mult * image_embed_dim,
        )
        self.norm = LayerNorm(cross_attention_dim)
        self.num_tokens = num_tokens
        self.channels = image_embed_dim

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.ff(x).reshape(x.shape[0], self.num_tokens, -1))


class IPAdapterPlusImageProjectionBlock(nn.Module):
    """Attention of latents to an image and themselves, and a feed-forward, each around a skip."""

    def __init__(self, embed_dims: int = 768, dim_head: int = 64, heads: int = 16, ffn_ratio: float = 4):
        super().__init__()
        self.ln0 = LayerNorm(embed_dims)
        self.ln1 = LayerNorm(embed_dims)
        self.attn = Attention(embed_dims, heads=heads, dim_head=dim_head, out_bias=False)
        inner = int(ffn_ratio * embed_dims)
        self.ff = [
            LayerNorm(embed_dims),
            FeedForward(embed_dims, activation="gelu", inner=inner, bias=False),
        ]

    def __call__(self, x: mx.array, latents: mx.array) -> mx.array:
        """(M, L, C), (M, T, C) -> (M, T, C)."""
        own = self.ln1(latents)
        latents = latents + self.attn(own, mx.concatenate([self.ln0(x), own], axis=1))
        norm, ff = self.ff
        return latents + ff(norm(latents))


class IPAdapterPlusImageProjection(_Projection):
    """All tokens of an image encoder -> T tokens, (M, L, C) -> (M, T, D), by learned latents that attend to
    them: a perceiver resampler.

    Args:
        embed_dims, output_dims: C and D.
        hidden_dims, depth, dim_head, heads, ffn_ratio: channels and number of the blocks, their heads, and
            the width of their feed-forwards over `hidden_dims`.
        num_queries: T.
    """

    axes = ("tokens",)

    def __init__(
        self,
        embed_dims: int = 768,
        output_dims: int = 1024,
        hidden_dims: int = 1280,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 16,
        num_queries: int = 8,
        ffn_ratio: float = 4,
    ):
        super().__init__()
        self.latents = mx.random.normal((1, num_queries, hidden_dims), scale=hidden_dims**-0.5)
        self.proj_in = nn.Linear(embed_dims, hidden_dims)
        self.proj_out = nn.Linear(hidden_dims, output_dims)
        self.norm_out = LayerNorm(output_dims)
        self.layers = [
            IPAdapterPlusImageProjectionBlock(hidden_dims, dim_head, heads, ffn_ratio) for _ in range(depth)
        ]
        self.channels = embed_dims

    def __call__(self, x: mx.array) -> mx.array:
        latents = mx.repeat(self.latents, x.shape[0], axis=0)
        x = self.proj_in(x)
        for block in self.layers:
            latents = block(x, latents)
        return self.norm_out(self.proj_out(latents))


class MultiIPAdapterImageProjection(nn.Module):
    """The projections of several IP-Adapters, each for its own images."""

    def __init__(self, projections: Sequence[nn.Module]):
        super().__init__()
        self.image_projection_layers = list(projections)

    @property
    def num_ip_adapters(self) -> int:
        """The number of IP-Adapters."""
        return len(self.image_projection_layers)

    def check(self, image_embeds: mx.array | Sequence[mx.array], batch: int) -> None:
        """Raise ValueError unless each adapter has images for the batch, in the shape that it takes."""
        embeds = _as_list(image_embeds)
        if len(embeds) != self.num_ip_adapters:
            raise ValueError(
                f"image_embeds has {len(embeds)} entries for {self.num_ip_adapters} IP-Adapters; give a list "
                "with one array for each"
            )
        for i, (x, layer) in enumerate(zip(embeds, self.image_projection_layers, strict=True)):
            matches = x.ndim == 3 + len(layer.axes) and x.shape[0] == batch and x.shape[-1] == layer.channels
            if not matches or 0 in x.shape:
                axes = ", ".join((str(batch), "images", *layer.axes, str(layer.channels)))
                raise ValueError(
                    f"image_embeds[{i}] has shape {tuple(x.shape)}; it must be ({axes}) for the "
                    f"{type(layer).__name__} of this IP-Adapter"
                )

    def __call__(self, image_embeds: mx.array | Sequence[mx.array]) -> list[mx.array]:
        """(B, n, C) or (B, n, L, C) for each adapter -> (B, n*T, D) each; a single array (B, ...) has one
        image a sample."""
        made = []
        for x, project in zip(_as_list(image_embeds), self.image_projection_layers, strict=True):
            rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            tokens = project(rows.astype(project.dtype))
            made.append(tokens.reshape(x.shape[0], -1, tokens.shape[-1]))
        return made


def _as_list(image_embeds: mx.array | Sequence[mx.array]) -> Sequence[mx.array]:
    return [image_embeds[:, None]] if isinstance(image_embeds, mx.array) else image_embeds
