"""Convolutions over frames and their blends with spatial layers, channels-last.

Shapes: B batch, F frames, N = B*F, H W pixels, L = H*W, C channels, T channels of the time embedding.
Sources: diffusers' `models/resnet.py` (TemporalConvLayer, TemporalResnetBlock, SpatioTemporalResBlock,
AlphaBlender).
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .activations import SiLU, silu
from .chunking import by_pixels, group_norm_of_parts
from .conditions import Conditions
from .convolution import TemporalConv, without_bias
from .fused import blend
from .normalization import GroupNorm, group_norm
from .resnet import ResnetBlock2D, add_skip

MERGE_STRATEGIES = ("fixed", "learned", "learned_with_images")


class Stage(NamedTuple):
    """Norm, SiLU, `dropout`, convolution over frames, and a `shift` (B, C) added to the result (None:
    none)."""

    norm: GroupNorm
    dropout: Sequence[nn.Module]
    conv: nn.Module
    shift: mx.array | None = None


def convolve_frames(x: mx.array, stages: Sequence[Stage], cond: Conditions) -> mx.array:
    """(N, H, W, C) -> (N, H, W, C), x + stages(x). Norms take statistics over all frames of a sample."""
    # (N, H, W, C) -> (B, F, L, C)
    video = x.reshape(-1, cond.num_frames, x.shape[1] * x.shape[2], x.shape[3])
    if cond.chunks.pixels is not None:
        return _by_pixels(video, stages, cond.chunks.pixels).reshape(x.shape)
    h, shift = video, None
    for norm, dropout, conv, after in stages:
        h = norm(h, shift=shift, act=silu)
        for layer in dropout:
            h = layer(h)
        h, shift = without_bias(conv, h)
        if after is not None:
            shift = after if shift is None else after + shift
    return add_skip(x, h.reshape(x.shape), shift)


def _by_pixels(video: mx.array, stages: Sequence[Stage], pixels: int) -> mx.array:
    h = video
    for stage in stages[:-1]:
        h = by_pixels(_normalized(stage, h), [h], pixels)
    last = _normalized(stages[-1], h)
    return by_pixels(lambda skip, chunk: skip + last(chunk), [video, h], pixels)


def _normalized(stage: Stage, video: mx.array):
    """Return a function that applies `stage` to some pixels of `video` with the statistics of all."""
    norm = group_norm_of_parts(stage.norm, video)

    def run(chunk: mx.array) -> mx.array:
        h = silu(norm(chunk))
        for layer in (*stage.dropout, stage.conv):
            h = layer(h)
        return h if stage.shift is None else h + stage.shift[:, None, None]

    return run


class TemporalConvLayer(nn.Module):
    """Four norm-SiLU-convolution stages over frames around a skip; diffusers' class of that name.

    The last convolution starts at zero, so that an untrained layer is the identity.
    """

    def __init__(self, channels: int, norm_num_groups: int = 32, dropout: float = 0.1):
        super().__init__()

        def stage(*middle: nn.Module) -> list[nn.Module]:
            norm = group_norm(norm_num_groups, channels)
            return [norm, SiLU(), *middle, TemporalConv(channels, channels)]

        self.conv1 = stage()
        self.conv2 = stage(nn.Dropout(dropout))
        self.conv3 = stage(nn.Dropout(dropout))
        self.conv4 = stage(nn.Dropout(dropout))
        last = self.conv4[-1]
        last.weight = mx.zeros_like(last.weight)
        last.bias = mx.zeros_like(last.bias)

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C)."""
        parts = (self.conv1, self.conv2, self.conv3, self.conv4)
        stages = [Stage(norm, dropout, conv) for norm, _, *dropout, conv in parts]
        return convolve_frames(x, stages, cond)


class TemporalResnetBlock(nn.Module):
    """Two norm-SiLU-convolution stages over frames with the time embedding added between; diffusers' class.

    `temb_channels` None: no time embedding. The number of channels stays the same, and groups are 32.
    """

    def __init__(self, channels: int, temb_channels: int | None, eps: float = 1e-6):
        super().__init__()
        self.norm1 = group_norm(32, channels, eps)
        self.conv1 = TemporalConv(channels, channels)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, channels)
        self.norm2 = group_norm(32, channels, eps)
        self.conv2 = TemporalConv(channels, channels)

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C)."""
        shift = self.time_emb_proj(silu(cond.temb)) if "time_emb_proj" in self else None
        first, second = Stage(self.norm1, (), self.conv1, shift), Stage(self.norm2, (), self.conv2)
        return convolve_frames(x, (first, second), cond)


class AlphaBlender(nn.Module):
    """a * spatial + (1 - a) * temporal with one learned number; diffusers' class of that name.

    Args:
        alpha: initial value of `mix_factor`.
        merge_strategy: "fixed": a is `mix_factor`; "learned": its sigmoid; "learned_with_images": its
            sigmoid, and 1 for frames that are single images.
        switch_spatial_to_temporal_mix: exchange a and 1 - a.

    Raises ValueError for another strategy.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        merge_strategy: str = "learned_with_images",
        switch_spatial_to_temporal_mix: bool = False,
    ):
        super().__init__()
        if merge_strategy not in MERGE_STRATEGIES:
            raise ValueError(
                f"merge_strategy={merge_strategy!r} must be one of {', '.join(map(repr, MERGE_STRATEGIES))}"
            )
        self.mix_factor = mx.array([alpha])
        self.merge_strategy = merge_strategy
        self.switch_spatial_to_temporal_mix = switch_spatial_to_temporal_mix

    def __call__(self, spatial: mx.array, temporal: mx.array, cond: Conditions) -> mx.array:
        """Both (B, F, L, C), or parts of them along L -> the same."""
        alpha = self.mix_factor if self.merge_strategy == "fixed" else mx.sigmoid(self.mix_factor)
        alpha = alpha.astype(spatial.dtype)
        if self.merge_strategy == "learned_with_images" and cond.image_only is not None:
            # (B, F) -> (B, F, 1, 1)
            alpha = mx.where(cond.image_only.astype(mx.bool_)[..., None, None], 1, alpha).astype(
                spatial.dtype
            )
        if self.switch_spatial_to_temporal_mix:
            alpha = 1 - alpha
        return blend(spatial, temporal, alpha)


class SpatioTemporalResBlock(nn.Module):
    """A spatial resnet, then one over frames, and a blend of both; diffusers' class of that name.

    Args:
        in_channels, out_channels: of the spatial resnet; the temporal one keeps `out_channels`.
        temb_channels: T; None for no time embedding.
        eps, temporal_eps: of the group norms; `temporal_eps` None takes `eps`.
        merge_factor, merge_strategy, switch_spatial_to_temporal_mix: see `AlphaBlender`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        eps: float = 1e-6,
        temporal_eps: float | None = None,
        merge_factor: float = 0.5,
        merge_strategy: str = "learned_with_images",
        switch_spatial_to_temporal_mix: bool = False,
    ):
        super().__init__()
        self.spatial_res_block = ResnetBlock2D(in_channels, out_channels, temb_channels, eps)
        self.temporal_res_block = TemporalResnetBlock(
            out_channels, temb_channels, eps if temporal_eps is None else temporal_eps
        )
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy, switch_spatial_to_temporal_mix)

    def __call__(self, x: mx.array, cond: Conditions, skip: mx.array | None = None) -> mx.array:
        """(N, H, W, I) -> (N, H, W, O); for `skip` see `ResnetBlock2D`."""
        spatial = self.spatial_res_block(x, cond, skip)
        temporal = self.temporal_res_block(spatial, cond)
        # (N, H, W, C) -> (B, F, L, C)
        shape = (-1, cond.num_frames, spatial.shape[1] * spatial.shape[2], spatial.shape[3])
        return self.time_mixer(spatial.reshape(shape), temporal.reshape(shape), cond).reshape(spatial.shape)
