"""CLIPTextModel and CLIPTextModelWithProjection: the text encoders.

Source of the original names: open_clip's `TextTransformer`.
"""

import re
from collections.abc import Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.errors import CheckpointError

from .kind import Config, Family, Inputs, Kind, diffusers_files, linear_beside_others, own_names
from .open_clip import RESBLOCK, layer_parts

_HEAD_DIM = 64  # of all published CLIP text towers
_OPENAI_WIDTH = 768  # of OpenAI's tower, the only one with another activation

_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
# The image tower, and what compares images with texts.
_UNUSED = re.compile(r"visual\..*|logit_scale|logit_bias|attn_mask")
_PROJECTION = re.compile(r"text_projection(\..*)?")


def key_map(keys: Collection[str]) -> KeyMap:
    """Of OpenCLIP. The UNets were trained on the states before the last layer, which is left out."""
    last = max((int(match[1]) for match in map(RESBLOCK.fullmatch, keys) if match), default=0)
    complete = with_projection(keys)

    def parts(key: str) -> list[Part]:
        match = RESBLOCK.fullmatch(key)
        left_out = _PROJECTION.fullmatch(key) or (match is not None and int(match[1]) == last)
        return [] if left_out else complete(key)

    return parts


def with_projection(keys: Collection[str]) -> KeyMap:
    """Of OpenCLIP, all layers and the projection of the embedding."""

    def parts(key: str) -> list[Part]:
        if _UNUSED.fullmatch(key):
            return []
        if key == "text_projection":
            return [Part("text_projection.weight", transposed=True)]
        if key in _NAMES:
            return [Part(f"text_model.{_NAMES[key]}")]
        return layer_parts(key, "text_model.encoder.layers") or [Part(key)]

    return parts


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    tokens, layer = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.{}"
    width = shapes.inputs(tokens)
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"{shapes.where}: hidden_size={width} does not tell the number of attention heads, which have "
            f"{_HEAD_DIM} channels each in CLIP; put a config.json beside a model of other heads"
        )
    known = dict(
        vocab_size=shapes.outputs(tokens),
        hidden_size=width,
        intermediate_size=shapes.outputs(f"{layer.format(0)}.mlp.fc1.weight"),
        num_hidden_layers=shapes.count(f"{layer}.mlp.fc1.weight"),
        max_position_embeddings=shapes.outputs("text_model.embeddings.position_embedding.weight"),
    )
    act = "quick_gelu" if width == _OPENAI_WIDTH else "gelu"
    assumed = dict(num_attention_heads=width // _HEAD_DIM, hidden_act=act, layer_norm_eps=1e-5)
    return known, assumed


def inputs(config: Config) -> Inputs:
    """Return five words and the end of the text."""
    words = np.random.default_rng(0).integers(1, config["vocab_size"] - 2, 5)
    return Inputs((np.array([[*words, config["vocab_size"] - 1]]),))


def infer_with_projection(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    known, assumed = infer(shapes)
    known["projection_dim"] = shapes.outputs("text_projection.weight")
    return known, assumed | dict(eos_token_id=known["vocab_size"] - 1)


_SIGNS = (
    "embeddings.token_embedding.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "final_layer_norm.weight",
)
_PREFIXED = tuple(f"text_model.{sign}" for sign in _SIGNS)
_OF_OPEN_CLIP = (
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.0.attn.in_proj_weight",
    "ln_final.weight",
)
_TO_EMBEDDING = "text_projection.weight"
CLIP_TEXT = Kind(
    mlx_unet3d.CLIPTextModel,
    "text_encoder",
    (
        Family(
            "OpenCLIP's text tower",
            _OF_OPEN_CLIP,
            key_map,
            ("cond_stage_model.model.", "cond_stage_model."),
        ),
        Family(
            "the text encoder of Stable Diffusion",
            _PREFIXED,
            own_names(mlx_unet3d.CLIPTextModel),
            ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
            alone=False,
            assumed={"hidden_act": "quick_gelu"},
        ),
        diffusers_files(mlx_unet3d.CLIPTextModel, *_PREFIXED, without=(_TO_EMBEDDING,)),
        diffusers_files(mlx_unet3d.CLIPTextModel, *_SIGNS),
        Family(
            "the text tower of a CLIP",
            (*_PREFIXED, _TO_EMBEDDING, "visual_projection.weight"),
            own_names(mlx_unet3d.CLIPTextModel),
        ),
    ),
    infer,
    inputs,
    linear_beside_others,
    "transformers",
)
CLIP_TEXT_WITH_PROJECTION = Kind(
    mlx_unet3d.CLIPTextModelWithProjection,
    "text_encoder_2",
    (
        Family(
            "the second text encoder of Stable Diffusion XL",
            (*_OF_OPEN_CLIP, "text_projection"),
            with_projection,
            ("conditioner.embedders.1.model.",),
            alone=False,
        ),
        diffusers_files(
            mlx_unet3d.CLIPTextModelWithProjection,
            *_PREFIXED,
            _TO_EMBEDDING,
            without=("visual_projection.weight",),
        ),
    ),
    infer_with_projection,
    inputs,
    linear_beside_others,
    "transformers",
)
