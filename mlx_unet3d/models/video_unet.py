"""The trunk of all video UNets: levels, the one loop over all layers, and the options that the networks
share.

A network adds its config, its inputs and what enters before `conv_in`. Letters: B batch, C channels, F
frames, H W pixels, N = B*F, L tokens of a context, D their channels, T channels of the time embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers import blocks
from ..layers.activations import silu
from ..layers.adapted import scaled_adapters
from ..layers.blocks import Join, Keep, Level, MidBlock, Run, Step
from ..layers.conditions import Conditions, by_frames
from ..layers.convolution import Conv2d
from ..layers.embeddings import TimestepEmbedding, timestep_sinusoid
from ..layers.normalization import group_norm
from ..layers.text_context import TextContext
from .attention_control import AttentionControl
from .feature_cache import FeatureCache
from .outputs import ModelOutput
from .pretrained import PretrainedModel
from .unet_options import Context, UNetOptions
from .video_unet_config import per_level


@dataclass
class VideoUNetOutput(ModelOutput):
    """`sample`: the prediction, in the shape of the input sample but for its channels."""

    sample: mx.array


@dataclass(frozen=True)
class Levels:
    """The levels of a network: down, finest first; mid; up, coarsest first."""

    down: tuple[Level, ...]
    mid: Level
    up: tuple[Level, ...]


class VideoUNet(UNetOptions, AttentionControl, PretrainedModel):
    """The base of the video UNets. A subclass calls `_build`, and makes `Conditions` of its inputs in
    `_prepare`."""

    lora_component = "unet"

    def _build(
        self,
        levels: Levels,
        mid: type[MidBlock],
        *,
        layers: Sequence[int],
        in_channels: int,
        downsample_padding: int = 1,
        mid_layers: int = 1,
        mid_scale: float = 1.0,
        time_cond_proj_dim: int | None = None,
        **before: nn.Module | list[nn.Module],
    ) -> None:
        """Make all modules, in the order of diffusers' registration; `before` stand behind the time
        embedding.

        `layers` is the number of layers a level, finest first; up blocks have one more.
        """
        config, first, last = self.config, levels.down[0], len(levels.down) - 1
        down, up = (
            [getattr(blocks, name) for name in names]
            for names in (config.down_block_types, config.up_block_types)
        )
        widths = [level.channels for level in levels.down]
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            widths[0], first.temb_channels, first.act_fn, time_cond_proj_dim
        )
        for name, module in before.items():
            self[name] = module
        self.down_blocks = [
            block(level, widths[max(i - 1, 0)], layers[i], i < last, downsample_padding)
            for i, (block, level) in enumerate(zip(down, levels.down, strict=True))
        ]
        coarse_first = widths[::-1]
        self.up_blocks = [
            block(
                level,
                coarse_first[min(i + 1, last)],
                coarse_first[max(i - 1, 0)],
                layers[last - i] + 1,
                i < last,
                i,
            )
            for i, (block, level) in enumerate(zip(up, levels.up, strict=True))
        ]
        self.mid_block = mid(levels.mid, mid_layers, mid_scale)
        self.conv_norm_out = group_norm(first.norm_num_groups, widths[0], first.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    # The forward.

    def _prepare(
        self, sample: mx.array, context: Context | None, inputs: dict[str, Any]
    ) -> tuple[mx.array, Any]:
        """The input of `conv_in` (B, C, F, H, W) and the `Conditions` of the inputs of a forward."""
        raise NotImplementedError

    def _run(
        self,
        sample: mx.array,
        context: Context | None,
        inputs: dict[str, Any],
        feature_cache: FeatureCache | None = None,
    ) -> mx.array:
        """The prediction (B, C, F, H, W), compiled or not, with or without the features of an earlier one.

        `inputs` are arrays, and lists and dicts of arrays and constants.
        """
        depth, deep = None, None
        if feature_cache is not None:
            if any(inputs.get(f"{place}_residuals") is not None for place in ("down", "mid")):
                raise ValueError(
                    "a feature_cache would leave out additional residuals; give one or the other"
                )
            depth = feature_cache.depth
            self.check_cache_depth(depth)
            deep = feature_cache.next()
        keywords = inputs.get("cross_attention_kwargs")
        if keywords is not None:  # a trace takes no scalars of NumPy
            keywords = {k: v.item() if getattr(v, "size", 0) == 1 else v for k, v in keywords.items()}
            inputs = inputs | {"cross_attention_kwargs": keywords}
        forward = self._forward if self._compiled is None else self._compiled
        x, *made = forward(sample, context, inputs, depth, deep)
        if made:
            feature_cache.keep(made[0])
        return x

    def _forward(
        self, sample: mx.array, context: Context | None, inputs: dict[str, Any], *features: Any
    ) -> tuple[mx.array, ...]:
        """Run all layers, with adapters scaled by the keyword `scale`, also while they are traced."""
        with scaled_adapters((inputs.get("cross_attention_kwargs") or {}).get("scale", 1.0)):
            return self._run_layers(sample, context, inputs, *features)

    def _run_layers(
        self,
        sample: mx.array,
        context: Context | None,
        inputs: dict[str, Any],
        depth: int | None = None,
        deep: mx.array | None = None,
    ) -> tuple[mx.array, ...]:
        """The prediction; with `depth`, and without what it made earlier, also the input of the last `depth`
        layers of the way up, which as `deep` stands for all layers below."""
        x, cond = self._prepare(sample, context, inputs)
        # (B, C, F, H, W) -> (N, H, W, C)
        x = x.transpose(0, 2, 3, 4, 1).reshape(cond.batch * cond.num_frames, *x.shape[3:], -1)
        steps = list(self._steps(inputs.get("down_residuals"), inputs.get("mid_residuals")))
        start, stop = (None, None) if depth is None else _cut(steps, depth)
        skips: list[mx.array] = []
        made: list[mx.array] = []
        for i, step in enumerate(steps):
            if i == stop and deep is None:
                made.append(x.reshape(cond.batch, cond.num_frames, *x.shape[1:]))
            elif i == stop:
                x = _features(deep, skips[-1], cond)
            elif deep is not None and start <= i < stop:
                continue
            # Only this name holds a state: the last one is freed.
            x = step(x, cond, skips)
        # (N, H, W, C) -> (B, C, F, H, W)
        return x.reshape(cond.batch, cond.num_frames, *x.shape[1:]).transpose(0, 4, 1, 2, 3), *made

    def _steps(
        self, down_residuals: Sequence[mx.array] | None, mid_residual: mx.array | None
    ) -> Iterator[Step]:
        """All steps of a forward, in order."""
        yield Run(lambda x, cond: by_frames(lambda x, _: self.conv_in(x), [x], cond))
        if "transformer_in" in self:
            yield Run(self.transformer_in)
        yield Keep()
        for block in self.down_blocks:
            yield from block.steps()
        if down_residuals is not None:
            yield _AddToSkips(down_residuals)
        yield from self.mid_block.steps()
        if mid_residual is not None:
            name = "mid_block_additional_residual"
            yield Run(lambda x, cond: x + _channels_last_residual(mid_residual, x, name))
        for block in self.up_blocks:
            yield from block.steps()
        yield Run(lambda x, cond: by_frames(self._out, [x], cond))

    def _out(self, x: mx.array, cond: Conditions) -> mx.array:
        return self.conv_out(self.conv_norm_out(x, act=silu))

    # The inputs of a forward.

    def _check_sample(self, sample: mx.array, axis: int = 1) -> None:
        """ValueError unless `sample` is 5-D with `in_channels` along `axis`, and in the dtype of the
        network."""
        channels = self.config.in_channels
        if sample.ndim != 5 or sample.shape[axis] != channels or 0 in sample.shape:
            names = ["batch", "frames", "height", "width"]
            names.insert(axis, str(channels))
            raise ValueError(f"sample has shape {tuple(sample.shape)}; it must be ({', '.join(names)})")
        if sample.dtype != self.dtype:
            raise ValueError(
                f"sample is {sample.dtype} but the network is {self.dtype}; cast it: "
                "sample.astype(unet.dtype)"
            )

    def _check_context(self, context: Context | None, rows: Sequence[int], dtype: mx.Dtype) -> Context | None:
        """The context; ValueError unless its number of rows is one of `rows`, and width and dtype fit."""
        dim = per_level(self.config.cross_attention_dim, 1)[-1]  # the mid block's, which always attends
        if dim is None:
            return None  # nothing attends to text
        batch = rows[0]
        if context is None:
            raise ValueError(f"encoder_hidden_states is None; this network needs ({batch}, tokens, {dim})")
        states = context.states if isinstance(context, TextContext) else context
        if states.ndim != 3 or states.shape[0] not in rows or states.shape[2] != dim:
            per_frame = f" or ({rows[1]}, tokens, {dim})" if len(rows) > 1 and rows[1] != batch else ""
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(states.shape)}; it must be "
                f"({batch}, tokens, {dim}){per_frame}: one row of text a sample"
                f"{' or frame' if per_frame else ''}, as wide as cross_attention_dim"
            )
        if states.dtype != dtype:
            raise ValueError(
                f"encoder_hidden_states is {states.dtype} but the sample is {dtype}; cast it with astype"
            )
        return context

    def _embed_time(
        self, timestep: mx.array, batch: int, dtype: mx.Dtype, timestep_cond: mx.array | None = None
    ) -> mx.array:
        """-> (B, T)."""
        timesteps = timestep.astype(mx.float32).reshape(-1)
        if timesteps.size not in (1, batch) or timestep.ndim > 1:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; it must be one number or ({batch},)"
            )
        dim = self.config.get("time_cond_proj_dim")
        if timestep_cond is not None:
            if dim is None:
                raise ValueError(
                    "timestep_cond is given, but this network was built with time_cond_proj_dim=None"
                )
            if tuple(timestep_cond.shape) != (batch, dim):
                raise ValueError(
                    f"timestep_cond has shape {tuple(timestep_cond.shape)}; it must be ({batch}, {dim})"
                )
            timestep_cond = timestep_cond.astype(dtype)
        sinusoid = timestep_sinusoid(timesteps, self.config.block_out_channels[0])
        sinusoid = mx.broadcast_to(sinusoid, (batch, sinusoid.shape[1]))
        return self.time_embedding(sinusoid.astype(dtype), timestep_cond)


def as_timestep(timestep: int | float | mx.array) -> mx.array:
    """A timestep as an array; numbers in float32."""
    return timestep if isinstance(timestep, mx.array) else mx.array(np.asarray(timestep, dtype=np.float32))


def mask_bias(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """(B, L) of 1 and 0 -> (B, 1, L) to add to scores."""
    # Far below any score, and within the range of fp16: exp() of it is exactly zero.
    return ((1 - mask.astype(mx.float32)) * -10_000.0).astype(dtype)[:, None]


def _cut(steps: Sequence[Step], depth: int) -> tuple[int, int]:
    """Where a forward on cached features leaves the loop, and where it comes back: behind the `depth`th skip
    that is kept, and at the `depth`th resnet from the end that takes one."""
    kept = [i for i, step in enumerate(steps) if isinstance(step, Keep)]
    joined = [i for i, step in enumerate(steps) if isinstance(step, Join)]
    return kept[depth - 1] + 1, joined[-depth]


def _features(deep: mx.array, skip: mx.array, cond: Conditions) -> mx.array:
    """The features (B, F, h, w, C) of a cache as a state (N, h, w, C), beside the skip that they will
    meet."""
    has, needs = deep.shape[:-1], (cond.batch, cond.num_frames, *skip.shape[1:3])
    if has != needs or deep.dtype != skip.dtype:
        raise ValueError(
            f"feature_cache has features of (batch, frames, height, width) {has} in {deep.dtype}, "
            f"this sample needs {needs} in {skip.dtype}; use a new cache, or reset() it"
        )
    return deep.reshape(skip.shape[0], *deep.shape[2:])


@dataclass(frozen=True)
class _AddToSkips:
    """The step that adds `down_block_additional_residuals`."""

    residuals: Sequence[mx.array]

    def __call__(self, x: mx.array, cond: Conditions, skips: list[mx.array]) -> mx.array:
        if len(self.residuals) != len(skips):
            raise ValueError(
                f"down_block_additional_residuals has {len(self.residuals)} entries; this network has "
                f"{len(skips)} skip connections and needs one for each"
            )
        for i, residual in enumerate(self.residuals):
            name = f"down_block_additional_residuals[{i}]"
            skips[i] = skips[i] + _channels_last_residual(residual, skips[i], name)
        return x


def _channels_last_residual(residual: mx.array, like: mx.array, name: str) -> mx.array:
    """(N, C, h, w) -> (N, h, w, C), checked against the state that it is added to."""
    n, height, width, channels = like.shape
    wanted = (n, channels, height, width)
    fits = residual.ndim == 4 and all(
        have in (1, want) for have, want in zip(residual.shape, wanted, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(residual.shape)}; it must broadcast to {wanted}")
    return residual.transpose(0, 2, 3, 1).astype(like.dtype)
