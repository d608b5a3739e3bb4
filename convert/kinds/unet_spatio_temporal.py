"""UNetSpatioTemporalConditionModel: of Stable Video Diffusion.

Source of the original names: `VideoUNet` of Stability's generative-models.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.numbered_blocks import WITHIN, resnet, unet_key_map
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes

from .kind import Config, Family, Inputs, Kind, diffusers_files
from .pipeline import Pipeline

_HEAD_DIM = 64  # of all published networks
_TIME_IDS = 3  # frames a second, motion bucket, noise
_SVD = re.compile(r"(?<![a-z])svd(?![a-z])|stable[-_ ]?video", re.I)
_XT = re.compile(r"(?<![a-z])xt(?![a-z])", re.I)
_LCM = re.compile(r"lcm", re.I)


def key_map(keys: Collection[str]) -> KeyMap:
    """Return the key map of the UNet in `svd.safetensors`."""
    return unet_key_map(keys, _layer)


def _layer(block: str, number: int, place: str, rest: str) -> Part | None:
    stack, mixer = "time_stack.", "time_mixer.mix_factor"
    if block and place == "0":
        path = f"{block}.resnets.{number}"
        if rest == mixer:
            return Part(f"{path}.{mixer}")
        if rest.startswith(stack):
            return resnet(f"{path}.temporal_res_block", rest.removeprefix(stack))
        return resnet(f"{path}.spatial_res_block", rest)
    if block and place == "1":
        path = f"{block}.attentions.{number}"
        for theirs, ours in (
            (stack, "temporal_transformer_blocks."),
            ("time_pos_embed.0.", "time_pos_embed.linear_1."),
            ("time_pos_embed.2.", "time_pos_embed.linear_2."),
        ):
            if rest.startswith(theirs):
                return Part(f"{path}.{ours}{rest.removeprefix(theirs)}")
        return Part(f"{path}.{rest}")
    return None


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    conv = "blocks.{}.resnets.0.spatial_res_block.conv1.weight"
    levels, ups = (range(shapes.count(f"{way}_{conv}")) for way in ("down", "up"))

    def kind(way: str, i: int) -> str:
        attends = f"{way}_blocks.{i}.attentions.0.norm.weight" in shapes
        return f"{'CrossAttn' if attends else ''}{way.capitalize()}BlockSpatioTemporal"

    widths = tuple(shapes.outputs(f"down_{conv.format(i)}") for i in levels)
    ids = shapes.inputs("add_embedding.linear_1.weight")
    known = dict(
        in_channels=shapes.inputs("conv_in.weight"),
        out_channels=shapes.outputs("conv_out.weight"),
        down_block_types=tuple(kind("down", i) for i in levels),
        up_block_types=tuple(kind("up", i) for i in ups),
        block_out_channels=widths,
        layers_per_block=shapes.count("down_blocks.0.resnets.{}.spatial_res_block.conv1.weight"),
        cross_attention_dim=shapes.inputs("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        transformer_layers_per_block=shapes.count(
            "mid_block.attentions.0.transformer_blocks.{}.norm1.weight"
        ),
        projection_class_embeddings_input_dim=ids,
        addition_time_embed_dim=ids // _TIME_IDS,
    )
    heads = tuple(max(width // _HEAD_DIM, 1) for width in widths)
    frames = _frames(Path(shapes.where).name)
    return known, dict(num_attention_heads=heads, num_frames=frames, sample_size=96)


def _frames(name: str) -> int:
    """The number of frames of the training, which no tensor tells: 14, or of XT 25."""
    return 14 if _SVD.search(name) and not _XT.search(name) else 25


def _recommend(config: Config, name: str) -> dict[str, Any]:
    """The settings of the authors; AnimateLCM's distillation takes few steps without guidance."""
    few = dict(num_inference_steps=8, guidance_scale=1.0) if _LCM.search(name) else {}
    frames = config.get("num_frames", 25)
    return dict(num_frames=frames, num_inference_steps=25, height=576, width=1024, fps=7) | few


def inputs(config: Config) -> Inputs:
    """Return a sample of two frames, almost as small as the levels allow, an image embedding and time ids."""
    rng = np.random.default_rng(0)
    # Large enough for norms a frame: those of a single pixel would be mere rounding.
    size, dim = 2 ** len(config["block_out_channels"]), config["cross_attention_dim"]
    sample = rng.normal(size=(1, 2, config["in_channels"], size, size)).astype(np.float32)
    image = rng.normal(size=(1, 1, dim if isinstance(dim, int) else dim[-1])).astype(np.float32)
    count = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    ids = np.resize(np.array([6, 127, 0.02], np.float32), (1, count))
    return Inputs((sample, 0.7, image, ids))


UNET_SPATIO_TEMPORAL = Kind(
    mlx_unet3d.UNetSpatioTemporalConditionModel,
    "unet",
    (
        Family(
            "Stable Video Diffusion's original UNet",
            (
                "time_embed.0.weight",
                "input_blocks.0.0.weight",
                "label_emb.0.0.weight",
                "middle_block.0.time_stack.in_layers.0.weight",
            ),
            key_map,
            (WITHIN,),
        ),
        diffusers_files(
            mlx_unet3d.UNetSpatioTemporalConditionModel,
            "conv_in.weight",
            "add_embedding.linear_1.weight",
            "down_blocks.0.resnets.0.spatial_res_block.conv1.weight",
        ),
    ),
    infer,
    inputs,
    from_image=True,
    pipelines=(
        Pipeline(
            "StableVideoDiffusionPipeline",
            {
                "unet": "UNetSpatioTemporalConditionModel",
                "vae": "AutoencoderKLTemporalDecoder",
                "image_encoder": "CLIPVisionModelWithProjection",
            },
            mlx_unet3d.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                interpolation_type="linear",
                use_karras_sigmas=True,
                sigma_min=0.002,
                sigma_max=700.0,
                timestep_spacing="leading",
                timestep_type="continuous",
                steps_offset=1,
            ).config.to_dict(),
            tokenizers={},
            feature_extractor=True,
            recommend=_recommend,
        ),
    ),
)
