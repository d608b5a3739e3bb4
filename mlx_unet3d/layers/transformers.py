"""Transformers over the pixels of a frame and over the frames of a pixel.

Sources: diffusers' `Transformer2DModel` and `TransformerTemporalModel` with linear projections, as
UNet3DConditionModel uses them. Letters as in `resnet`.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .feed_forward import FeedForward
from .normalization import group_norm
from .slicing import (
    WHOLE,
    Slicing,
    by_frames_of_samples,
    by_pixels,
    evaluate,
    group_norm_of_parts,
    in_sequence,
)
from .text_context import TextContext


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and around a skip.

    `cross_attention_dim` None with `double_self_attention`: the second attention looks at the input as
    well; without: there is no second attention. diffusers' class of that name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        cross_attention_dim: int | None = None,
        double_self_attention: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, None, heads, dim_head)
        if cross_attention_dim is not None or double_self_attention:
            self.norm2 = nn.LayerNorm(dim)
            context_dim = None if double_self_attention else cross_attention_dim
            self.attn2 = Attention(dim, context_dim, heads, dim_head)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.chunk_size: int | None = None
        self.chunk_dim = 0

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Run the feed-forward on pieces of `chunk_size` along axis `dim`; None for all at once."""
        self.chunk_size, self.chunk_dim = chunk_size, dim

    def __call__(
        self,
        x: mx.array,
        context: mx.array | TextContext | None = None,
        context_mask: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        blockwise: bool = False,
    ) -> mx.array:
        """(N, S, C) and a context (B, L, D) with B dividing N -> (N, S, C).

        `context_mask` (B, 1, L) is added to the scores of the second attention; `blockwise` evaluates after
        each attention.
        """
        keywords = cross_attention_kwargs or {}
        x = x + self.attn1(self.norm1(x), **keywords)
        if blockwise:
            evaluate(x)
        if "attn2" in self:
            x = x + self._second_attention(self.norm2(x), context, context_mask, keywords)
        if blockwise:
            evaluate(x)
        return x + self._feed_forward(self.norm3(x))

    def _second_attention(
        self,
        x: mx.array,
        context: mx.array | TextContext | None,
        context_mask: mx.array | None,
        keywords: dict[str, Any],
    ) -> mx.array:
        if context is None or not self.attn2.is_cross_attention:
            return self.attn2(x, **keywords)
        states = context.states if isinstance(context, TextContext) else context
        # (N, S, C) -> (B, F*S, C): all frames of a sample ask the same keys
        query = x.reshape(states.shape[0], -1, x.shape[-1])
        return self.attn2(query, context, context_mask, **keywords).reshape(x.shape)

    def _feed_forward(self, x: mx.array) -> mx.array:
        if self.chunk_size is None:
            return self.ff(x)
        length = x.shape[self.chunk_dim]
        if length % self.chunk_size:
            raise ValueError(
                f"forward chunking: axis {self.chunk_dim} has {length} entries here, not a multiple of "
                f"chunk_size={self.chunk_size}; call enable_forward_chunking with a divisor of it"
            )
        pieces = mx.split(x, length // self.chunk_size, axis=self.chunk_dim)
        return mx.concatenate(in_sequence(self.ff, ([p] for p in pieces)), axis=self.chunk_dim)


class Transformer2DModel(nn.Module):
    """Attention among the pixels of each frame and from them to the text.

    Args:
        heads, dim_head: the inner width is their product; it may differ from `channels`.
        channels: of the input and output.
        cross_attention_dim: channels of the text; None for self-attention only.
        norm_num_groups: groups of the norm in front (eps 1e-6).
    """

    def __init__(
        self,
        heads: int,
        dim_head: int,
        channels: int,
        cross_attention_dim: int | None = None,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        inner = heads * dim_head
        self.norm = group_norm(norm_num_groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = [BasicTransformerBlock(inner, heads, dim_head, cross_attention_dim)]
        self.proj_out = nn.Linear(inner, channels)

    def __call__(
        self,
        x: mx.array,
        context: mx.array | TextContext | None = None,
        context_mask: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        slicing: Slicing = WHOLE,
    ) -> mx.array:
        """(N, H, W, C), a context (B, L, D) with B dividing N, its mask (B, 1, L) -> (N, H, W, C).

        `slicing` says how many frames are taken at a time.
        """
        if slicing.frames is not None:
            return self._by_frames(x, context, context_mask, cross_attention_kwargs, slicing.frames)
        n, height, width, channels = x.shape
        # (N, H, W, C) -> (N, H*W, C)
        h = self.proj_in(self.norm(x).reshape(n, height * width, channels))
        for block in self.transformer_blocks:
            h = block(h, context, context_mask, cross_attention_kwargs, slicing.blockwise)
        return x + self.proj_out(h).reshape(x.shape)

    def _by_frames(
        self,
        x: mx.array,
        context: mx.array | TextContext | None,
        context_mask: mx.array | None,
        cross_attention_kwargs: dict[str, Any] | None,
        frames: int,
    ) -> mx.array:
        if isinstance(context, mx.array):
            context = TextContext(context)

        def of_sample(i: int, piece: mx.array) -> mx.array:
            own = None if context is None else context.of_sample(i)
            mask = None if context_mask is None else context_mask[i : i + 1]
            return self(piece, own, mask, cross_attention_kwargs)

        batch = 1 if context is None else context.states.shape[0]
        return by_frames_of_samples(of_sample, [x], batch, frames)


class TransformerTemporalModel(nn.Module):
    """Attention among the frames of each pixel, twice; it knows no frame order.

    The statistics of the norm in front (eps 1e-6) run over all frames and pixels of a sample.
    """

    def __init__(self, heads: int, dim_head: int, channels: int, norm_num_groups: int = 32):
        super().__init__()
        inner = heads * dim_head
        self.norm = group_norm(norm_num_groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = [BasicTransformerBlock(inner, heads, dim_head, double_self_attention=True)]
        self.proj_out = nn.Linear(inner, channels)

    def __call__(
        self,
        x: mx.array,
        num_frames: int,
        cross_attention_kwargs: dict[str, Any] | None = None,
        slicing: Slicing = WHOLE,
    ) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C). `slicing` says how many pixels are taken at a time."""
        if slicing.pixels is not None:
            return self._by_pixels(x, num_frames, cross_attention_kwargs, slicing.pixels)
        n, height, width, channels = x.shape
        batch, pixels = n // num_frames, height * width
        # (N, H, W, C) -> (B, F, L, C) -> (B, L, F, C) -> (B*L, F, C)
        h = self.norm(x.reshape(batch, num_frames, pixels, channels), swap=True)
        h = self.proj_in(h.reshape(batch * pixels, num_frames, channels))
        for block in self.transformer_blocks:
            h = block(h, None, None, cross_attention_kwargs, slicing.blockwise)
        # (B*L, F, C) -> (B, L, F, C) -> (N, H, W, C)
        h = self.proj_out(h).reshape(batch, pixels, num_frames, channels)
        # Added in the order of x: the sum is the copy that turning h round would take.
        return (x.reshape(batch, num_frames, pixels, channels) + h.transpose(0, 2, 1, 3)).reshape(x.shape)

    def _by_pixels(
        self,
        x: mx.array,
        num_frames: int,
        cross_attention_kwargs: dict[str, Any] | None,
        pixels: int,
    ) -> mx.array:
        # (N, H, W, C) -> (B, F, L, C)
        video = x.reshape(-1, num_frames, x.shape[1] * x.shape[2], x.shape[3])
        norm = group_norm_of_parts(self.norm, video)

        def of_pixels(piece: mx.array) -> mx.array:
            batch, _, length, channels = piece.shape
            # (B, F, L, C) -> (B*L, F, C)
            h = norm(piece).transpose(0, 2, 1, 3).reshape(batch * length, num_frames, channels)
            h = self.proj_in(h)
            for block in self.transformer_blocks:
                h = block(h, cross_attention_kwargs=cross_attention_kwargs)
            # (B*L, F, C) -> (B, F, L, C)
            h = self.proj_out(h).reshape(batch, length, num_frames, channels)
            return piece + h.transpose(0, 2, 1, 3)

        return by_pixels(of_pixels, [video], pixels).reshape(x.shape)
