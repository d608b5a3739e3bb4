"""UNet3DConditionModel: the denoising network of ModelScope text-to-video, ZeroScope and their kin.

Source: diffusers' class of that name (documentation of 0.23, numerics of 0.42). Letters: B batch, C
channels, F frames, H W pixels, N = B*F, L text tokens, D their channels.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import numpy as np

from ..checkpoints import ModelConfig, PretrainedModel
from ..checkpoints.originals import unet_layer_names
from ..compilation import CompiledForward
from ..layers.activations import silu
from ..layers.adapted import scaled_adapters, walk
from ..layers.convolution import Conv2d, set_convolution
from ..layers.embeddings import TimestepEmbedding, timestep_sinusoid
from ..layers.freeu import FreeU
from ..layers.normalization import group_norm
from ..layers.slicing import Slicing, by_frames
from ..layers.text_context import TextContext
from ..layers.transformers import BasicTransformerBlock, TransformerTemporalModel
from ..layers.unet_3d_blocks import (
    DOWN_BLOCKS,
    UP_BLOCKS,
    BlockOptions,
    Conditions,
    UNetMidBlock3DCrossAttn,
)
from .attention_control import AttentionControl
from .feature_cache import FeatureCache
from .outputs import ModelOutput

# `transformer_in` always has this many heads, of attention_head_dim channels each.
_TRANSFORMER_IN_HEADS = 8

# Far above any network, and few enough to be built before the weights are held against it.
_MOST_LEVELS, _MOST_LAYERS = 8, 100

# Keys of early ModelScope configs, which later became fixed, with the values that this network has.
_FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock3DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": (False, None),
    "use_linear_projection": (True,),
}


@dataclass
class UNet3DConditionConfig(ModelConfig):
    """The keys of `config.json`; defaults are those of diffusers and of ModelScope's 1.7b checkpoint."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock3D",
        "CrossAttnDownBlock3D",
        "CrossAttnDownBlock3D",
        "DownBlock3D",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlock3D",
        "CrossAttnUpBlock3D",
        "CrossAttnUpBlock3D",
        "CrossAttnUpBlock3D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | None = 1024
    attention_head_dim: int = 64
    num_attention_heads: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNet3DConditionConfig":
        for key, values in _FIXED_KEYS.items():
            if key in config and config[key] not in values:
                raise ValueError(
                    f"config: {key}={config[key]!r} describes another network; "
                    f"UNet3DConditionModel has {key}={values[0]!r}"
                )
        return super().from_dict({k: v for k, v in config.items() if k not in _FIXED_KEYS})

    def __post_init__(self) -> None:
        levels = len(self.down_block_types)
        if levels > _MOST_LEVELS:
            raise ValueError(f"down_block_types has {levels} levels; {_MOST_LEVELS} are the most")
        if self.num_attention_heads is not None:
            raise NotImplementedError(
                f"num_attention_heads={self.num_attention_heads}: the number of heads follows from "
                "attention_head_dim (channels of a head) in this network; leave it None"
            )
        if len(self.up_block_types) != levels:
            raise ValueError(
                "Must provide the same number of `down_block_types` as `up_block_types`: got "
                f"{self.down_block_types} and {self.up_block_types}"
            )
        if len(self.block_out_channels) != levels:
            raise ValueError(
                "Must provide the same number of `block_out_channels` as `down_block_types`: got "
                f"{self.block_out_channels} and {self.down_block_types}"
            )
        for names, known in (
            (self.down_block_types, DOWN_BLOCKS),
            (self.up_block_types, UP_BLOCKS),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"`{name}` does not exist; use one of {sorted(known)}")
        attending = [n for n in (*self.down_block_types, *self.up_block_types) if "CrossAttn" in n]
        if attending and self.cross_attention_dim is None:
            raise ValueError(f"cross_attention_dim must be specified for {attending[0]}")
        for key in (
            "in_channels",
            "out_channels",
            "layers_per_block",
            "norm_num_groups",
            "attention_head_dim",
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r} must be an integer of at least 1")
        if self.layers_per_block > _MOST_LAYERS:
            raise ValueError(f"layers_per_block={self.layers_per_block} is above {_MOST_LAYERS}")
        for key in ("cross_attention_dim", "time_cond_proj_dim"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value!r} must be at least 1, or None")
        narrowest = min(self.block_out_channels)
        if narrowest < 1:
            raise ValueError(f"block_out_channels={self.block_out_channels} must be at least 1 each")
        if not self.mid_block_scale_factor:
            raise ValueError("mid_block_scale_factor=0 would divide by 0")
        if self.attention_head_dim > narrowest:
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim} exceeds the {narrowest} channels of a block, "
                "which would leave it no head; use a divisor of the entries of block_out_channels"
            )
        if self.downsample_padding not in (0, 1):
            raise ValueError(
                f"downsample_padding={self.downsample_padding!r} does not fit the skips; use 0 or 1"
            )


@dataclass
class UNet3DConditionOutput(ModelOutput):
    """`sample`: the prediction, (B, C, F, H, W)."""

    sample: mx.array


class UNet3DConditionModel(AttentionControl, PretrainedModel):
    """Predicts noise, velocity or sample of a noisy video latent at a timestep, given text states.

    Args:
        sample_size: height and width of the latents it was trained on; only pipelines look at it.
        in_channels, out_channels: of the sample and of the prediction.
        down_block_types: "DownBlock3D" or "CrossAttnDownBlock3D" a level, finest first.
        up_block_types: "UpBlock3D" or "CrossAttnUpBlock3D" a level, coarsest first.
        block_out_channels: channels a level; multiples of `norm_num_groups`.
        layers_per_block: resnets of a down block; up blocks have one more.
        downsample_padding: 0 or 1; of the halving convolutions.
        mid_block_scale_factor: divides the outputs of the two resnets of the mid block.
        act_fn: "silu", "swish", "mish", "gelu" or "relu"; of resnets and the time embedding.
        norm_num_groups, norm_eps: of the group norms (transformers keep 1e-6, temporal convolutions 1e-5).
        cross_attention_dim: D, channels of the text states; None without CrossAttn blocks only.
        attention_head_dim: channels of an attention head, at most the narrowest block's.
        num_attention_heads: must be None.
        time_cond_proj_dim: channels of `timestep_cond`; None for none.

    Raises ValueError where these do not fit together.
    """

    config_class = UNet3DConditionConfig
    class_names = ("UNet3DConditionModel",)
    lora_component = "unet"

    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: Sequence[str] = UNet3DConditionConfig.down_block_types,
        up_block_types: Sequence[str] = UNet3DConditionConfig.up_block_types,
        block_out_channels: Sequence[int] = UNet3DConditionConfig.block_out_channels,
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | None = 1024,
        attention_head_dim: int = 64,
        num_attention_heads: int | None = None,
        time_cond_proj_dim: int | None = None,
    ):
        super().__init__()
        config = UNet3DConditionConfig(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            downsample_padding=downsample_padding,
            mid_block_scale_factor=mid_block_scale_factor,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            time_cond_proj_dim=time_cond_proj_dim,
        )
        self.config = config
        widths = config.block_out_channels
        levels = len(widths)
        options = BlockOptions(
            temb_channels=4 * widths[0],
            attention_head_dim=attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            act_fn=act_fn,
        )

        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], options.temb_channels, act_fn, time_cond_proj_dim)
        self.transformer_in = TransformerTemporalModel(
            _TRANSFORMER_IN_HEADS, attention_head_dim, widths[0], norm_num_groups
        )
        self.down_blocks = [
            DOWN_BLOCKS[name](
                widths[max(i - 1, 0)],
                widths[i],
                layers_per_block,
                options,
                add_downsample=i < levels - 1,
                downsample_padding=downsample_padding,
            )
            for i, name in enumerate(config.down_block_types)
        ]
        coarse_first = widths[::-1]
        self.up_blocks = [
            UP_BLOCKS[name](
                coarse_first[min(i + 1, levels - 1)],
                coarse_first[max(i - 1, 0)],
                coarse_first[i],
                layers_per_block + 1,
                options,
                add_upsample=i < levels - 1,
                resolution_idx=i,
            )
            for i, name in enumerate(config.up_block_types)
        ]
        # After the up blocks: slices and processors are listed in the order of diffusers' registration.
        self.mid_block = UNetMidBlock3DCrossAttn(widths[-1], options, mid_block_scale_factor)
        self.conv_norm_out = group_norm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = Conv2d(widths[0], out_channels, 3, padding=1)

        self.freeu: FreeU | None = None
        self._compiled: _CompiledUNet | None = None
        self.slicing = Slicing()

    def __call__(
        self,
        sample: mx.array,
        timestep: int | float | mx.array,
        encoder_hidden_states: mx.array | TextContext | None = None,
        class_labels: None = None,
        timestep_cond: mx.array | None = None,
        attention_mask: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Sequence[mx.array] | None = None,
        mid_block_additional_residual: mx.array | None = None,
        return_dict: bool = True,
        *,
        feature_cache: FeatureCache | None = None,
    ) -> UNet3DConditionOutput | tuple[mx.array]:
        """One forward.

        Args:
            sample: noisy latents (B, in_channels, F, H, W) in the dtype of the network; any F, H, W >= 1.
            timestep: one for all, or (B,); usually 0 to 999.
            encoder_hidden_states: text states (B, L, cross_attention_dim) in the dtype of the network,
                or a `TextContext` of them, whose keys and values are projected only once.
            class_labels: must be None; the network has no class embedding.
            timestep_cond: (B, time_cond_proj_dim), added to the sinusoid of the timestep.
            attention_mask: (B, L), 1 for text tokens to attend to, 0 for others.
            cross_attention_kwargs: keywords for the attention processors; `scale` scales all LoRA.
            down_block_additional_residuals: added to the skip connections, one each, (N, C, h, w) with
                frames of a sample together, or broadcasting to that.
            mid_block_additional_residual: the same for the output of the mid block.
            return_dict: False for a tuple.
            feature_cache: takes the deep features of this forward, or gives those of an earlier one.

        Returns the prediction (B, out_channels, F, H, W) in the dtype of the sample.
        Raises ValueError for shapes, dtypes and counts that do not fit.
        """
        if class_labels is not None:
            raise ValueError(
                "class_labels must be None: UNet3DConditionModel has no class embedding "
                "(diffusers takes them and ignores them)"
            )
        if not isinstance(timestep, mx.array):
            timestep = mx.array(np.asarray(timestep, dtype=np.float32))
        depth, deep = None, None
        if feature_cache is not None:
            if down_block_additional_residuals is not None or mid_block_additional_residual is not None:
                raise ValueError(
                    "a feature_cache would leave out additional residuals; give one or the other"
                )
            depth = feature_cache.depth
            self.check_cache_depth(depth)
            deep = feature_cache.next()
        forward = self._forward if self._compiled is None else self._compiled
        if cross_attention_kwargs is not None:  # a trace takes no scalars of NumPy
            cross_attention_kwargs = {
                name: value.item() if isinstance(value, np.generic | mx.array) and value.size == 1 else value
                for name, value in cross_attention_kwargs.items()
            }
        x, *made = forward(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond,
            attention_mask,
            cross_attention_kwargs,
            down_block_additional_residuals,
            mid_block_additional_residual,
            depth,
            deep,
        )
        if made:
            feature_cache.keep(made[0])
        return UNet3DConditionOutput(sample=x) if return_dict else (x,)

    def _forward(
        self,
        sample: mx.array,
        timestep: mx.array,
        encoder_hidden_states: mx.array | TextContext | None,
        timestep_cond: mx.array | None,
        attention_mask: mx.array | None,
        cross_attention_kwargs: dict[str, Any] | None,
        *others: Any,
    ) -> tuple[mx.array, ...]:
        """The forward of `_run_layers`, with adapters as much as `scale` says, also while it is traced."""
        inputs = sample, timestep, encoder_hidden_states, timestep_cond, attention_mask
        with scaled_adapters((cross_attention_kwargs or {}).get("scale", 1.0)):
            return self._run_layers(*inputs, cross_attention_kwargs, *others)

    def _run_layers(
        self,
        sample: mx.array,
        timestep: mx.array,
        encoder_hidden_states: mx.array | TextContext | None,
        timestep_cond: mx.array | None,
        attention_mask: mx.array | None,
        cross_attention_kwargs: dict[str, Any] | None,
        down_block_additional_residuals: Sequence[mx.array] | None,
        mid_block_additional_residual: mx.array | None,
        depth: int | None = None,
        deep: mx.array | None = None,
    ) -> tuple[mx.array, ...]:
        """The prediction; with `depth`, and without what it made earlier, also the input of the last `depth`
        layers of the up path, which as `deep` stands for all that is below."""
        batch, frames = self._check_sample(sample)
        cond = Conditions(
            temb=self._embed_time(timestep, timestep_cond, batch, sample.dtype),
            num_frames=frames,
            context=self._check_context(encoder_hidden_states, batch, sample.dtype),
            context_mask=self._context_bias(attention_mask, encoder_hidden_states, sample.dtype),
            cross_attention_kwargs=cross_attention_kwargs,
            slicing=self.slicing,
        )
        # (B, C, F, H, W) -> (N, H, W, C)
        x = sample.transpose(0, 2, 3, 4, 1).reshape(batch * frames, *sample.shape[3:], -1)
        x = by_frames(self.conv_in, [x], cond.slicing.frames)
        x = self.transformer_in(x, frames, cross_attention_kwargs, cond.slicing)

        skips = list(islice(self._down(x, cond), None if deep is None else depth))
        if deep is None:
            x = skips[-1]
            if down_block_additional_residuals is not None:
                skips = _add_residuals(skips, down_block_additional_residuals)
            x = self.mid_block(x, cond)
            if mid_block_additional_residual is not None:
                name = "mid_block_additional_residual"
                x = x + _channels_last_residual(mid_block_additional_residual, x, name)
        else:
            has, needs = deep.shape[:-1], (batch, frames, *skips[-1].shape[1:3])
            if has != needs or deep.dtype != sample.dtype:
                raise ValueError(
                    f"feature_cache has features of (batch, frames, height, width) {has} in {deep.dtype}, "
                    f"this sample needs {needs} in {sample.dtype}; use a new cache, or reset() it"
                )
            x = deep.reshape(skips[-1].shape[0], *deep.shape[2:])

        made: list[mx.array] = []
        left, running = sum(len(block.resnets) for block in self.up_blocks), deep is None
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                if left == depth and running:
                    made.append(x.reshape(batch, frames, *x.shape[1:]))
                running = running or left == depth
                if running:
                    # Whoever holds a state keeps it from being freed: no more than the last one is held.
                    x = block.resnet(i, x, skips.pop(), cond, self.freeu)
                    for step in block.steps(i, cond, block.attends):
                        x = step(x)
                left -= 1
            if running:
                # Where halving rounded, doubling must meet the size of the next skip.
                x = block.upsample(x, cond, skips[-1].shape[1:3] if skips else None)

        x = by_frames(lambda h: self.conv_out(self.conv_norm_out(h, act=silu)), [x], cond.slicing.frames)
        # (N, H, W, C) -> (B, C, F, H, W)
        x = x.reshape(batch, frames, *x.shape[1:]).transpose(0, 4, 1, 2, 3)
        return x, *made

    def _down(self, x: mx.array, cond: Conditions) -> Iterator[mx.array]:
        """The skip connections, of which the last goes on to the mid block."""
        yield x
        for block in self.down_blocks:
            outputs = block(x, cond)
            for x in outputs:
                yield x

    def other_layer_names(self, paths: Collection[str]) -> dict[str, str]:
        """Those of ModelScope's original network."""
        return unet_layer_names(paths, self.config.layers_per_block)

    # What goes into a forward.

    def _check_sample(self, sample: mx.array) -> tuple[int, int]:
        channels = self.config.in_channels
        if sample.ndim != 5 or sample.shape[1] != channels or 0 in sample.shape:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; it must be "
                f"(batch, {channels}, frames, height, width)"
            )
        if sample.dtype != self.dtype:
            raise ValueError(
                f"sample is {sample.dtype} but the network is {self.dtype}; cast it: "
                "sample.astype(unet.dtype)"
            )
        return sample.shape[0], sample.shape[2]

    def _check_context(
        self, context: mx.array | TextContext | None, batch: int, dtype: mx.Dtype
    ) -> mx.array | TextContext | None:
        dim = self.config.cross_attention_dim
        if dim is None:
            return None  # nothing attends to text
        if context is None:
            raise ValueError(f"encoder_hidden_states is None; this network needs ({batch}, tokens, {dim})")
        states = context.states if isinstance(context, TextContext) else context
        if states.ndim != 3 or states.shape[0] != batch or states.shape[2] != dim:
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(states.shape)}; it must be "
                f"({batch}, tokens, {dim}): one row of text a sample, as wide as cross_attention_dim"
            )
        if states.dtype != dtype:
            raise ValueError(
                f"encoder_hidden_states is {states.dtype} but the sample is {dtype}; cast it with astype"
            )
        return context

    def _context_bias(
        self, mask: mx.array | None, context: mx.array | TextContext | None, dtype: mx.Dtype
    ) -> mx.array | None:
        """(B, L) of 1 and 0 -> (B, 1, L) to add to scores."""
        if mask is None:
            return None
        if self.config.cross_attention_dim is None:
            raise ValueError(
                "attention_mask: this network does not attend to text (cross_attention_dim=None)"
            )
        states = context.states if isinstance(context, TextContext) else context
        if tuple(mask.shape) != tuple(states.shape[:2]):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; it must be {tuple(states.shape[:2])}, "
                "one entry a text token"
            )
        # Far below any score, and within the range of fp16: exp() of it is exactly zero.
        return ((1 - mask.astype(mx.float32)) * -10_000.0).astype(dtype)[:, None]

    def _embed_time(
        self, timestep: mx.array, timestep_cond: mx.array | None, batch: int, dtype: mx.Dtype
    ) -> mx.array:
        """-> (B, 4 * C0)."""
        timesteps = timestep.astype(mx.float32).reshape(-1)
        if timesteps.size not in (1, batch) or timestep.ndim > 1:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; it must be one number or ({batch},)"
            )
        dim = self.config.time_cond_proj_dim
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

    def check_cache_depth(self, depth: int) -> None:
        """ValueError for a `depth` of a `FeatureCache` that does not suit this network."""
        most = sum(len(block.resnets) for block in self.up_blocks) - 1
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= most:
            raise ValueError(
                f"the depth of a feature cache is {depth!r}; it must be an integer from 1 to {most}, which "
                f"leaves at least one of the {most + 1} layers on the way up to save"
            )

    # Options.

    def compile(self) -> None:
        """Run forwards as traces of `mx.compile`, which fuse all chains of element-wise operations.

        Those of the layers are fused either way. What is left is in adapters beside the weights, in FreeU and
        in processors of your own; without these it only takes longer to start. A trace is made
        for each shape and dtype at its first call. Changes of weights, adapters, quantization, processors and
        options are seen: they are part of what a trace is kept by. Processors of your own must neither
        evaluate arrays nor keep them. Results are the plain forward's, up to rounding.
        """
        self._compiled = _CompiledUNet(self)

    def uncompile(self) -> None:
        """Run plain forwards again."""
        self._compiled = None

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (arXiv:2309.11497): `s1`, `s2` scale low frequencies of the skips of the two coarsest up
        blocks, `b1`, `b2` half of their backbone channels. For video: 0.9, 0.2, 1.2, 1.4. A zero among
        them turns it off, as in diffusers."""
        factors = (s1, s2, b1, b2)
        if not all(np.isfinite(f) for f in factors):
            raise ValueError(f"FreeU factors (s1, s2, b1, b2)={factors} must be finite numbers")
        self.freeu = FreeU(*map(float, factors)) if all(factors) else None

    def disable_freeu(self) -> None:
        """Turn FreeU off."""
        self.freeu = None

    def set_convolution(self, mode: str) -> None:
        """ "fast", or "precise": on a Mac's GPU, 3x3 convolutions as direct sums accumulated in float32 where
        MLX would take Winograd's, which rounds each to 0.7 % in float16 and to 6 % in bfloat16. "auto", the
        default, is precise in bfloat16 and else fast. No difference elsewhere. ValueError for other modes."""
        set_convolution(self.modules(), mode)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Run feed-forwards on pieces, to save memory; the result stays the same.

        Args:
            chunk_size: size of a piece, 1 for None or 0; must divide the axis in every block, or the
                forward raises a ValueError.
            dim: 0 cuts the batch axis (B*F for spatial, B*H*W for temporal transformers), 1 the tokens
                (H*W and F).
        """
        if dim not in (0, 1):
            raise ValueError(f"Make sure to set `dim` to either 0 or 1, not {dim}")
        size = 1 if chunk_size is None or chunk_size == 0 else chunk_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"chunk_size={chunk_size!r} must be None or an integer of at least 1")
        self._set_chunking(size, dim)

    def disable_forward_chunking(self) -> None:
        """Run feed-forwards at once again."""
        self._set_chunking(None, 0)

    def enable_frame_chunking(self, frames: int = 1) -> None:
        """Take `frames` frames at a time through spatial layers (resnets, resampling, spatial transformers),
        to save memory; the result stays the same.

        ValueError for less than 1.
        """
        self.slicing = dataclasses.replace(self.slicing, frames=frames)

    def disable_frame_chunking(self) -> None:
        """Take all frames at once again."""
        self.slicing = dataclasses.replace(self.slicing, frames=None)

    def enable_pixel_chunking(self, pixels: int = 64) -> None:
        """Take `pixels` pixels of all frames at a time through temporal layers, to save memory.

        The result stays the same up to rounding: the statistics of group norms, which run over all pixels,
        are taken first. ValueError for less than 1.
        """
        self.slicing = dataclasses.replace(self.slicing, pixels=pixels)

    def disable_pixel_chunking(self) -> None:
        """Take all pixels at once again."""
        self.slicing = dataclasses.replace(self.slicing, pixels=None)

    def enable_block_evaluation(self) -> None:
        """Evaluate after each layer of a block, not all at the end: what is done with is then freed while the
        forward is built. The result stays the same; within `mx.compile` it has no effect."""
        self.slicing = dataclasses.replace(self.slicing, blockwise=True)

    def disable_block_evaluation(self) -> None:
        """Evaluate at the end, or where the caller does."""
        self.slicing = dataclasses.replace(self.slicing, blockwise=False)

    def _set_chunking(self, size: int | None, dim: int) -> None:
        for _, module in walk(self):
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(size, dim)


class _CompiledUNet(CompiledForward):
    """The compiled `_forward` of a network; keys and values of a `TextContext` are inputs of the trace."""

    def __init__(self, unet: UNet3DConditionModel):
        super().__init__(unet, self._trace)
        self._unet = unet
        self._projected: WeakSet[TextContext] = WeakSet()

    def __call__(
        self, sample: mx.array, timestep: mx.array, context: mx.array | TextContext | None, *others: Any
    ) -> tuple[mx.array, ...]:
        if not isinstance(context, TextContext):
            return super().__call__(sample, timestep, context, *others)
        if context not in self._projected:
            # Making a graph runs none of it, but has the context make all keys and values.
            self._unet._forward(sample, timestep, context, *others[:-1])  # no features: all layers
            mx.eval(context.take_apart()[2])
            self._projected.add(context)
        return super().__call__(sample, timestep, context.take_apart(), *others)

    def _trace(
        self, sample: mx.array, timestep: mx.array, context: Any, *others: Any
    ) -> tuple[mx.array, ...]:
        if isinstance(context, tuple):
            context = TextContext.put_together(*context)
        return self._unet._forward(sample, timestep, context, *others)


def _add_residuals(skips: list[mx.array], residuals: Sequence[mx.array]) -> list[mx.array]:
    if len(residuals) != len(skips):
        raise ValueError(
            f"down_block_additional_residuals has {len(residuals)} entries; this network has {len(skips)} "
            "skip connections and needs one for each"
        )
    name = "down_block_additional_residuals[{}]"
    return [
        skip + _channels_last_residual(residual, skip, name.format(i))
        for i, (skip, residual) in enumerate(zip(skips, residuals, strict=True))
    ]


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
