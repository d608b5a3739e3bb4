"""The trunk of all video UNets: levels, the one loop over all layers, and the checks of shared inputs.

A network adds its config, its own inputs and their embeddings. Letters: B batch, C channels, F
frames, H W pixels, N = B*F, L tokens of a context, D their channels, T channels of the time embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers import blocks
from ..layers.activations import silu
from ..layers.adapted import scaled_adapters
from ..layers.blocks import Join, Keep, Level, MidBlock, Run, Step, entry
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

Inputs = dict[str, Any]
"""The arguments of a forward beside sample and context, by name."""


@dataclass
class VideoUNetOutput(ModelOutput):
    """`sample`: the prediction, in the shape of the input sample but for its channels."""

    sample: mx.array


def make_levels(config: Any, **numbers: Any) -> list[Level]:
    """Return the levels of a network, finest first.

    `numbers` are fields of `Level`, one value for all levels or one each. Fields with the name of a config
    key take its value. Heads have `attention_head_dim` channels where the config has that key; elsewhere
    their number is `num_attention_heads`.
    """
    widths = config.block_out_channels
    keys = {f.name: config[f.name] for f in fields(Level) if f.name in config} | numbers

    def level(i: int, width: int) -> Level:
        if "attention_head_dim" in config:
            dim_head = config.attention_head_dim
            heads = width // dim_head
        else:
            heads = entry(config.num_attention_heads, i)
            dim_head = width // heads
        own = {name: entry(value, i) for name, value in keys.items()}
        return Level(width, 4 * widths[0], heads, dim_head, **own)

    return [level(i, width) for i, width in enumerate(widths)]


class VideoUNet(UNetOptions, AttentionControl, PretrainedModel):
    """The base of the video UNets. A subclass calls `_build`, and adds its own inputs in `_prepare`."""

    lora_component = "unet"
    channel_axis: ClassVar[int] = 1
    """The axis of the channels of samples; frames, height and width follow in order."""
    takes_context_per_frame: ClassVar[bool] = False
    """Contexts may have a row a frame, instead of a row a sample."""

    def _build(
        self,
        levels: Sequence[Level],
        mid: type[MidBlock],
        *,
        mid_level: Level | None = None,
        up_levels: Sequence[Level] | None = None,
        image_channels: int = 0,
        **before: nn.Module | list[nn.Module],
    ) -> None:
        """Make all modules, in the order of diffusers' registration; `before` come after the time embedding.

        Args:
            levels: of the way down, finest first.
            mid: class of the mid block.
            mid_level: of the mid block; None for the last of `levels`.
            up_levels: of the way up, coarsest first; None for `levels` in reverse.
            image_channels: channels that `_prepare` puts beside the sample.
        """
        config, first, last = self.config, levels[0], len(levels) - 1
        up = up_levels or levels[::-1]
        widths = [level.channels for level in levels]
        layers = [entry(config.layers_per_block, i) for i in range(len(levels))]
        padding, scale = config.get("downsample_padding", 1), config.get("mid_block_scale_factor", 1.0)
        self.conv_in = Conv2d(config.in_channels + image_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            widths[0], first.temb_channels, first.act_fn, config.get("time_cond_proj_dim")
        )
        for name, module in before.items():
            self[name] = module
        inputs = (widths[0], *widths)
        self.down_blocks = [
            getattr(blocks, name)(level, inputs[i], layers[i], i < last, padding)
            for i, (name, level) in enumerate(zip(config.down_block_types, levels, strict=True))
        ]
        # Up block i stands between the widths i and i + 2 of these.
        around = (widths[-1], *widths[::-1], widths[0])
        self.up_blocks = [
            getattr(blocks, name)(level, around[i + 2], around[i], layers[last - i] + 1, i < last, i)
            for i, (name, level) in enumerate(zip(config.up_block_types, up, strict=True))
        ]
        self.mid_block = mid(mid_level or levels[-1], config.get("mid_block_layers", 1), scale)
        self.conv_norm_out = group_norm(first.norm_num_groups, widths[0], first.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    # The forward.

    def _prepare(self, x: mx.array, cond: Conditions, inputs: Inputs) -> tuple[mx.array, Conditions]:
        """Return the input of `conv_in` (B, F, H, W, C) and the conditions, with the network's own `inputs`.

        Args:
            x: the sample (B, F, H, W, C).
            cond: conditions that all networks share.
        """
        raise NotImplementedError

    def _run(
        self,
        sample: mx.array,
        context: Context | None,
        inputs: Inputs,
        feature_cache: FeatureCache | None = None,
    ) -> mx.array:
        """Return the prediction in the layout of the sample, compiled or not, with or without the features
        of an earlier one.

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
        keywords = inputs["cross_attention_kwargs"]
        if keywords is not None:  # a trace takes no scalars of NumPy
            keywords = {k: v.item() if getattr(v, "size", 0) == 1 else v for k, v in keywords.items()}
            inputs = inputs | {"cross_attention_kwargs": keywords}
        forward = self._forward if self._compiled is None else self._compiled
        x, *made = forward(sample, context, inputs, depth, deep)
        if made:
            feature_cache.keep(made[0])
        return x

    def _forward(
        self,
        sample: mx.array,
        context: Context | None,
        inputs: Inputs,
        depth: int | None = None,
        deep: mx.array | None = None,
    ) -> tuple[mx.array, ...]:
        """Return the prediction. With a `depth` and no `deep`, also return the input of the last `depth`
        layers of the way up; given as `deep`, it replaces all layers below."""
        keywords = inputs["cross_attention_kwargs"]
        with scaled_adapters((keywords or {}).get("scale", 1.0)):
            self._check_sample(sample)
            x = mx.moveaxis(sample, self.channel_axis, -1)  # (B, F, H, W, C)
            batch, frames = x.shape[:2]
            cond = Conditions(
                batch,
                frames,
                temb=self._embed_time(inputs["timestep"], batch, x.dtype, inputs.get("timestep_cond")),
                context=self._check_context(context, batch, frames),
                cross_attention_kwargs=keywords,
                freeu=self.freeu,
                chunks=self.chunks,
            )
            x, cond = self._prepare(x, cond, inputs)
            x = x.reshape(batch * frames, *x.shape[2:])  # (N, H, W, C)
            steps = list(self._steps(inputs.get("down_residuals"), inputs.get("mid_residuals")))
            start, stop = (None, None) if depth is None else _cut(steps, depth)
            skips: list[mx.array] = []
            made: list[mx.array] = []
            for i, step in enumerate(steps):
                if i == stop and deep is None:
                    made.append(x.reshape(batch, frames, *x.shape[1:]))
                elif i == stop:
                    x = _features(deep, skips[-1], cond)
                elif deep is not None and start <= i < stop:
                    continue
                # Only this name refers to the state, so the previous one is freed.
                x = step(x, cond, skips)
            # (N, H, W, C) -> (B, F, H, W, C) -> the layout of the sample
            return mx.moveaxis(x.reshape(batch, frames, *x.shape[1:]), -1, self.channel_axis), *made

    def _steps(
        self, down_residuals: Sequence[mx.array] | None, mid_residual: mx.array | None
    ) -> Iterator[Step]:
        """Yield all steps of a forward, in order."""
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

    def _check_sample(self, sample: mx.array) -> None:
        shape: list[int | str] = ["batch", "frames", "height", "width"]
        shape.insert(self.channel_axis, self.config.in_channels)
        check_input("sample", sample, shape, self.dtype)

    def _check_context(self, context: Context | None, batch: int, frames: int) -> Context | None:
        """Return the context, None where nothing attends to it; ValueError for another shape or dtype."""
        dim = entry(self.config.cross_attention_dim, -1)  # the mid block's, which always attends
        if dim is None:
            return None
        rows, note = batch, ": one row of text a sample"
        states = context.states if isinstance(context, TextContext) else context
        if self.takes_context_per_frame:
            note = f" or ({batch * frames}, tokens, {dim}): one row of text a sample or frame"
            if states is not None and states.shape[:1] == (batch * frames,):
                rows = batch * frames
        note = f"{note}, as wide as cross_attention_dim"
        check_input("encoder_hidden_states", states, (rows, "tokens", dim), self.dtype, note)
        return context

    def _embed_time(
        self, timestep: mx.array, batch: int, dtype: mx.Dtype, timestep_cond: mx.array | None = None
    ) -> mx.array:
        """-> (B, T)."""
        sinusoid = self._sinusoid("timestep", timestep, batch, dtype)
        dim = self.config.get("time_cond_proj_dim")
        if timestep_cond is not None:
            if dim is None:
                raise ValueError(
                    "timestep_cond is given, but this network was built with time_cond_proj_dim=None"
                )
            check_input("timestep_cond", timestep_cond, (batch, dim))
            timestep_cond = timestep_cond.astype(dtype)
        return self.time_embedding(sinusoid, timestep_cond)

    def _sinusoid(self, name: str, numbers: mx.array, batch: int, dtype: mx.Dtype) -> mx.array:
        """One number for all, or (B,) -> (B, C of the finest level)."""
        if numbers.size not in (1, batch) or numbers.ndim > 1:
            raise ValueError(f"{name} has shape {tuple(numbers.shape)}; it must be one number or ({batch},)")
        rows = mx.broadcast_to(numbers.astype(mx.float32).reshape(-1), (batch,))
        return timestep_sinusoid(rows, self.config.block_out_channels[0]).astype(dtype)


def check_input(
    name: str,
    array: mx.array | None,
    shape: Sequence[int | str],
    dtype: mx.Dtype | None = None,
    note: str = "",
) -> None:
    """Raise ValueError unless `array` has this shape, where words stand for any length above 0, and the
    dtype of the network (None: any)."""
    wanted = f"({', '.join(map(str, shape))})"
    if array is None:
        raise ValueError(f"{name} is None; this network needs {wanted}{note}")
    pairs = zip(array.shape, shape, strict=False)
    if array.ndim != len(shape) or not all(n == w or (n and isinstance(w, str)) for n, w in pairs):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; it must be {wanted}{note}")
    if dtype is not None and array.dtype != dtype:
        raise ValueError(
            f"{name} is {array.dtype} but the network is {dtype}; cast it: {name}.astype(unet.dtype)"
        )


def as_timestep(timestep: int | float | mx.array) -> mx.array:
    """Return a timestep as an array, numbers in float32."""
    return timestep if isinstance(timestep, mx.array) else mx.array(np.asarray(timestep, dtype=np.float32))


def mask_bias(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """(B, L) of 1 and 0 -> (B, 1, L) to add to scores."""
    # Far below any score and within the range of fp16, so that its exp() is exactly zero.
    return ((1 - mask.astype(mx.float32)) * -10_000.0).astype(dtype)[:, None]


def _cut(steps: Sequence[Step], depth: int) -> tuple[int, int]:
    """Return the index of the step at which a forward on cached features leaves the loop, after the `depth`th
    skip that is kept, and of the one at which it comes back, the `depth`th from the end that takes a skip."""
    kept = [i for i, step in enumerate(steps) if isinstance(step, Keep)]
    joined = [i for i, step in enumerate(steps) if isinstance(step, Join)]
    return kept[depth - 1] + 1, joined[-depth]


def _features(deep: mx.array, skip: mx.array, cond: Conditions) -> mx.array:
    """Return the features (B, F, h, w, C) of a cache as a state (N, h, w, C), checked against the skip that
    they will be joined with."""
    has, needs = deep.shape[:-1], (cond.batch, cond.num_frames, *skip.shape[1:3])
    if has != needs or deep.dtype != skip.dtype:
        raise ValueError(
            f"feature_cache has features of (batch, frames, height, width) {has} in {deep.dtype}, "
            f"this sample needs {needs} in {skip.dtype}; use a new cache, or reset() it"
        )
    return deep.reshape(skip.shape[0], *deep.shape[2:])


@dataclass(frozen=True)
class _AddToSkips:
    """The step that adds `down_block_additional_residuals` to the skips."""

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
    if residual.ndim != 4 or any(m not in (1, w) for m, w in zip(residual.shape, wanted, strict=True)):
        raise ValueError(f"{name} has shape {tuple(residual.shape)}; it must broadcast to {wanted}")
    return residual.transpose(0, 2, 3, 1).astype(like.dtype)
