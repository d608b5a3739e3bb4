"""Residual, resampling and temporal convolution blocks, channels-last.

Shapes: B batch, F frames, N = B*F, H W pixels, C channels. Sources: diffusers' `models/resnet.py`,
`downsampling.py` and `upsampling.py`.
"""

from collections.abc import Callable
from functools import reduce

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .activations import SiLU, get_activation, silu
from .convolution import Conv2d, TemporalConv, without_bias
from .fused import add
from .normalization import group_norm
from .slicing import WHOLE, Slicing, by_pixels, evaluate, group_norm_of_parts


class PointwiseConv2d(nn.Linear):
    """A 1x1 convolution, computed and stored as the matrix (O, I) that it is."""

    diffusers_layout = "conv2d_1x1"


def add_skip(skip: mx.array, h: mx.array, bias: mx.array | None) -> mx.array:
    """skip + h + bias."""
    return skip + h if bias is None else add(skip, h, bias)


class TemporalConvLayer(nn.Module):
    """Four norm-SiLU-convolution stages over frames around a skip; diffusers' class of that name.

    The last convolution starts at zero, so an untrained layer is the identity. The statistics of each
    norm run over all frames and pixels of a sample.
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

    def __call__(self, x: mx.array, num_frames: int, slicing: Slicing = WHOLE) -> mx.array:
        """(N, H, W, C) -> (N, H, W, C). `slicing` says how many pixels are taken at a time."""
        if slicing.pixels is not None:
            return self._by_pixels(x, num_frames, slicing.pixels)
        n, height, width, channels = x.shape
        # (N, H, W, C) -> (B, F, H*W, C)
        h = x.reshape(n // num_frames, num_frames, height * width, channels)
        bias = None
        for norm, _silu, *dropout, conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = norm(h, shift=bias, act=silu)
            for layer in dropout:
                h = layer(h)
            h, bias = without_bias(conv, h)
            if slicing.blockwise:
                evaluate(h)
        return add_skip(x, h.reshape(x.shape), bias)

    def _by_pixels(self, x: mx.array, num_frames: int, pixels: int) -> mx.array:
        # (N, H, W, C) -> (B, F, H*W, C)
        video = x.reshape(-1, num_frames, x.shape[1] * x.shape[2], x.shape[3])
        h = video
        for norm, *rest in (self.conv1, self.conv2, self.conv3):
            h = by_pixels(_chain(group_norm_of_parts(norm, h), *rest), [h], pixels)
        norm, *rest = self.conv4
        last = _chain(group_norm_of_parts(norm, h), *rest)
        return by_pixels(lambda skip, piece: skip + last(piece), [video, h], pixels).reshape(x.shape)


def _chain(*layers: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    return lambda x: reduce(lambda h, layer: layer(h), layers, x)


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

    def __call__(self, x: mx.array, temb: mx.array | None = None) -> mx.array:
        """(N, H, W, I) and the embedding (B, T) of each sample, B dividing N -> (N, H, W, O)."""
        h, shift = without_bias(self.conv1, self.norm1(x, act=self.act))
        if temb is not None:
            projected = self.time_emb_proj(self.act(temb))
            shift = projected if shift is None else projected + shift
        h, bias = without_bias(self.conv2, self.norm2(h, shift=shift, act=self.act))
        skip = self.conv_shortcut(x) if "conv_shortcut" in self else x
        h = add_skip(skip, h, bias)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. Padding 1: ceil(n/2) pixels; padding 0: one zero row and column are
    added at the bottom right, floor(n/2) pixels. diffusers' class of that name."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"downsample_padding={padding} does not fit the skip connections; use 0 or 1")
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def __call__(self, x: mx.array) -> mx.array:
        if self.padding == 0:
            x = mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        return self.conv(x)


def upsample_nearest(x: mx.array, height: int, width: int) -> mx.array:
    """Nearest neighbour, (N, h, w, C) -> (N, height, width, C); pixel k comes from floor(k * in / out)."""
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

    def __call__(self, x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
        """(N, H, W, C) -> (N, 2H, 2W, C), or to `size` (height, width)."""
        height, width = size if size is not None else (2 * x.shape[1], 2 * x.shape[2])
        return self.conv(upsample_nearest(x, height, width))
