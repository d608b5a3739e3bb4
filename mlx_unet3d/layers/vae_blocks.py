"""Encoders and decoders of the autoencoders, channels-last.

Shapes: N frames, H W pixels, C channels, h w latent pixels. Source: diffusers'
`autoencoders/vae.py` and `unet_2d_blocks.py`. All group norms have eps 1e-6, and no block has a
time embedding.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from .activations import silu
from .attention import Attention
from .chunking import evaluate, in_sequence, ranges
from .conditions import Conditions, by_frames
from .convolution import Conv2d, TemporalConv
from .normalization import group_norm
from .resnet import Downsample2D, ResnetBlock2D, Upsample2D
from .temporal import SpatioTemporalResBlock

EPS = 1e-6
_TILE_OVERLAP = 0.25


FRAMES = Conditions()
"""The conditions of images, each of which is a sample."""

MakeResnet = Callable[[int, int], nn.Module]


def _resnets(make: MakeResnet, in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    return [make(in_channels if i == 0 else out_channels, out_channels) for i in range(count)]


class DownEncoderBlock2D(nn.Module):
    """Resnets, then a halving convolution padded at the bottom right, except at the coarsest level."""

    def __init__(
        self, make: MakeResnet, in_channels: int, out_channels: int, num_layers: int, add_downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(make, in_channels, out_channels, num_layers)
        self.downsamplers = [Downsample2D(out_channels, padding=0)] if add_downsample else []

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x, cond)
        return x


class UpDecoderBlock2D(nn.Module):
    """Resnets, then a doubling, except at the finest level."""

    def __init__(
        self, make: MakeResnet, in_channels: int, out_channels: int, num_layers: int, add_upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(make, in_channels, out_channels, num_layers)
        self.upsamplers = [Upsample2D(out_channels)] if add_upsample else []

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, cond)
        return x


class UNetMidBlock2D(nn.Module):
    """Resnet, attention of one head over the pixels of a frame, resnet.

    It builds `num_resnets`, the number in files; with less than two, attention does not run.
    """

    def __init__(
        self, make: MakeResnet, channels: int, groups: int, add_attention: bool, num_resnets: int = 2
    ) -> None:
        super().__init__()
        self.resnets = _resnets(make, channels, channels, num_resnets)
        self.attentions = []
        if add_attention:
            attention = Attention(
                channels,
                heads=1,
                dim_head=channels,
                bias=True,
                upcast_softmax=True,
                norm_num_groups=groups,
                eps=EPS,
                residual_connection=True,
            )
            self.attentions = [attention]

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        first, *others = self.resnets
        x = first(x, cond)
        for second in others[:1]:
            for attention in self.attentions:
                x = by_frames(lambda x, _, attention=attention: attention(x), [x], cond)
            x = second(x, cond)
        return x


class Encoder(nn.Module):
    """Images (N, H, W, in_channels) -> moments (N, h, w, 2 * latent_channels); h = H // 2^(levels - 1)."""

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
        widths, make = block_out_channels, spatial_resnet(groups, act_fn)
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = [
            DownEncoderBlock2D(make, widths[max(i - 1, 0)], width, layers_per_block, i < len(widths) - 1)
            for i, width in enumerate(widths)
        ]
        self.mid_block = UNetMidBlock2D(make, widths[-1], groups, mid_block_add_attention)
        self.conv_norm_out = group_norm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def __call__(self, x: mx.array, cond: Conditions = FRAMES) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, cond)
        x = self.mid_block(x, cond)
        # always SiLU, as in diffusers
        return self.conv_out(self.conv_norm_out(x, act=silu))


class Decoder(nn.Module):
    """Latents (N, h, w, latent_channels) -> images (N, H, W, out_channels); H = h * 2^(levels - 1)."""

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
        make = spatial_resnet(groups, act_fn)
        self._build(
            latent_channels,
            out_channels,
            block_out_channels,
            layers_per_block,
            groups,
            make,
            mid_block_add_attention,
        )

    def _build(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        groups: int,
        make: MakeResnet,
        mid_block_add_attention: bool,
        mid_resnets: int = 2,
    ) -> None:
        coarse_first = tuple(block_out_channels)[::-1]
        self.conv_in = Conv2d(latent_channels, coarse_first[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(make, coarse_first[0], groups, mid_block_add_attention, mid_resnets)
        self.up_blocks = [
            UpDecoderBlock2D(
                make, coarse_first[max(i - 1, 0)], width, layers_per_block + 1, i < len(coarse_first) - 1
            )
            for i, width in enumerate(coarse_first)
        ]
        self.conv_norm_out = group_norm(groups, coarse_first[-1], EPS)
        self.conv_out = Conv2d(coarse_first[-1], out_channels, 3, padding=1)

    def __call__(self, z: mx.array, cond: Conditions = FRAMES) -> mx.array:
        x = by_frames(lambda z, _: self.conv_in(z), [z], cond)
        x = self.mid_block(x, cond)
        for block in self.up_blocks:
            x = block(x, cond)
        return by_frames(lambda x, _: self.conv_out(self.conv_norm_out(x, act=silu)), [x], cond)


class TemporalDecoder(Decoder):
    """A `Decoder` with temporal layers in its resnets and at its output; diffusers' class of that name.

    Its input is (N, ...) with `cond.num_frames` frames a sample.
    """

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
    ) -> None:
        nn.Module.__init__(self)
        self._build(
            latent_channels,
            out_channels,
            block_out_channels,
            layers_per_block,
            groups=32,
            make=spatio_temporal_resnet,
            mid_block_add_attention=True,
            mid_resnets=layers_per_block,
        )
        self.time_conv_out = TemporalConv(out_channels, out_channels)

    def __call__(self, z: mx.array, cond: Conditions = FRAMES) -> mx.array:
        x = super().__call__(z, cond)
        # (N, H, W, C) -> (B, F, H*W, C) and back
        return self.time_conv_out(
            x.reshape(-1, cond.num_frames, x.shape[1] * x.shape[2], x.shape[3])
        ).reshape(x.shape)


def spatial_resnet(groups: int, act_fn: str) -> MakeResnet:
    """Make a resnet without a time embedding."""
    return lambda c_in, c_out: ResnetBlock2D(c_in, c_out, None, EPS, groups, act_fn)


def spatio_temporal_resnet(c_in: int, c_out: int) -> SpatioTemporalResBlock:
    """Make a resnet of the temporal decoder, whose eps and blend differ from the UNet's."""
    return SpatioTemporalResBlock(
        c_in, c_out, None, EPS, 1e-5, 0.0, "learned", switch_spatial_to_temporal_mix=True
    )


def blend(before: mx.array, tile: mx.array, extent: int, axis: int) -> mx.array:
    """Fade linearly from the last `extent` rows (axis 1) or columns (axis 2) of `before` into the first of
    `tile`; both (N, H, W, C). `extent` is limited to their sizes."""
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
    """Apply `fn` to `chunk_size` entries of the first axis at a time; evaluate each result before the next
    begins."""
    if x.shape[0] <= chunk_size:
        return fn(x)
    return mx.concatenate(in_sequence(fn, ([x[r]] for r in ranges(x.shape[0], chunk_size))))


def tiled(fn: Callable[[mx.array], mx.array], x: mx.array, tile_in: int, tile_out: int) -> mx.array:
    """Apply `fn` to overlapping tiles of size `tile_in`, and blend the resulting tiles of size `tile_out`;
    all (N, H, W, C).

    As in diffusers, a tile is blended with the finished tile above it, then with the one on its left.
    """
    stride = int(tile_in * (1 - _TILE_OVERLAP))
    if stride < 1:
        raise ValueError(f"a tile of {tile_in} pixel is too small; tiles need at least 2")
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
