"""CLIPTextModel: the text encoder.

Source of the original names: open_clip's `TextTransformer`.
"""

import re
from collections.abc import Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.parts import Naming, Part
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.errors import CheckpointError

from .kind import Config, Family, Inputs, Kind, diffusers_files, linear_beside_others, own_names

_HEAD_DIM = 64  # of all published CLIP text towers
_OPENAI_WIDTH = 768  # of OpenAI's tower, the only one with another activation

_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.(.+)")
# The image tower, and the parameters that compare images with texts.
_UNUSED = re.compile(r"visual\..*|logit_scale|logit_bias|text_projection(\..*)?|attn_mask")


def naming(keys: Collection[str]) -> Naming:
    """Return the naming of OpenCLIP, without the last layer: the UNets were trained on the states before
    it."""
    last = max((int(match[1]) for match in map(_BLOCK.fullmatch, keys) if match), default=0)

    def parts(key: str) -> list[Part]:
        if _UNUSED.fullmatch(key):
            return []
        if key in _NAMES:
            return [Part(f"text_model.{_NAMES[key]}")]
        match = _BLOCK.fullmatch(key)
        if match is None:
            return [Part(key)]
        if int(match[1]) == last:
            return []
        path, rest = f"text_model.encoder.layers.{match[1]}", match[2]
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.removeprefix("attn.in_proj_")
            return [Part(f"{path}.self_attn.{name}_proj.{kind}", third) for third, name in enumerate("qkv")]
        module, _, kind = rest.rpartition(".")
        return [Part(f"{path}.{_LAYER[module]}.{kind}" if module in _LAYER else key)]

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


_SIGNS = (
    "embeddings.token_embedding.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "final_layer_norm.weight",
)
CLIP_TEXT = Kind(
    mlx_unet3d.CLIPTextModel,
    "text_encoder",
    (
        Family(
            "OpenCLIP's text tower",
            (
                "token_embedding.weight",
                "positional_embedding",
                "transformer.resblocks.0.attn.in_proj_weight",
                "ln_final.weight",
            ),
            naming,
            ("cond_stage_model.model.", "cond_stage_model."),
        ),
        Family(
            "the text encoder of Stable Diffusion",
            tuple(f"text_model.{sign}" for sign in _SIGNS),
            own_names(mlx_unet3d.CLIPTextModel),
            ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
            alone=False,
            assumed={"hidden_act": "quick_gelu"},
        ),
        diffusers_files(mlx_unet3d.CLIPTextModel, *(f"text_model.{sign}" for sign in _SIGNS)),
        diffusers_files(mlx_unet3d.CLIPTextModel, *_SIGNS),
    ),
    infer,
    inputs,
    linear_beside_others,
    "transformers",
)
