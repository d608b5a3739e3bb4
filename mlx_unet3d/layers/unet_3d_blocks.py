"""The five blocks that a UNet3DConditionModel is put together from.

Each layer of a block is resnet -> temporal convolution [-> spatial -> temporal transformer]. Sources:
diffusers' `unet_3d_blocks.py`. All states are channels-last, (N, H, W, C) with N = B*F.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .freeu import FreeU, apply_freeu
from .resnet import Downsample2D, ResnetBlock2D, TemporalConvLayer, Upsample2D
from .slicing import WHOLE, Slicing, by_frames, by_frames_of_samples, evaluate
from .text_context import TextContext
from .transformers import Transformer2DModel, TransformerTemporalModel


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a network share."""

    temb_channels: int
    attention_head_dim: int
    cross_attention_dim: int | None
    norm_num_groups: int
    norm_eps: float
    act_fn: str


@dataclass(frozen=True)
class Conditions:
    """What all layers of a forward share: the time embedding (B, T), the text (B, L, D) and its mask
    (B, 1, L), the number of frames, the keywords for the attention processors, and the pieces."""

    temb: mx.array
    num_frames: int
    context: mx.array | TextContext | None = None
    context_mask: mx.array | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    slicing: Slicing = WHOLE


class Block3D(nn.Module):
    """Layers of one resolution; `channels` has the input and output channels of each resnet."""

    def __init__(
        self,
        channels: list[tuple[int, int]],
        options: BlockOptions,
        attends: bool,
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.resnets = [
            ResnetBlock2D(
                c_in,
                c_out,
                options.temb_channels,
                options.norm_eps,
                options.norm_num_groups,
                options.act_fn,
                output_scale_factor,
            )
            for c_in, c_out in channels
        ]
        self.temp_convs = [TemporalConvLayer(c_out, options.norm_num_groups) for _, c_out in channels]
        self.attends = attends
        if attends:
            self._add_transformers([c_out for _, c_out in channels], options)

    def _add_transformers(self, widths: list[int], options: BlockOptions) -> None:
        # The 3D networks name the head dimension what it is; the number of heads follows.
        dim_head, groups = options.attention_head_dim, options.norm_num_groups
        self.attentions = [
            Transformer2DModel(c // dim_head, dim_head, c, options.cross_attention_dim, groups)
            for c in widths
        ]
        self.temp_attentions = [TransformerTemporalModel(c // dim_head, dim_head, c, groups) for c in widths]

    def _resnet(self, i: int, cond: Conditions, *states: mx.array) -> mx.array:
        """The resnet of layer `i`, of `states` side by side: (N, H, W, C1), ... -> (N, H, W, O)."""

        def of_sample(sample: int, *pieces: mx.array) -> mx.array:
            x = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)
            temb = cond.temb if sample < 0 else cond.temb[sample : sample + 1]
            return self.resnets[i](x, temb)

        return by_frames_of_samples(of_sample, states, cond.temb.shape[0], cond.slicing.frames)

    def _convolve_frames(self, i: int, x: mx.array, cond: Conditions) -> mx.array:
        return self.temp_convs[i](x, cond.num_frames, cond.slicing)

    def _attend_pixels(self, i: int, x: mx.array, cond: Conditions) -> mx.array:
        keywords = cond.cross_attention_kwargs
        return self.attentions[i](x, cond.context, cond.context_mask, keywords, cond.slicing)

    def _attend_frames(self, i: int, x: mx.array, cond: Conditions) -> mx.array:
        keywords = cond.cross_attention_kwargs
        return self.temp_attentions[i](x, cond.num_frames, keywords, cond.slicing)

    def steps(self, i: int, cond: Conditions, attends: bool) -> list[Callable[[mx.array], mx.array]]:
        """What follows the resnet of layer `i`, step by step; the caller keeps no state but the last."""
        steps = [self._convolve_frames]
        if attends:
            steps += [self._attend_pixels, self._attend_frames]

        def evaluated(step: Callable[..., mx.array], x: mx.array) -> mx.array:
            if cond.slicing.blockwise:
                evaluate(x)
            return step(i, x, cond)

        return [partial(evaluated, step) for step in steps]


class DownBlock3D(Block3D):
    """Layers, then halving of the resolution where `add_downsample`; diffusers' class of that name."""

    attends = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        options: BlockOptions,
        add_downsample: bool,
        downsample_padding: int = 1,
    ):
        channels = [(in_channels if i == 0 else out_channels, out_channels) for i in range(num_layers)]
        super().__init__(channels, options, type(self).attends)
        if add_downsample:
            self.downsamplers = [Downsample2D(out_channels, downsample_padding)]

    def __call__(self, x: mx.array, cond: Conditions) -> Iterator[mx.array]:
        """What the up path wants, one by one: each layer's output, and the halved one; the last is the
        block's own output."""
        for i in range(len(self.resnets)):
            x = self._resnet(i, cond, x)
            for step in self.steps(i, cond, self.attends):
                x = step(x)
            yield x
        if "downsamplers" in self:
            yield by_frames(self.downsamplers[0], [x], cond.slicing.frames)


class CrossAttnDownBlock3D(DownBlock3D):
    """`DownBlock3D` with transformers; diffusers' class of that name."""

    attends = True


class UpBlock3D(Block3D):
    """Layers fed with the skips of the down path, then doubling where `add_upsample`; diffusers' class.

    `resolution_idx` counts the up blocks from the coarsest, for FreeU.
    """

    attends = False

    def __init__(
        self,
        in_channels: int,
        prev_output_channel: int,
        out_channels: int,
        num_layers: int,
        options: BlockOptions,
        add_upsample: bool,
        resolution_idx: int,
    ):
        channels = []
        for i in range(num_layers):
            hidden = prev_output_channel if i == 0 else out_channels
            skip = in_channels if i == num_layers - 1 else out_channels
            channels.append((hidden + skip, out_channels))
        super().__init__(channels, options, type(self).attends)
        if add_upsample:
            self.upsamplers = [Upsample2D(out_channels)]
        self.resolution_idx = resolution_idx

    def resnet(
        self, i: int, x: mx.array, skip: mx.array, cond: Conditions, freeu: FreeU | None = None
    ) -> mx.array:
        """The resnet of layer `i`, fed with the latest skip of the down path that is left."""
        if freeu is not None:
            x, skip = apply_freeu(freeu, self.resolution_idx, x, skip)
        return self._resnet(i, cond, x, skip)

    def upsample(self, x: mx.array, cond: Conditions, size: tuple[int, int] | None = None) -> mx.array:
        """Doubling, or to `size`, where the block ends in it."""
        if "upsamplers" not in self:
            return x
        return by_frames(lambda piece: self.upsamplers[0](piece, size), [x], cond.slicing.frames)


class CrossAttnUpBlock3D(UpBlock3D):
    """`UpBlock3D` with transformers; diffusers' class of that name."""

    attends = True


class UNetMidBlock3DCrossAttn(Block3D):
    """Convolutions, transformers, convolutions at the coarsest resolution; diffusers' class.

    `output_scale_factor` divides the outputs of its two resnets.
    """

    def __init__(self, channels: int, options: BlockOptions, output_scale_factor: float = 1.0):
        super().__init__([(channels, channels)] * 2, options, False, output_scale_factor)
        self._add_transformers([channels], options)

    def __call__(self, x: mx.array, cond: Conditions) -> mx.array:
        for i, attends in ((0, True), (1, False)):
            x = self._resnet(i, cond, x)
            for step in self.steps(i, cond, attends):
                x = step(x)
        return x


DOWN_BLOCKS: dict[str, type[DownBlock3D]] = {
    "DownBlock3D": DownBlock3D,
    "CrossAttnDownBlock3D": CrossAttnDownBlock3D,
}
UP_BLOCKS: dict[str, type[UpBlock3D]] = {
    "UpBlock3D": UpBlock3D,
    "CrossAttnUpBlock3D": CrossAttnUpBlock3D,
}
