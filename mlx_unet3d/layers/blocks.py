"""The blocks of all video UNets: one down, one up and one mid block, and diffusers' classes of these.

A block holds lists of modules; its layer i runs entry i of each list, resnet first. Every module is called as
module(x, cond). A block lists its steps; the network runs the steps of all blocks in one loop, which
therefore holds a single state. States are channels-last, (N, H, W, C) with N = B*F. Sources: diffusers'
`unet_3d_blocks.py` and `unet_motion_model.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .conditions import Conditions
from .freeu import apply_freeu
from .resnet import Downsample2D, ResnetBlock2D, Upsample2D
from .temporal import SpatioTemporalResBlock, TemporalConvLayer
from .transformers import (
    AnimateDiffTransformer3D,
    Transformer2DModel,
    TransformerSpatioTemporalModel,
    TransformerTemporalModel,
)


@dataclass(frozen=True)
class Level:
    """The numbers that define the modules of one block.

    Attributes:
        channels: C, of its outputs.
        temb_channels: of the time embedding.
        heads, dim_head: of its transformers.
        cross_attention_dim: channels of the context; None for no cross-attention.
        transformer_layers: transformer blocks of each layer's transformer, one number or one a layer.
        use_linear_projection: see `Transformer2DModel`.
        motion_heads, motion_layers, motion_positions: heads, transformer blocks (as above) and the most
            frames of motion modules.
        norm_num_groups, norm_eps, act_fn: of resnets; motion modules and transformers share the groups.
    """

    channels: int
    temb_channels: int = 0
    heads: int = 1
    dim_head: int = 1
    cross_attention_dim: int | None = None
    transformer_layers: int | tuple[int, ...] = 1
    use_linear_projection: bool = True
    motion_heads: int = 8
    motion_layers: int | tuple[int, ...] = 1
    motion_positions: int = 32
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"


def entry(values: Any, i: int) -> Any:
    """Return the value of level or layer i, where there is one for all or a tuple with one each."""
    return values[i] if isinstance(values, tuple) else values


# Makers of the modules in these lists, for layer i of a level.


def resnet(level: Level, c_in: int, c_out: int, scale: float = 1.0) -> nn.Module:
    """A spatial resnet; `scale` divides its output."""
    options = level.norm_eps, level.norm_num_groups, level.act_fn, scale
    return ResnetBlock2D(c_in, c_out, level.temb_channels, *options)


def temporal_convolution(level: Level, i: int) -> nn.Module:
    return TemporalConvLayer(level.channels, level.norm_num_groups)


def spatial_transformer(level: Level, i: int) -> nn.Module:
    return Transformer2DModel(
        level.heads,
        level.dim_head,
        level.channels,
        level.cross_attention_dim,
        level.norm_num_groups,
        entry(level.transformer_layers, i),
        level.use_linear_projection,
    )


def temporal_transformer(level: Level, i: int) -> nn.Module:
    return TransformerTemporalModel(level.heads, level.dim_head, level.channels, level.norm_num_groups)


def motion_module(level: Level, i: int) -> nn.Module:
    if level.channels % level.motion_heads:
        raise ValueError(
            f"motion_num_attention_heads={level.motion_heads} does not divide {level.channels} channels; use "
            "a divisor of every entry of block_out_channels"
        )
    return AnimateDiffTransformer3D(
        level.motion_heads,
        level.channels // level.motion_heads,
        level.channels,
        level.norm_num_groups,
        entry(level.motion_layers, i),
        level.motion_positions,
    )


def spatio_temporal_transformer(level: Level, i: int) -> nn.Module:
    return TransformerSpatioTemporalModel(
        level.heads,
        level.dim_head,
        level.channels,
        level.cross_attention_dim,
        entry(level.transformer_layers, i),
    )


def spatio_temporal_resnet(eps: float) -> Callable[..., nn.Module]:
    """Return the maker of Stable Video Diffusion's resnets, whose eps depends on the block class."""
    return lambda level, c_in, c_out, scale=1.0: SpatioTemporalResBlock(c_in, c_out, level.temb_channels, eps)


Maker = Callable[[Level, int], nn.Module]
Step = Callable[[mx.array, Conditions, list[mx.array]], mx.array]
"""A step of the loop: returns the next state from the state, the conditions and the skips so far."""


@dataclass(frozen=True)
class Run:
    """A step that calls a module."""

    module: Callable[[mx.array, Conditions], mx.array]

    def __call__(self, x: mx.array, cond: Conditions, skips: list[mx.array]) -> mx.array:
        return self.module(x, cond)


class Keep:
    """The step that stores the state as a skip for the way up."""

    def __call__(self, x: mx.array, cond: Conditions, skips: list[mx.array]) -> mx.array:
        skips.append(x)
        return x


@dataclass(frozen=True)
class Join:
    """The step that runs a resnet on the state and the latest skip; `index` is the up block's, for FreeU."""

    resnet: nn.Module
    index: int

    def __call__(self, x: mx.array, cond: Conditions, skips: list[mx.array]) -> mx.array:
        skip = skips.pop()
        if cond.freeu is not None:
            x, skip = apply_freeu(cond.freeu, self.index, x, skip)
        return self.resnet(x, cond, skip)


@dataclass(frozen=True)
class Upsample:
    """The step that doubles the resolution, or restores the size of the next skip where halving had
    rounded."""

    module: Upsample2D

    def __call__(self, x: mx.array, cond: Conditions, skips: list[mx.array]) -> mx.array:
        return self.module(x, cond, skips[-1].shape[1:3] if skips else None)


class Block(nn.Module):
    """Layers of one resolution.

    A subclass names the modules of its layers: `make_resnet`, then `convolutions` (one after every resnet)
    and `transformers` (one after every resnet except the last of a mid block), makers by the names of their
    lists.
    """

    make_resnet: ClassVar[Callable[..., nn.Module]] = staticmethod(resnet)
    convolutions: ClassVar[Mapping[str, Maker]] = {}
    transformers: ClassVar[Mapping[str, Maker]] = {}

    def __init__(self, channels: Sequence[tuple[int, int]], level: Level, attending: int, scale: float = 1.0):
        """`channels` has the inputs and outputs of each resnet; the first `attending` have transformers."""
        super().__init__()
        made = {"resnets": [self.make_resnet(level, c_in, c_out, scale) for c_in, c_out in channels]}
        for name, make in self.convolutions.items():
            made[name] = [make(level, i) for i in range(len(channels))]
        for name, make in self.transformers.items():
            made[name] = [make(level, i) for i in range(attending)]
        # In the order of diffusers' registration, on which files of unnamed adapters depend.
        first = ["attentions"] if "attentions" in made and not self.convolutions else []
        for name in dict.fromkeys((*first, *made)):
            self[name] = made[name]

    def behind(self, i: int) -> Iterator[Step]:
        """Yield the steps of layer i after its resnet."""
        for name in (*self.convolutions, *self.transformers):
            if i < len(self[name]):
                yield Run(self[name][i])


class DownBlock(Block):
    """Layers whose outputs are stored for the way up, then halving.

    Args:
        level: numbers of its modules.
        in_channels: of the input.
        num_layers: number of layers.
        add_downsample: end in halving the resolution.
        downsample_padding: 0 or 1, see `Downsample2D`.
    """

    def __init__(
        self,
        level: Level,
        in_channels: int,
        num_layers: int,
        add_downsample: bool,
        downsample_padding: int = 1,
    ):
        width = level.channels
        channels = [(in_channels if i == 0 else width, width) for i in range(num_layers)]
        super().__init__(channels, level, num_layers)
        if add_downsample:
            self.downsamplers = [Downsample2D(width, downsample_padding)]

    def steps(self) -> Iterator[Step]:
        """Yield all steps of the block."""
        for i, module in enumerate(self.resnets):
            yield Run(module)
            yield from self.behind(i)
            yield Keep()
        for module in self.get("downsamplers", ()):
            yield Run(module)
            yield Keep()


class UpBlock(Block):
    """Layers that also take the skips of the way down, then doubling.

    Args:
        level: numbers of its modules.
        skip_channels: of the last skip, that of the next finer level; the others have those of this level.
        in_channels: of the input.
        num_layers: number of layers.
        add_upsample: end in doubling the resolution.
        index: the number of the block, from the coarsest, for FreeU.
    """

    def __init__(
        self,
        level: Level,
        skip_channels: int,
        in_channels: int,
        num_layers: int,
        add_upsample: bool,
        index: int,
    ):
        width = level.channels
        inputs = [in_channels, *[width] * (num_layers - 1)]
        skips = [*[width] * (num_layers - 1), skip_channels]
        channels = [(hidden + skip, width) for hidden, skip in zip(inputs, skips, strict=True)]
        super().__init__(channels, level, num_layers)
        if add_upsample:
            self.upsamplers = [Upsample2D(width)]
        self.index = index

    def steps(self) -> Iterator[Step]:
        """Yield all steps of the block."""
        for i, module in enumerate(self.resnets):
            yield Join(module, self.index)
            yield from self.behind(i)
        for module in self.get("upsamplers", ()):
            yield Upsample(module)


class MidBlock(Block):
    """Layers at the coarsest resolution, and one more resnet; `scale` divides the outputs of resnets."""

    def __init__(self, level: Level, num_layers: int = 1, scale: float = 1.0):
        super().__init__([(level.channels, level.channels)] * (num_layers + 1), level, num_layers, scale)

    def steps(self) -> Iterator[Step]:
        """Yield all steps of the block."""
        for i, module in enumerate(self.resnets):
            yield Run(module)
            yield from self.behind(i)


# diffusers' blocks, defined by their lists of modules.

_FRAMES = {"temp_convs": temporal_convolution}
_TEXT_AND_FRAMES = {"attentions": spatial_transformer, "temp_attentions": temporal_transformer}
_TEXT = {"attentions": spatial_transformer}
_MOTION = {"motion_modules": motion_module}
_IMAGE_AND_FRAMES = {"attentions": spatio_temporal_transformer}


class DownBlock3D(DownBlock):
    convolutions = _FRAMES


class CrossAttnDownBlock3D(DownBlock):
    convolutions, transformers = _FRAMES, _TEXT_AND_FRAMES


class UpBlock3D(UpBlock):
    convolutions = _FRAMES


class CrossAttnUpBlock3D(UpBlock):
    convolutions, transformers = _FRAMES, _TEXT_AND_FRAMES


class UNetMidBlock3DCrossAttn(MidBlock):
    convolutions, transformers = _FRAMES, _TEXT_AND_FRAMES


class DownBlockMotion(DownBlock):
    transformers = _MOTION


class CrossAttnDownBlockMotion(DownBlock):
    transformers = _TEXT | _MOTION


class UpBlockMotion(UpBlock):
    transformers = _MOTION


class CrossAttnUpBlockMotion(UpBlock):
    transformers = _TEXT | _MOTION


class UNetMidBlockCrossAttnMotion(MidBlock):
    transformers = _TEXT | _MOTION


class UNetMidBlock2DCrossAttn(MidBlock):
    transformers = _TEXT


# In diffusers, the eps of Stable Video Diffusion's resnets differs from class to class.


class DownBlockSpatioTemporal(DownBlock):
    make_resnet = staticmethod(spatio_temporal_resnet(1e-5))


class CrossAttnDownBlockSpatioTemporal(DownBlock):
    make_resnet, transformers = staticmethod(spatio_temporal_resnet(1e-6)), _IMAGE_AND_FRAMES


class UpBlockSpatioTemporal(UpBlock):
    make_resnet = staticmethod(spatio_temporal_resnet(1e-6))


class CrossAttnUpBlockSpatioTemporal(UpBlock):
    make_resnet, transformers = staticmethod(spatio_temporal_resnet(1e-6)), _IMAGE_AND_FRAMES


class UNetMidBlockSpatioTemporal(MidBlock):
    make_resnet, transformers = staticmethod(spatio_temporal_resnet(1e-5)), _IMAGE_AND_FRAMES
