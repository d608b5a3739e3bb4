"""The inputs of a forward of each kind of UNet, by shapes, for graphs of it.

An entry of `UNETS` is all that a plan knows of a network: which arguments a forward takes. Everything else is
read from the graph. Letters: B batch, C channels, F frames, h w latent pixels, L tokens, D their channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.pretrained import PretrainedModel
from ..models.unet_3d_condition import UNet3DConditionModel
from ..models.unet_i2vgen_xl import IMAGE_TOKENS, LATENT_CHANNELS, I2VGenXLUNet
from ..models.unet_motion import UNetMotionModel
from ..models.unet_spatio_temporal import UNetSpatioTemporalConditionModel

TOKENS = 77
"""Of a text."""


@dataclass(frozen=True)
class Latents:
    """The latents of one forward: rows B, frames F, height h, width w."""

    rows: int
    frames: int
    height: int
    width: int


Inputs = dict[str, Any]
"""Arguments of a forward by name: arrays that are never computed, and dicts of such."""


def unet_inputs(kind: type[PretrainedModel], config: Any, latents: Latents, dtype: mx.Dtype) -> Inputs:
    """The arguments of a forward of a UNet, of which `encoder_hidden_states` is the context that stays the
    same in all steps."""
    return UNETS[kind](config, latents, dtype)


def _unet_3d(config: Any, z: Latents, dtype: mx.Dtype) -> Inputs:
    return dict(
        sample=mx.zeros((z.rows, config.in_channels, z.frames, z.height, z.width), dtype),
        timestep=mx.zeros((), mx.float32),
        encoder_hidden_states=_context(config, z, TOKENS, dtype),
    )


def _motion(config: Any, z: Latents, dtype: mx.Dtype) -> Inputs:
    inputs = _unet_3d(config, z, dtype)
    if config.addition_embed_type is not None:
        ids = 6  # sizes and corners of the original and of the crop
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = dict(
            text_embeds=mx.zeros((z.rows, pooled), dtype), time_ids=mx.zeros((z.rows, ids), dtype)
        )
    return inputs


def _spatio_temporal(config: Any, z: Latents, dtype: mx.Dtype) -> Inputs:
    ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
    return dict(
        sample=mx.zeros((z.rows, z.frames, config.in_channels, z.height, z.width), dtype),
        timestep=mx.zeros((), mx.float32),
        encoder_hidden_states=_context(config, z, 1, dtype),
        added_time_ids=mx.zeros((z.rows, ids), dtype),
    )


def _i2vgen(config: Any, z: Latents, dtype: mx.Dtype) -> Inputs:
    return _unet_3d(config, z, dtype) | dict(
        encoder_hidden_states=_context(config, z, TOKENS + IMAGE_TOKENS + config.in_channels, dtype),
        fps=mx.zeros((z.rows,), mx.float32),
        image_latents=mx.zeros((z.rows, LATENT_CHANNELS, z.frames, z.height, z.width), dtype),
    )


def _context(config: Any, z: Latents, tokens: int, dtype: mx.Dtype) -> mx.array:
    dim = config.cross_attention_dim
    return mx.zeros((z.rows, tokens, dim[0] if isinstance(dim, tuple) else dim), dtype)


UNETS: dict[type[PretrainedModel], Callable[[Any, Latents, mx.Dtype], Inputs]] = {
    UNet3DConditionModel: _unet_3d,
    UNetMotionModel: _motion,
    UNetSpatioTemporalConditionModel: _spatio_temporal,
    I2VGenXLUNet: _i2vgen,
}
