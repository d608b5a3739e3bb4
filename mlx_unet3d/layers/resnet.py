"""Residual and resampling layers, channels-last.

Shapes: B batch, F frames, N = B*F, H W pixels, C channels. Sources: diffusers' `models/resnet.py`,
`downsampling.py` and `upsampling.py`.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .activations import get_activation
from .conditions import Conditions, by_frames
from .convolution import Conv2d, without_bias
from .fused import add
from .normalization import group_norm


class PointwiseConv2d(nn.Linear):
    """A 1x1 convolution, computed and stored as a matrix (O, I)."""

    diffusers_layout = "conv2d_1x1"


def add_skip(skip: mx.array, h: mx.array, bias: mx.array | None) -> mx.array:
    """skip + h + bias."""
    return skip + h if bias is None else add(skip, h, bias)


class ResnetBlock2D(nn.Module):
    """Two norm-activation-convolution stages with the time embedding added between; diffusers' class.

    `output_scale_factor` divides the sum with the skip. `temb_channels` None: no time embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        eps: float = 1e-6,
        groups: int = 32,
        act_fn: str = "silu",
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = group_norm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = PointwiseConv2d(in_channels, out_channels)
        self.act = get_activation(act_fn)
        self.output_scale_factor = output_scale_factor

    def __call__(self, x: mx.array, cond: Conditions, skip: mx.array | None = None) -> mx.array:
        """(N, H, W, I) -> (N, H, W, O); a `skip` (N, H, W, J) is concatenated to x, and I is the sum of
        both."""
        return by_frames(self._of_frames, [x] if skip is None else [x, skip], cond)

    def _of_frames(self, *states_and_cond: Any) -> mx.array:
        *states, cond = states_and_cond
        x = states[0] if len(states) == 1 else mx.concatenate(states, axis=-1)
        h, shift = without_bias(self.conv1, self.norm1(x, act=self.act))
        if "time_emb_proj" in self:
            projected = self.time_emb_proj(self.act(cond.temb))
            shift = projected if shift is None else projected + shift
        h, bias = without_bias(self.conv2, self.norm2(h, shift=shift, act=self.act))
        skip = self.conv_shortcut(x) if "conv_shortcut" in self else x
        h = add_skip(skip, h, bias)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


class Downsample2D(nn.Module):
    """A 3x3 convolution of stride 2; diffusers' class of that name. Padding 1 gives ceil(n/2) pixels; padding
    0 adds a zero row and column at the bottom right and gives floor(n/2) pixels."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"downsample_padding={padding} does not suit the skip connections; use 0 or 1")
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        """(N, H, W, C) -> half the height and width."""
        return by_frames(self._of_frames, [x], cond)

    def _of_frames(self, x: mx.array, cond: Conditions) -> mx.array:
        if self.padding == 0:
            x = mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        return self.conv(x)


def upsample_nearest(x: mx.array, height: int, width: int) -> mx.array:
    """(N, h, w, C) -> (N, height, width, C), nearest neighbours: pixel k comes from floor(k * in / out)."""
    n, h, w, channels = x.shape
    if (height, width) == (2 * h, 2 * w):
        # (N, h, w, C) -> (N, h, 2, w, 2, C): every pixel twice each way
        x = mx.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, channels))
        return x.reshape(n, height, width, channels)
    rows = mx.array(np.arange(height) * h // height)
    columns = mx.array(np.arange(width) * w // width)
    return mx.take(mx.take(x, rows, axis=1), columns, axis=2)


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, by two or to a given size, and a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array, cond: Conditions, size: tuple[int, int] | None = None) -> mx.array:
        """(N, H, W, C) -> (N, 2H, 2W, C), or to `size` (height, width)."""
        height, width = size if size is not None else (2 * x.shape[1], 2 * x.shape[2])
        return by_frames(lambda x, _: self.conv(upsample_nearest(x, height, width)), [x], cond)
