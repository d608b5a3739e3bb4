"""Encoder and decoder of the image autoencoder, channels-last.

Shapes: N frames, H W pixels, C channels, h w latent pixels. Source: diffusers'
`autoencoders/vae.py` and `unet_2d_blocks.py`. All group norms have eps 1e-6, and no block has a
time embedding.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from .activations import silu
from .attention import Attention
from .convolution import Conv2d
from .normalization import group_norm
from .resnet import Downsample2D, ResnetBlock2D, Upsample2D
from .slicing import by_frames, evaluate

_EPS = 1e-6
_TILE_OVERLAP = 0.25


def _resnets(
    in_channels: int, out_channels: int, count: int, groups: int, act_fn: str
) -> list[ResnetBlock2D]:
    return [
        ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, None, _EPS, groups, act_fn)
        for i in range(count)
    ]


class DownEncoderBlock2D(nn.Module):
    """Resnets, then a halving convolution padded at the bottom right, except at the coarsest
    level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        act_fn: str,
        add_downsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, groups, act_fn)
        self.downsamplers = [Downsample2D(out_channels, padding=0)] if add_downsample else []

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """Resnets, then a doubling, except at the finest level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        act_fn: str,
        add_upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, groups, act_fn)
        self.upsamplers = [Upsample2D(out_channels)] if add_upsample else []

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class UNetMidBlock2D(nn.Module):
    """Resnet, attention of one head over the pixels of a frame, resnet."""

    def __init__(self, channels: int, groups: int, act_fn: str, add_attention: bool) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups, act_fn)
        self.attentions = []
        if add_attention:
            attention = Attention(
                channels,
                heads=1,
                dim_head=channels,
                bias=True,
                upcast_softmax=True,
                norm_num_groups=groups,
                eps=_EPS,
                residual_connection=True,
            )
            self.attentions = [attention]

    def __call__(self, x: mx.array) -> mx.array:
        first, second = self.resnets
        for layer in (first, *self.attentions, second):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (N, H, W, in_channels) -> moments (N, h, w, 2 * latent_channels); h = H // 2^(levels -
    1)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ) -> None:
        super().__init__()
        widths = block_out_channels
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = [
            DownEncoderBlock2D(
                widths[max(i - 1, 0)],
                width,
                layers_per_block,
                groups,
                act_fn,
                add_downsample=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        ]
        self.mid_block = UNetMidBlock2D(widths[-1], groups, act_fn, mid_block_add_attention)
        self.conv_norm_out = group_norm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        # SiLU whatever act_fn is, as in the reference
        return self.conv_out(self.conv_norm_out(x, act=silu))


class Decoder(nn.Module):
    """Latents (N, h, w, latent_channels) -> images (N, H, W, out_channels); H = h * 2^(levels -
    1)."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ) -> None:
        super().__init__()
        coarse_first = tuple(block_out_channels)[::-1]
        self.conv_in = Conv2d(latent_channels, coarse_first[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(coarse_first[0], groups, act_fn, mid_block_add_attention)
        self.up_blocks = [
            UpDecoderBlock2D(
                coarse_first[max(i - 1, 0)],
                width,
                layers_per_block + 1,
                groups,
                act_fn,
                add_upsample=i < len(coarse_first) - 1,
            )
            for i, width in enumerate(coarse_first)
        ]
        self.conv_norm_out = group_norm(groups, coarse_first[-1], _EPS)
        self.conv_out = Conv2d(coarse_first[-1], out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, act=silu))


def blend(before: mx.array, tile: mx.array, extent: int, axis: int) -> mx.array:
    """Fade linearly from the last `extent` rows (axis 1) or columns (axis 2) of `before` into the
    first of `tile`; both (N, H, W, C), `extent` cut to what they have."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return tile
    kept = before.shape[axis] - extent
    _, overlap = mx.split(before, [kept], axis=axis)
    head, rest = mx.split(tile, [extent], axis=axis)
    shape = (1, extent, 1, 1) if axis == 1 else (1, 1, extent, 1)
    weight = (mx.arange(extent) / extent).reshape(shape).astype(tile.dtype)
    return mx.concatenate([overlap * (1 - weight) + head * weight, rest], axis=axis)


def in_chunks(fn: Callable[[mx.array], mx.array], x: mx.array, chunk_size: int) -> mx.array:
    """`fn` of `chunk_size` entries of the first axis at a time, each evaluated before the next
    begins."""
    return by_frames(fn, [x], None if x.shape[0] <= chunk_size else chunk_size)


def tiled(fn: Callable[[mx.array], mx.array], x: mx.array, tile_in: int, tile_out: int) -> mx.array:
    """`fn` of overlapping tiles of `tile_in`, which become tiles of `tile_out`, blended; all (N, H,
    W, C).

    The order is diffusers': a tile is blended with the finished tile above, then with the one at
    its left.
    """
    stride = int(tile_in * (1 - _TILE_OVERLAP))
    if stride < 1:
        raise ValueError(f"a tile of {tile_in} pixel is too small; tiles need 2 at least")
    extent = int(tile_out * _TILE_OVERLAP)
    kept = tile_out - extent
    above: list[mx.array] = []
    rows = []
    for top in range(0, x.shape[1], stride):
        row: list[mx.array] = []
        for left in range(0, x.shape[2], stride):
            tile = fn(x[:, top : top + tile_in, left : left + tile_in])
            if above:
                tile = blend(above[len(row)], tile, extent, axis=1)
            if row:
                tile = blend(row[-1], tile, extent, axis=2)
            evaluate(tile)
            row.append(tile)
        rows.append(mx.concatenate([tile[:, :kept, :kept] for tile in row], axis=2))
        evaluate(rows[-1])
        above = row
    return mx.concatenate(rows, axis=1)
