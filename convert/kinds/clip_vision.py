"""CLIPVisionModelWithProjection: the image encoder.

Source of the original names: open_clip's `VisionTransformer`.
"""

import math
from collections.abc import Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.errors import CheckpointError

from .kind import Config, Family, Inputs, Kind, linear_beside_others
from .open_clip import layer_parts

# ViT-L, ViT-H, ViT-g and ViT-bigG have 16 heads each; smaller ones have 64 channels a head.
_HEADS, _LARGE, _HEAD_DIM = 16, 1024, 64
_OPENAI_WIDTHS = (768, 1024)  # of OpenAI's towers, which have another activation

_EMBEDDINGS = "vision_model.embeddings"
_NAMES = {
    "class_embedding": f"{_EMBEDDINGS}.class_embedding",
    "positional_embedding": f"{_EMBEDDINGS}.position_embedding.weight",
    "conv1.weight": f"{_EMBEDDINGS}.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}


def key_map(keys: Collection[str]) -> KeyMap:
    """Of OpenCLIP."""

    def parts(key: str) -> list[Part]:
        if key == "proj":
            return [Part("visual_projection.weight", transposed=True)]
        if key in _NAMES:
            return [Part(_NAMES[key])]
        return layer_parts(key, "vision_model.encoder.layers") or [Part(key)]

    return parts


def of_transformers(keys: Collection[str]) -> KeyMap:
    """Of transformers, alone or in a CLIP, whose text tower is left out."""

    def parts(key: str) -> list[Part]:
        if key.startswith(("text_model.", "text_projection.")) or key == "logit_scale":
            return []
        name = mlx_unet3d.CLIPVisionModelWithProjection.rename_key(key, keys)
        return [] if name is None else [Part(name)]

    return parts


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    patches = f"{_EMBEDDINGS}.patch_embedding.weight"
    width, layer = shapes.outputs(patches), "vision_model.encoder.layers.{}"
    if len(shapes.shapes[patches]) != 4:
        raise CheckpointError(f"{shapes.where}: {patches!r} has shape {shapes.shapes[patches]}, not 4 axes")
    patch = shapes.shapes[patches][2]
    across = math.isqrt(max(shapes.outputs(f"{_EMBEDDINGS}.position_embedding.weight") - 1, 1))
    known = dict(
        hidden_size=width,
        intermediate_size=shapes.outputs(f"{layer.format(0)}.mlp.fc1.weight"),
        projection_dim=shapes.outputs("visual_projection.weight"),
        num_hidden_layers=shapes.count(f"{layer}.mlp.fc1.weight"),
        num_channels=shapes.inputs(patches),
        image_size=across * patch,
        patch_size=patch,
    )
    heads = _HEADS if width >= _LARGE else max(width // _HEAD_DIM, 1)
    act = "quick_gelu" if width in _OPENAI_WIDTHS else "gelu"
    return known, dict(num_attention_heads=heads, hidden_act=act, layer_norm_eps=1e-5)


def inputs(config: Config) -> Inputs:
    """An image of noise."""
    size = config["image_size"]
    pixels = np.random.default_rng(0).normal(size=(1, config["num_channels"], size, size))
    return Inputs((pixels.astype(np.float32),))


CLIP_VISION = Kind(
    mlx_unet3d.CLIPVisionModelWithProjection,
    "image_encoder",
    (
        Family(
            "OpenCLIP's image tower",
            ("class_embedding", "conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "proj"),
            key_map,
            ("visual.", "conditioner.embedders.0.open_clip.model.visual.", "cond_stage_model.model.visual."),
            alone=False,
            assumed={"hidden_act": "gelu"},
        ),
        Family(
            "a CLIPVisionModelWithProjection with transformers' names",
            (
                "visual_projection.weight",
                f"{_EMBEDDINGS}.class_embedding",
                f"{_EMBEDDINGS}.patch_embedding.weight",
                "vision_model.encoder.layers.0.self_attn.q_proj.weight",
            ),
            of_transformers,
        ),
    ),
    infer,
    inputs,
    linear_beside_others,
    "transformers",
)
