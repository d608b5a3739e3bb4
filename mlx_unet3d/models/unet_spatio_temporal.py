"""UNetSpatioTemporalConditionModel: the denoising network of Stable Video Diffusion.

Source: diffusers' class of that name; Blattmann et al., arXiv:2311.15127. Letters as in `video_unet`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..checkpoints.config import key
from ..layers.blocks import UNetMidBlockSpatioTemporal
from ..layers.conditions import Conditions
from ..layers.embeddings import TimestepEmbedding, timestep_sinusoid
from ..layers.text_context import TextContext
from .feature_cache import FeatureCache
from .video_unet import Inputs, VideoUNet, VideoUNetOutput, as_timestep, check_input, make_levels
from .video_unet_config import PerLayer, PerLevel, VideoUNetConfig, block_types, layer_key, level_key

_DOWN, _UP = block_types("SpatioTemporal")


@dataclass
class UNetSpatioTemporalConditionConfig(VideoUNetConfig):
    """The keys of `config.json`; defaults are those of diffusers and of the released checkpoints."""

    in_channels: int = key(8, "of the sample: noisy latents beside those of the image", least=1)
    down_block_types: tuple[str, ...] = _DOWN
    up_block_types: tuple[str, ...] = _UP
    addition_time_embed_dim: int = key(256, "channels of the sinusoid of each time id", least=1)
    projection_class_embeddings_input_dim: int = key(
        768, "channels of the sinusoids of all time ids", least=1
    )
    layers_per_block: PerLevel = level_key(2, "resnets of a down block; up blocks have one more")
    cross_attention_dim: PerLevel = level_key(1024, "D, channels of the image embedding")
    transformer_layers_per_block: PerLayer = layer_key(1, "pairs of transformer blocks of a transformer")
    num_attention_heads: PerLevel = level_key((5, 10, 20, 20), "heads of the transformers")
    num_frames: int = key(25, "frames of the training clips; only pipelines look at it", least=1)


@dataclass
class UNetSpatioTemporalConditionOutput(VideoUNetOutput):
    """`sample`: the prediction, (B, F, C, H, W)."""


class UNetSpatioTemporalConditionModel(VideoUNet):
    """Predicts the velocity of a noisy video latent at a noise level, given an image and its embedding.

    Raises ValueError where keys of its config contradict each other.
    """

    config_class = UNetSpatioTemporalConditionConfig
    class_names = ("UNetSpatioTemporalConditionModel",)
    channel_axis = 2

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.config
        total, width = config.projection_class_embeddings_input_dim, config.block_out_channels[0]
        self._build(
            make_levels(config, transformer_layers=config.transformer_layers_per_block),
            UNetMidBlockSpatioTemporal,
            add_embedding=TimestepEmbedding(total, 4 * width),
        )

    def __call__(
        self,
        sample: mx.array,
        timestep: int | float | mx.array,
        encoder_hidden_states: mx.array | TextContext,
        added_time_ids: mx.array,
        return_dict: bool = True,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        image_only_indicator: mx.array | None = None,
        down_block_additional_residuals: Sequence[mx.array] | None = None,
        mid_block_additional_residual: mx.array | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> UNetSpatioTemporalConditionOutput | tuple[mx.array]:
        """One forward.

        Args:
            sample: noisy latents and those of the image (B, F, in_channels, H, W) in the dtype of the
                network.
            timestep: one for all, or (B,); log(sigma) / 4 in released checkpoints.
            encoder_hidden_states: the image embedding (B, L, cross_attention_dim), usually one token, or a
                `TextContext` of it. Attention to a single token is the same for all queries and computed only
                once.
            added_time_ids: (B, n), or flat: frames a second - 1, motion bucket and noise of the image.
            return_dict: False for a tuple.
            cross_attention_kwargs: keywords for the attention processors; `scale` scales all LoRA.
            image_only_indicator: (B, F), nonzero for frames that are single images; None for none, as in
                diffusers.
            down_block_additional_residuals: one for each skip connection and added to it, (N, C, h, w) with
                the frames of a sample in sequence, or broadcastable to that.
            mid_block_additional_residual: the same for the output of the mid block.
            feature_cache: stores the deep features of this forward, or supplies those of an earlier one.

        Returns the prediction (B, F, out_channels, H, W) in the dtype of the sample.
        Raises ValueError for other shapes, dtypes and counts.
        """
        inputs = dict(
            timestep=as_timestep(timestep),
            added_time_ids=added_time_ids,
            cross_attention_kwargs=cross_attention_kwargs,
            image_only=image_only_indicator,
            down_residuals=down_block_additional_residuals,
            mid_residuals=mid_block_additional_residual,
        )
        x = self._run(sample, encoder_hidden_states, inputs, feature_cache)
        return UNetSpatioTemporalConditionOutput(sample=x) if return_dict else (x,)

    def _prepare(self, x: mx.array, cond: Conditions, inputs: Inputs) -> tuple[mx.array, Conditions]:
        image_only = inputs["image_only"]
        if image_only is not None:
            check_input("image_only_indicator", image_only, (cond.batch, cond.num_frames))
        temb = cond.temb + self._embed_ids(inputs["added_time_ids"], cond.batch, x.dtype)
        return x, replace(cond, temb=temb, image_only=image_only)

    def _embed_ids(self, ids: mx.array, batch: int, dtype: mx.Dtype) -> mx.array:
        """Time ids (B, n) -> (B, T)."""
        dim, total = self.config.addition_time_embed_dim, self.config.projection_class_embeddings_input_dim
        if ids.size * dim != batch * total:
            raise ValueError(
                f"added_time_ids has shape {tuple(ids.shape)}; it must be ({batch}, {total // dim}): "
                f"{total // dim} numbers a sample, of {dim} channels each (addition_time_embed_dim)"
            )
        sinusoid = timestep_sinusoid(ids.reshape(-1), dim).reshape(batch, -1)
        return self.add_embedding(sinusoid.astype(dtype))
