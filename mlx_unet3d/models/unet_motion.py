"""UNetMotionModel: the denoising network of AnimateDiff, a Stable Diffusion UNet with motion modules added.

Source: diffusers' class of that name; Guo et al., arXiv:2307.04725. Letters as in `video_unet`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.config import key
from ..layers.blocks import UNetMidBlock2DCrossAttn, UNetMidBlockCrossAttnMotion, entry
from ..layers.conditions import Conditions
from ..layers.embeddings import TimestepEmbedding, timestep_sinusoid
from ..layers.free_noise import FreeNoise
from ..layers.text_context import TextContext
from .feature_cache import FeatureCache
from .ip_adapter import IPAdapterMixin
from .motion_adapter import MotionAdapter, adapter_of, from_unet2d, motion_parameters, original_motion_name
from .video_unet import Inputs, VideoUNet, VideoUNetOutput, as_timestep, make_levels, mask_bias
from .video_unet_config import PerLayer, PerLevel, VideoUNetConfig, block_types, layer_key, level_key

_DOWN, _UP = block_types("Motion")


@dataclass
class UNetMotionConfig(VideoUNetConfig):
    """The keys of `config.json`; defaults are those of diffusers."""

    down_block_types: tuple[str, ...] = _DOWN
    up_block_types: tuple[str, ...] = _UP
    layers_per_block: PerLevel = level_key(2, "resnets of a down block; up blocks have one more")
    downsample_padding: int = key(1, "0 or 1; of the halving convolutions")
    mid_block_scale_factor: float = key(1, "divides the outputs of the resnets of the mid block")
    act_fn: str = key("silu", '"silu", "swish", "mish", "gelu" or "relu"; of resnets and the time embedding')
    norm_num_groups: int = key(32, "groups of the group norms, of motion modules too", least=1)
    norm_eps: float = key(1e-5, "of the group norms (transformers and motion modules keep 1e-6)")
    cross_attention_dim: PerLevel = level_key(1280, "D, channels of the text states")
    transformer_layers_per_block: PerLayer = layer_key(1, "blocks of a spatial transformer")
    reverse_transformer_layers_per_block: PerLayer | None = layer_key(
        None, "the same on the way up, coarsest first (None: the same numbers)"
    )
    temporal_transformer_layers_per_block: PerLayer = layer_key(1, "blocks of a motion module")
    reverse_temporal_transformer_layers_per_block: PerLayer | None = layer_key(
        None, "the same on the way up, coarsest first (None: the same numbers)"
    )
    transformer_layers_per_mid_block: PerLevel | None = key(
        None,
        "blocks of the mid block's transformers, one number or one a layer; None: as the last level",
        least=1,
    )
    temporal_transformer_layers_per_mid_block: PerLevel | None = key(
        1, "blocks of the mid block's motion modules, one number or one a layer", least=1
    )
    use_linear_projection: bool = key(False, "how files store the projections around spatial transformers")
    num_attention_heads: PerLevel = level_key(8, "heads of spatial transformers")
    motion_max_seq_length: int = key(32, "positions of the motion modules, the most frames", least=1)
    motion_num_attention_heads: PerLevel = level_key(8, "heads of motion modules")
    reverse_motion_num_attention_heads: PerLayer | None = key(None, "without effect, as in diffusers")
    use_motion_mid_block: bool = key(True, "motion modules in the mid block")
    mid_block_layers: int = key(1, "transformers of the mid block; it has one more resnet", least=1)
    encoder_hid_dim: int | None = key(None, "without effect, as in diffusers")
    encoder_hid_dim_type: str | None = key(
        None, 'None; "ip_image_proj" while an IP-Adapter is loaded, without effect of its own'
    )
    addition_embed_type: str | None = key(None, '"text_time" for the conditions of SDXL, or None')
    addition_time_embed_dim: int | None = key(None, "channels of each time id's sinusoid (SDXL)", least=1)
    projection_class_embeddings_input_dim: int | None = key(
        None, "channels of pooled text and time ids together (SDXL)", least=1
    )
    time_cond_proj_dim: int | None = key(None, "channels of `timestep_cond`; None for none", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("transformer_layers_per_block", "temporal_transformer_layers_per_block"):
            value = getattr(self, name)
            nested = isinstance(value, tuple) and any(isinstance(n, tuple) for n in value)
            if nested and getattr(self, f"reverse_{name}") is None:
                raise ValueError(
                    f"{name}={value} has a number a layer; give reverse_{name} as well, with one number "
                    "more a level"
                )
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"addition_embed_type={self.addition_embed_type!r} is not known; use 'text_time' or None"
            )
        needed = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type == "text_time" and None in needed:
            raise ValueError(
                "addition_embed_type='text_time' needs addition_time_embed_dim and "
                f"projection_class_embeddings_input_dim; they are {needed}"
            )


@dataclass
class UNetMotionOutput(VideoUNetOutput):
    """`sample`: the prediction, (B, C, F, H, W)."""


class UNetMotionModel(IPAdapterMixin, VideoUNet):
    """Predicts the noise of a noisy video latent at a timestep, given text states.

    Raises ValueError where keys of its config contradict each other.
    """

    config_class = UNetMotionConfig
    class_names = ("UNetMotionModel",)
    takes_context_per_frame = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.free_noise: FreeNoise | None = None
        config = self.config
        levels = make_levels(
            config,
            transformer_layers=config.transformer_layers_per_block,
            motion_heads=config.motion_num_attention_heads,
            motion_layers=config.temporal_transformer_layers_per_block,
            motion_positions=config.motion_max_seq_length,
        )
        reverse = dict(
            transformer_layers=config.reverse_transformer_layers_per_block,
            motion_layers=config.reverse_temporal_transformer_layers_per_block,
        )
        up_levels = [
            replace(level, **{name: entry(value, i) for name, value in reverse.items() if value is not None})
            for i, level in enumerate(reversed(levels))
        ]
        last, mid_layers = levels[-1].transformer_layers, config.transformer_layers_per_mid_block
        if mid_layers is None:
            mid_layers = last if isinstance(last, int) else 1
        mid_motion = config.temporal_transformer_layers_per_mid_block
        mid_motion = 1 if mid_motion is None else mid_motion
        before = {}
        if config.addition_embed_type is not None:
            before["add_embedding"] = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, levels[0].temb_channels
            )
        self._build(
            levels,
            UNetMidBlockCrossAttnMotion if config.use_motion_mid_block else UNetMidBlock2DCrossAttn,
            mid_level=replace(levels[-1], transformer_layers=mid_layers, motion_layers=mid_motion),
            up_levels=up_levels,
            **before,
        )

    def __call__(
        self,
        sample: mx.array,
        timestep: int | float | mx.array,
        encoder_hidden_states: mx.array | TextContext,
        timestep_cond: mx.array | None = None,
        attention_mask: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, mx.array | Sequence[mx.array]] | None = None,
        down_block_additional_residuals: Sequence[mx.array] | None = None,
        mid_block_additional_residual: mx.array | None = None,
        return_dict: bool = True,
        *,
        feature_cache: FeatureCache | None = None,
    ) -> UNetMotionOutput | tuple[mx.array]:
        """One forward.

        Args:
            sample: noisy latents (B, in_channels, F, H, W) in the dtype of the network; F at most
                `motion_max_seq_length`, but with FreeNoise any.
            timestep: one for all, or (B,); usually 0 to 999.
            encoder_hidden_states: text states, a row a frame (B*F, L, D) as in diffusers, or a row a sample
                (B, L, D), which takes less time; or a `TextContext` of them, which projects keys and values
                only once.
            timestep_cond: (B, time_cond_proj_dim), added to the sinusoid of the timestep.
            attention_mask: (B*F, H*W), 1 for pixels to attend to, 0 for others; only for networks of one
                level.
            cross_attention_kwargs: keywords for the attention processors; `scale` scales all LoRA.
            added_cond_kwargs: "text_embeds" (B, E) and "time_ids" (B, n) for SDXL; "image_embeds", a list
                with one array each, for IP-Adapters, see `load_ip_adapter`. With a `TextContext`, the same
                arrays are projected only once.
            down_block_additional_residuals: one for each skip connection and added to it, (N, C, h, w) with
                the frames of a sample in sequence, or broadcastable to that.
            mid_block_additional_residual: the same for the output of the mid block.
            return_dict: False for a tuple.
            feature_cache: stores the deep features of this forward, or supplies those of an earlier one.

        Returns the prediction (B, out_channels, F, H, W) in the dtype of the sample.
        Raises ValueError for other shapes, dtypes and counts, and for more frames than positions.
        """
        context, added = self._take_images(encoder_hidden_states, added_cond_kwargs, sample.shape[0])
        inputs = dict(
            timestep=as_timestep(timestep),
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            added=added,
            down_residuals=down_block_additional_residuals,
            mid_residuals=mid_block_additional_residual,
        )
        x = self._run(sample, context, inputs, feature_cache)
        return UNetMotionOutput(sample=x) if return_dict else (x,)

    def _check_sample(self, sample: mx.array) -> None:
        super()._check_sample(sample)
        self.check_frames(sample.shape[2])

    def check_frames(self, frames: int, name: str = "num_frames") -> None:
        """Raise ValueError for more frames at a time than motion modules have positions, unless they attend
        within windows of FreeNoise; `name` is that of the number for the message."""
        most = self.config.motion_max_seq_length
        if frames > most and self.free_noise is None:
            length = min(most, 16)
            raise ValueError(
                f"{name}={frames} exceeds the motion module's {most} positions; use at most {most}, or "
                f"windows: on the command line --context-frames {length} or --free-noise, in Python "
                f"context_windows=ContextWindows(length={length}) in a call or enable_free_noise()"
            )

    def _prepare(self, x: mx.array, cond: Conditions, inputs: Inputs) -> tuple[mx.array, Conditions]:
        temb = cond.temb
        if "add_embedding" in self:
            temb = temb + self._embed_text_time(inputs["added"] or {}, cond.batch, x.dtype)
        return x, replace(
            cond,
            temb=temb,
            context=self._beside_images(cond.context, inputs["added"], cond.batch),
            pixel_mask=self._pixel_bias(inputs["attention_mask"], x),
            free_noise=self.free_noise,
        )

    def _pixel_bias(self, mask: mx.array | None, x: mx.array) -> mx.array | None:
        """(N, H*W) of 1 and 0 -> (N, 1, H*W) to add to scores."""
        if mask is None:
            return None
        batch, frames, height, width, _ = x.shape
        wanted, levels = (batch * frames, height * width), len(self.config.block_out_channels)
        if tuple(mask.shape) != wanted or levels > 1:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, this network {levels} levels; a mask must be "
                f"{wanted}, one entry a pixel, and fits networks of one level only: leave it out for others"
            )
        return mask_bias(mask, x.dtype)

    def _embed_text_time(self, added: dict[str, mx.array], batch: int, dtype: mx.Dtype) -> mx.array:
        """Pooled text (B, E) and time ids (B, n) of SDXL -> (B, T)."""
        for name in ("text_embeds", "time_ids"):
            if name not in added:
                raise ValueError(
                    f"added_cond_kwargs has no {name!r}, which a network with "
                    "addition_embed_type='text_time' needs"
                )
        text, ids = added["text_embeds"], added["time_ids"]
        dim, total = self.config.addition_time_embed_dim, self.config.projection_class_embeddings_input_dim
        if text.ndim != 2 or text.shape[0] != batch or text.size + ids.size * dim != batch * total:
            raise ValueError(
                f"text_embeds has shape {tuple(text.shape)} and time_ids {tuple(ids.shape)}; they must be "
                f"({batch}, E) and ({batch}, n) with E + {dim} n = {total}, "
                "projection_class_embeddings_input_dim"
            )
        sinusoid = timestep_sinusoid(ids.reshape(-1), dim).reshape(batch, -1)
        both = mx.concatenate([text.astype(mx.float32), sinusoid], axis=-1)
        return self.add_embedding(both.astype(dtype))

    def enable_free_noise(
        self,
        context_length: int | None = 16,
        context_stride: int = 4,
        weighting_scheme: str = "pyramid",
    ) -> None:
        """Let motion modules attend within windows of a clip, which may then have any number of frames.

        `context_length` is None for `motion_max_seq_length`; others see `FreeNoise`. A clip of one window
        stays what it is. ValueError for values out of range, and for windows of more frames than positions.
        """
        most = self.config.motion_max_seq_length
        length = most if context_length is None else context_length
        windows = FreeNoise(length, context_stride, weighting_scheme)
        if windows.context_length > most:
            raise ValueError(
                f"context_length={length} exceeds the motion module's {most} positions; use a context_length "
                f"of at most {most}"
            )
        self.free_noise = windows

    def disable_free_noise(self) -> None:
        """Let motion modules attend among all frames again."""
        self.free_noise = None

    # AnimateDiff's parts.

    from_unet2d = classmethod(from_unet2d)

    def motion_adapter(self) -> MotionAdapter:
        """Return the motion modules as an adapter of their own, which shares their arrays.

        Raises ValueError where no adapter can hold the modules: other numbers of transformer blocks on the
        way up.
        """
        adapter = MotionAdapter(**adapter_of(self.config))
        adapter.load_weights(list(motion_parameters(self).items()), strict=True)
        return adapter.eval()

    def save_motion_modules(self, folder: str | Path, **options: Any) -> list[Path]:
        """Write the motion modules as a `MotionAdapter`; `options` as of `save_pretrained`.

        Raises ValueError while adapters are loaded, and as `motion_adapter`.
        """
        self.refuse_adapters("saving motion modules")
        return self.motion_adapter().save_pretrained(folder, **options)

    def load_motion_modules(self, motion_adapter: MotionAdapter) -> None:
        """Replace the motion modules by those of an adapter, in the dtype of this network.

        Raises ValueError where the adapter has other modules; nothing is changed then.
        """
        own, given = motion_parameters(self), motion_parameters(motion_adapter)
        names = sorted(own.keys() | given.keys())
        differing = [k for k in names if k not in own or k not in given or own[k].shape != given[k].shape]
        if differing:
            raise ValueError(
                f"the motion adapter does not fit this network: {len(differing)} of its parameters differ, "
                f"the first is {differing[0]}; take an adapter for this base model"
            )
        self.load_weights([(k, a.astype(own[k].dtype)) for k, a in given.items()], strict=False)

    def other_layer_names(self, paths: Collection[str]) -> dict[str, str]:
        """Return the names of layers in the files of AnimateDiff's authors, such as their motion LoRAs."""
        names = {original_motion_name(path): path for path in paths if ".motion_modules." in path}
        outs = {name.removesuffix(".0"): path for name, path in names.items() if name.endswith("to_out.0")}
        return names | outs

    def freeze_unet2d_params(self) -> None:
        """Freeze all parameters except those of the motion modules, to fine-tune these."""
        self.freeze()
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for module in block.get("motion_modules", ()):
                module.unfreeze()
                module.freeze(keys=["pe"])  # the positions are constants
