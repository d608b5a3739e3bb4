"""UNet3DConditionModel: the denoising network of ModelScope text-to-video, ZeroScope and their kin.

Source: diffusers' class of that name (documentation of 0.23, numerics of 0.42). Letters as in `video_unet`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..checkpoints.config import key
from ..checkpoints.originals import unet_layer_names
from ..layers.blocks import UNetMidBlock3DCrossAttn
from ..layers.conditions import Conditions
from ..layers.text_context import TextContext
from ..layers.transformers import TransformerTemporalModel
from .added_condition import AddedCondition
from .feature_cache import FeatureCache
from .video_unet import Inputs, VideoUNet, VideoUNetOutput, as_timestep, check_input, make_levels, mask_bias
from .video_unet_config import VideoUNetConfig, block_types

# `transformer_in` always has this many heads, of attention_head_dim channels each.
_TRANSFORMER_IN_HEADS = 8

DOWN_BLOCKS, UP_BLOCKS = block_types("3D")

# Keys of early ModelScope configs that are constants of this network, with their values.
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
class UNet3DConditionConfig(VideoUNetConfig):
    """The keys of `config.json`; defaults are those of diffusers and of ModelScope's 1.7b checkpoint."""

    down_block_types: tuple[str, ...] = DOWN_BLOCKS
    up_block_types: tuple[str, ...] = UP_BLOCKS
    layers_per_block: int = key(2, "resnets of a down block; up blocks have one more", least=1)
    downsample_padding: int = key(1, "0 or 1; of the halving convolutions")
    mid_block_scale_factor: float = key(1, "divides the outputs of the two resnets of the mid block")
    act_fn: str = key("silu", '"silu", "swish", "mish", "gelu" or "relu"; of resnets and the time embedding')
    norm_num_groups: int = key(32, "groups of the group norms", least=1)
    norm_eps: float = key(1e-5, "of the group norms (transformers keep 1e-6, temporal convolutions 1e-5)")
    cross_attention_dim: int | None = key(
        1024, "D, channels of the text states; None without CrossAttn blocks only", least=1
    )
    attention_head_dim: int = key(64, "channels of an attention head, at most the narrowest block's", least=1)
    num_attention_heads: int | None = key(None, "must be None")
    time_cond_proj_dim: int | None = key(None, "channels of `timestep_cond`; None for none", least=1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNet3DConditionConfig":
        for name, values in _FIXED_KEYS.items():
            if name in config and config[name] not in values:
                raise ValueError(
                    f"config: {name}={config[name]!r} describes another network; "
                    f"UNet3DConditionModel has {name}={values[0]!r}"
                )
        return super().from_dict({k: v for k, v in config.items() if k not in _FIXED_KEYS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads is not None:
            raise NotImplementedError(
                f"num_attention_heads={self.num_attention_heads}: the number of heads follows from "
                "attention_head_dim (channels of a head) in this network; leave it None"
            )


def transformer_in(config: Any) -> TransformerTemporalModel:
    """Return the attention among frames that follows `conv_in` in UNet3DConditionModel and I2VGenXLUNet."""
    return TransformerTemporalModel(
        _TRANSFORMER_IN_HEADS,
        config.attention_head_dim,
        config.block_out_channels[0],
        config.norm_num_groups,
    )


@dataclass
class UNet3DConditionOutput(VideoUNetOutput):
    """`sample`: the prediction, (B, C, F, H, W)."""


class UNet3DConditionModel(AddedCondition, VideoUNet):
    """Predicts noise, velocity or sample of a noisy video latent at a timestep, given text states.

    Raises ValueError where keys of its config contradict each other.
    """

    config_class = UNet3DConditionConfig
    class_names = ("UNet3DConditionModel",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._build(
            make_levels(self.config), UNetMidBlock3DCrossAttn, transformer_in=transformer_in(self.config)
        )

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
            encoder_hidden_states: text states (B, L, cross_attention_dim) in the dtype of the network, or a
                `TextContext` of them, which projects keys and values only once.
            class_labels: must be None; the network has no class embedding.
            timestep_cond: (B, time_cond_proj_dim), added to the sinusoid of the timestep.
            attention_mask: (B, L), 1 for text tokens to attend to, 0 for others.
            cross_attention_kwargs: keywords for the attention processors; `scale` scales all LoRA.
            down_block_additional_residuals: one for each skip connection and added to it, (N, C, h, w) with
                the frames of a sample in sequence, or broadcastable to that.
            mid_block_additional_residual: the same for the output of the mid block.
            return_dict: False for a tuple.
            feature_cache: stores the deep features of this forward, or supplies those of an earlier one.

        Returns the prediction (B, out_channels, F, H, W) in the dtype of the sample.
        Raises ValueError for other shapes, dtypes and counts.
        """
        if class_labels is not None:
            raise ValueError(
                "class_labels must be None: UNet3DConditionModel has no class embedding "
                "(diffusers takes them and ignores them)"
            )
        inputs = dict(
            timestep=as_timestep(timestep),
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            down_residuals=down_block_additional_residuals,
            mid_residuals=mid_block_additional_residual,
        )
        x = self._run(sample, encoder_hidden_states, inputs, feature_cache)
        return UNet3DConditionOutput(sample=x) if return_dict else (x,)

    def _prepare(self, x: mx.array, cond: Conditions, inputs: Inputs) -> tuple[mx.array, Conditions]:
        mask = inputs["attention_mask"]
        if mask is None:
            return x, cond
        if cond.context is None:
            raise ValueError(
                "attention_mask: this network does not attend to text (cross_attention_dim=None)"
            )
        check_input("attention_mask", mask, cond.context_states.shape[:2], note=", one entry a text token")
        return x, replace(cond, context_mask=mask_bias(mask, x.dtype))

    def other_layer_names(self, paths: Collection[str]) -> dict[str, str]:
        """Return the names of layers in ModelScope's original network."""
        return unet_layer_names(paths, self.config.layers_per_block)
