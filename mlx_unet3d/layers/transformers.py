"""Transformers over the pixels of a frame and over the frames of a pixel.

Letters as in `resnet`: N = B*F, L = H*W; S tokens of a row, K channels inside. Sources: diffusers'
`attention.py`, `transformers/transformer_2d.py`, `transformer_temporal.py`, and `unets/unet_motion_model.py`.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .attention import Attention
from .chunking import by_pixels, group_norm_of_parts, in_sequence
from .conditions import Conditions, by_frames
from .embeddings import TimestepEmbedding, timestep_sinusoid
from .feed_forward import FeedForward
from .normalization import LayerNorm, group_norm
from .resnet import PointwiseConv2d
from .temporal import AlphaBlender


class SinusoidalPositionalEmbedding(nn.Module):
    """Sines and cosines of positions, interleaved, added to a sequence; diffusers' class of that name.

    The table `pe` (1, positions, K) is a constant, but part of checkpoints.
    """

    def __init__(self, embed_dim: int, max_seq_length: int = 32):
        super().__init__()
        frequencies = np.exp(np.arange(0, embed_dim, 2) * (-math.log(10_000.0) / embed_dim))
        angles = np.arange(max_seq_length)[:, None] * frequencies
        table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(max_seq_length, -1)
        self.pe = mx.array(table[None, :, :embed_dim].astype(np.float32))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """(N, S, K) -> (N, S, K). Raise ValueError for more tokens than positions."""
        length, most = x.shape[1], self.pe.shape[1]
        if length > most:
            raise ValueError(
                f"num_frames={length} exceeds the motion module's {most} positions; use num_frames <= "
                f"{most}, or run longer videos in windows of so many frames"
            )
        return x + mx.stop_gradient(self.pe[:, :length]).astype(x.dtype)


class BasicTransformerBlock(nn.Module):
    """Self-attention, a second attention and a feed-forward, each after a LayerNorm and around a skip.

    diffusers' class of that name.

    Args:
        dim: K, channels.
        heads, dim_head: of both attentions.
        cross_attention_dim: channels of the context of the second attention; None for none.
        double_self_attention: make the second attention a self-attention. Without it and without
            `cross_attention_dim` there is no second attention.
        num_positions: length of a table of positions, added to the input of both attentions; None for none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        cross_attention_dim: int | None = None,
        double_self_attention: bool = False,
        num_positions: int | None = None,
    ):
        super().__init__()
        if num_positions is not None:
            self.pos_embed = SinusoidalPositionalEmbedding(dim, num_positions)
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, None, heads, dim_head)
        if cross_attention_dim is not None or double_self_attention:
            self.norm2 = LayerNorm(dim)
            context_dim = None if double_self_attention else cross_attention_dim
            self.attn2 = Attention(dim, context_dim, heads, dim_head)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.chunk_size: int | None = None
        self.chunk_dim = 0

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Run the feed-forward on chunks of `chunk_size` along axis `dim`; None for all at once."""
        self.chunk_size, self.chunk_dim = chunk_size, dim

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, S, K) -> (N, S, K); the number of rows of `cond.context` divides N."""
        if cond.free_noise is not None and "pos_embed" in self:
            x = cond.free_noise.average(lambda window: self._add_attentions(window, cond), x)
        else:
            x = self._add_attentions(x, cond)
        return x + self._in_chunks(self.ff, self.norm3(x))

    def _add_attentions(self, x: mx.array, cond: Conditions) -> mx.array:
        keywords = cond.cross_attention_kwargs or {}
        x = x + self.attn1(self._placed(self.norm1(x)), attention_mask=self._pixel_mask(cond), **keywords)
        return self._add_second_attention(x, cond) if "attn2" in self else x

    def _placed(self, x: mx.array) -> mx.array:
        return self.pos_embed(x) if "pos_embed" in self else x

    def _pixel_mask(self, cond: Conditions) -> mx.array | None:
        spatial = "attn2" in self and self.attn2.is_cross_attention
        return cond.pixel_mask if spatial else None

    def _add_second_attention(self, x: mx.array, cond: Conditions) -> mx.array:
        attn, keywords = self.attn2, cond.cross_attention_kwargs or {}
        if cond.context is None or not attn.is_cross_attention:
            return x + attn(self._placed(self.norm2(x)), **keywords)
        states = cond.context_states
        if states.shape[1] == 1 and cond.context_mask is None and attn.one_token_is_linear:
            # The softmax over one key is 1, so that all queries get the same row (B, 1, K).
            y = attn.of_one_token(cond.context)
            # (N, S, K) -> (B, F*S, K) and back
            return (x.reshape(y.shape[0], -1, x.shape[-1]) + y).reshape(x.shape)
        # (N, S, K) -> (B, F*S, K): all rows of a sample share the same keys
        query = self._placed(self.norm2(x)).reshape(states.shape[0], -1, x.shape[-1])
        return x + attn(query, cond.context, cond.context_mask, **keywords).reshape(x.shape)

    def _in_chunks(self, ff: FeedForward, x: mx.array) -> mx.array:
        if self.chunk_size is None:
            return ff(x)
        length = x.shape[self.chunk_dim]
        if length % self.chunk_size:
            raise ValueError(
                f"forward chunking: axis {self.chunk_dim} has {length} entries here, not a multiple of "
                f"chunk_size={self.chunk_size}; call enable_forward_chunking with a divisor of it"
            )
        chunks = mx.split(x, length // self.chunk_size, axis=self.chunk_dim)
        return mx.concatenate(in_sequence(ff, ([c] for c in chunks)), axis=self.chunk_dim)


class TemporalBasicTransformerBlock(BasicTransformerBlock):
    """`BasicTransformerBlock` after another feed-forward; diffusers' class of that name.

    Forward chunking always divides the frames, axis 1, as in diffusers.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, cross_attention_dim: int | None = None):
        super().__init__(dim, heads, dim_head, cross_attention_dim)
        self.norm_in = LayerNorm(dim)
        self.ff_in = FeedForward(dim)

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 1) -> None:
        """Run the feed-forwards on chunks of `chunk_size` frames; None for all at once."""
        super().set_chunk_feed_forward(chunk_size, 1)

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(B*L, F, K) -> (B*L, F, K)."""
        return super().__call__(x + self._in_chunks(self.ff_in, self.norm_in(x)), cond)


class Transformer2DModel(nn.Module):
    """Attention among the pixels of each frame and from them to the text; diffusers' class of that name.

    Args:
        heads, dim_head: the inner width K is their product; it may differ from `channels`.
        channels: of the input and output.
        cross_attention_dim: channels of the text; None for self-attention only.
        norm_num_groups: groups of the first norm (eps 1e-6).
        num_layers: number of transformer blocks.
        use_linear_projection: how files store the projections around the blocks; else as 1x1 convolutions.
    """

    def __init__(
        self,
        heads: int,
        dim_head: int,
        channels: int,
        cross_attention_dim: int | None = None,
        norm_num_groups: int = 32,
        num_layers: int = 1,
        use_linear_projection: bool = True,
    ):
        super().__init__()
        inner = heads * dim_head
        projection = nn.Linear if use_linear_projection else PointwiseConv2d
        self.norm = group_norm(norm_num_groups, channels, 1e-6)
        self.proj_in = projection(channels, inner)
        self.transformer_blocks = [
            BasicTransformerBlock(inner, heads, dim_head, cross_attention_dim) for _ in range(num_layers)
        ]
        self.proj_out = projection(inner, channels)

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C)."""
        return by_frames(self._of_frames, [x], cond)

    def _of_frames(self, x: mx.array, cond: Conditions) -> mx.array:
        n, height, width, channels = x.shape
        # (N, H, W, C) -> (N, L, K)
        h = self.proj_in(self.norm(x).reshape(n, height * width, channels))
        for block in self.transformer_blocks:
            h = block(h, cond)
        return x + self.proj_out(h).reshape(x.shape)


class TransformerTemporalModel(nn.Module):
    """Attention among the frames of each pixel, twice; diffusers' class of that name.

    The norm before it (eps 1e-6) takes statistics over all frames and pixels of a sample. Without positions,
    it ignores the order of frames.

    Args:
        heads, dim_head: the inner width K is their product; it may differ from `channels`.
        channels: of the input and output.
        norm_num_groups: groups of the first norm.
        num_layers: number of transformer blocks.
        num_positions: length of the table of positions, the most frames; None for no positions.
    """

    def __init__(
        self,
        heads: int,
        dim_head: int,
        channels: int,
        norm_num_groups: int = 32,
        num_layers: int = 1,
        num_positions: int | None = None,
    ):
        super().__init__()
        inner = heads * dim_head
        self.norm = group_norm(norm_num_groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = [
            BasicTransformerBlock(
                inner, heads, dim_head, double_self_attention=True, num_positions=num_positions
            )
            for _ in range(num_layers)
        ]
        self.proj_out = nn.Linear(inner, channels)

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C)."""
        frames = cond.num_frames
        # (N, H, W, C) -> (B, F, L, C)
        video = x.reshape(-1, frames, x.shape[1] * x.shape[2], x.shape[3])
        if cond.chunks.pixels is None:
            return self._attend(video, self.norm(video, swap=True), cond).reshape(x.shape)
        norm = group_norm_of_parts(self.norm, video)

        def of_pixels(chunk: mx.array) -> mx.array:
            return self._attend(chunk, norm(chunk).transpose(0, 2, 1, 3), cond)

        return by_pixels(of_pixels, [video], cond.chunks.pixels).reshape(x.shape)

    def _attend(self, video: mx.array, h: mx.array, cond: Conditions) -> mx.array:
        """video (B, F, L, C) and its norm (B, L, F, C) -> (B, F, L, C)."""
        batch, frames, pixels, channels = video.shape
        # (B, L, F, C) -> (B*L, F, K)
        h = self.proj_in(h.reshape(batch * pixels, frames, channels))
        for block in self.transformer_blocks:
            h = block(h, cond)
        h = self.proj_out(h).reshape(batch, pixels, frames, channels)
        # Adding in the order of `video` saves the copy of a transpose.
        return video + h.transpose(0, 2, 1, 3)


class AnimateDiffTransformer3D(TransformerTemporalModel):
    """A motion module of AnimateDiff (arXiv:2307.04725): `TransformerTemporalModel` with positions of frames.

    It starts as the identity: `proj_out` is zero. diffusers' class of that name.
    """

    def __init__(
        self,
        heads: int,
        dim_head: int,
        channels: int,
        norm_num_groups: int = 32,
        num_layers: int = 1,
        num_positions: int = 32,
    ):
        super().__init__(heads, dim_head, channels, norm_num_groups, num_layers, num_positions)
        self.proj_out.weight = mx.zeros_like(self.proj_out.weight)
        self.proj_out.bias = mx.zeros_like(self.proj_out.bias)


class TransformerSpatioTemporalModel(nn.Module):
    """Spatial and temporal transformer blocks in turn, blended; diffusers' class of that name.

    Args:
        heads, dim_head: the inner width is their product and must equal `channels`.
        channels: C, of the input and output; a multiple of 32.
        cross_attention_dim: channels of the context.
        num_layers: number of pairs of blocks.

    Raises ValueError for another inner width.
    """

    def __init__(
        self,
        heads: int,
        dim_head: int,
        channels: int,
        cross_attention_dim: int | None = None,
        num_layers: int = 1,
    ):
        super().__init__()
        inner = heads * dim_head
        if inner != channels:
            raise ValueError(
                f"num_attention_heads={heads} does not divide {channels} channels; use a divisor of every "
                "entry of block_out_channels"
            )
        self.norm = group_norm(32, channels, 1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = [
            BasicTransformerBlock(inner, heads, dim_head, cross_attention_dim) for _ in range(num_layers)
        ]
        self.temporal_transformer_blocks = [
            TemporalBasicTransformerBlock(inner, heads, dim_head, cross_attention_dim)
            for _ in range(num_layers)
        ]
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, out_dim=channels)
        self.time_mixer = AlphaBlender(0.5, "learned_with_images")
        self.proj_out = nn.Linear(inner, channels)
        self.channels = channels

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C)."""
        n, height, width, channels = x.shape
        frames, pixels = cond.num_frames, height * width
        emb = self.time_pos_embed(
            timestep_sinusoid(mx.arange(frames), self.channels).astype(x.dtype)
        )  # (F, C)
        h = by_frames(lambda x, _: self.proj_in(self.norm(x).reshape(-1, pixels, channels)), [x], cond)
        for block, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            h = by_frames(block, [h], cond)  # (N, L, C)
            video = h.reshape(-1, frames, pixels, channels)
            video = by_pixels(partial(self._mix, temporal, emb, cond), [video], cond.chunks.pixels)
            h = video.reshape(n, pixels, channels)
        return by_frames(lambda x, h, _: x + self.proj_out(h).reshape(x.shape), [x, h], cond)

    def _mix(
        self, block: TemporalBasicTransformerBlock, emb: mx.array, cond: Conditions, video: mx.array
    ) -> mx.array:
        """(B, F, L, C) -> the same shape, for all or some pixels."""
        batch, frames, pixels, channels = video.shape
        # (B, F, L, C) -> (B*L, F, C); the sum is written in the new order and saves a copy
        h = (video.transpose(0, 2, 1, 3) + emb).reshape(batch * pixels, frames, channels)
        h = block(h, cond).reshape(batch, pixels, frames, channels).transpose(0, 2, 1, 3)
        return self.time_mixer(video, h, cond)
