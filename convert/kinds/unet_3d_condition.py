"""UNet3DConditionModel: of ModelScope, ZeroScope and their fine-tunes."""

from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.numbered_blocks import WITHIN
from mlx_unet3d.checkpoints.originals import unet_key_map
from mlx_unet3d.checkpoints.shapes import Shapes

from .kind import Config, Family, Inputs, Kind, diffusers_files
from .pipeline import Pipeline

TRANSFORMER_IN_HEADS = 8  # of any UNet3DConditionModel


def levels_of_3d(shapes: Shapes) -> dict[str, Any]:
    """Infer the config keys about the levels of a UNet of 3-D blocks."""
    levels = range(shapes.count("down_blocks.{}.resnets.0.conv1.weight"))
    ups = range(shapes.count("up_blocks.{}.resnets.0.conv1.weight"))

    def attends(path: str) -> bool:
        return f"{path}.attentions.0.norm.weight" in shapes

    return dict(
        down_block_types=tuple(
            "CrossAttnDownBlock3D" if attends(f"down_blocks.{i}") else "DownBlock3D" for i in levels
        ),
        up_block_types=tuple("CrossAttnUpBlock3D" if attends(f"up_blocks.{i}") else "UpBlock3D" for i in ups),
        block_out_channels=tuple(shapes.outputs(f"down_blocks.{i}.resnets.0.conv1.weight") for i in levels),
        layers_per_block=shapes.count("down_blocks.0.resnets.{}.conv1.weight"),
        cross_attention_dim=shapes.inputs("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        attention_head_dim=shapes.outputs("transformer_in.proj_in.weight") // TRANSFORMER_IN_HEADS,
    )


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    known = dict(
        in_channels=shapes.inputs("conv_in.weight"),
        out_channels=shapes.outputs("conv_out.weight"),
        **levels_of_3d(shapes),
    )
    if "time_embedding.cond_proj.weight" in shapes:
        known["time_cond_proj_dim"] = shapes.inputs("time_embedding.cond_proj.weight")
    assumed = dict(
        norm_num_groups=32,
        norm_eps=1e-5,
        act_fn="silu",
        downsample_padding=1,
        mid_block_scale_factor=1,
        sample_size=32,
    )
    return known, assumed


def inputs(config: Config) -> Inputs:
    """Return a sample of two frames, as small as the levels allow, and a text."""
    rng = np.random.default_rng(0)
    size, dim = 2 ** (len(config["block_out_channels"]) - 1), config["cross_attention_dim"]
    sample = rng.normal(size=(1, config["in_channels"], 2, size, size)).astype(np.float32)
    text = None if dim is None else rng.normal(size=(1, 5, dim)).astype(np.float32)
    return Inputs((sample, 500, text))


UNET_3D = Kind(
    mlx_unet3d.UNet3DConditionModel,
    "unet",
    (
        Family(
            "ModelScope's original UNet",
            (
                "time_embed.0.weight",
                "input_blocks.0.0.weight",
                "input_blocks.0.1.proj_in.weight",
                "middle_block.0.temopral_conv.conv1.0.weight",
            ),
            unet_key_map,
            (WITHIN,),
            without=("local_image_concat.0.weight",),
        ),
        diffusers_files(
            mlx_unet3d.UNet3DConditionModel,
            "conv_in.weight",
            "transformer_in.proj_in.weight",
            "down_blocks.0.temp_convs.0.conv1.0.weight",
            without=("image_latents_proj_in.0.weight",),
        ),
    ),
    infer,
    inputs,
    pipelines=(
        Pipeline(
            "TextToVideoSDPipeline",
            {"unet": "UNet3DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"},
            mlx_unet3d.DDIMScheduler(
                num_train_timesteps=1000,
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type="epsilon",
            ).config.to_dict(),
        ),
    ),
)
