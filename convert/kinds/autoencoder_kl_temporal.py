"""AutoencoderKLTemporalDecoder: the autoencoder of Stable Video Diffusion.

Source of the original names: `VideoDecoder` of Stability's generative-models, and the encoder of latent
diffusion, which lies among the conditions.
"""

import re
from collections.abc import Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.numbered_blocks import resnet
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes

from . import autoencoder_kl
from .kind import Config, Family, Inputs, Kind, diffusers_files, never

_ENCODER, _DECODER = "conditioner.embedders.3.encoder.", "first_stage_model."
_RESNET = re.compile(r"(decoder\..+\.resnets\.\d+)\.(.+)")


def key_map(keys: Collection[str]) -> KeyMap:
    """Return the key map of `svd.safetensors`, whose first stage also has an encoder, and whose conditions
    also have a decoder."""
    within = [key.removeprefix(_DECODER) for key in keys if key.startswith(_DECODER)]
    frame_by_frame = autoencoder_kl.key_map(within)

    def parts(key: str) -> list[Part]:
        if key.startswith((f"{_ENCODER}encoder.", f"{_ENCODER}quant_conv.")):
            return frame_by_frame(key.removeprefix(_ENCODER))
        if not key.startswith(f"{_DECODER}decoder."):
            return []
        (part,) = frame_by_frame(key.removeprefix(_DECODER))
        if part.name.startswith("decoder.conv_out.time_mix_conv."):
            return [Part(part.name.replace("conv_out.time_mix_conv", "time_conv_out"))]
        match = _RESNET.fullmatch(part.name)
        return [part if match is None else _of_resnet(match[1], match[2]) or part]

    return parts


def _of_resnet(path: str, rest: str) -> Part | None:
    if rest == "mix_factor":
        return Part(f"{path}.time_mixer.mix_factor")
    if rest.startswith("time_stack."):
        return resnet(f"{path}.temporal_res_block", rest.removeprefix("time_stack."))
    return Part(f"{path}.spatial_res_block.{rest}")


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    levels = range(shapes.count("encoder.down_blocks.{}.resnets.0.conv1.weight"))
    known = dict(
        in_channels=shapes.inputs("encoder.conv_in.weight"),
        out_channels=shapes.outputs("decoder.conv_out.weight"),
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        block_out_channels=tuple(
            shapes.outputs(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in levels
        ),
        layers_per_block=shapes.count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        latent_channels=shapes.inputs("decoder.conv_in.weight"),
    )
    return known, dict(scaling_factor=0.18215, sample_size=768, force_upcast=True)


def inputs(config: Config) -> Inputs:
    """Return latents of two frames to decode."""
    latents = np.random.default_rng(0).normal(size=(2, config["latent_channels"], 4, 4))
    return Inputs((latents.astype(np.float32),), {"num_frames": 2}, "decode")


AUTOENCODER_KL_TEMPORAL = Kind(
    mlx_unet3d.AutoencoderKLTemporalDecoder,
    "vae",
    (
        Family(
            "the autoencoder of Stable Video Diffusion",
            (
                f"{_ENCODER}encoder.conv_in.weight",
                f"{_DECODER}decoder.up.0.block.0.conv1.weight",
                f"{_DECODER}decoder.conv_out.time_mix_conv.weight",
            ),
            key_map,
            ("",),
            alone=False,
        ),
        diffusers_files(
            mlx_unet3d.AutoencoderKLTemporalDecoder,
            "encoder.conv_in.weight",
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "decoder.time_conv_out.weight",
        ),
    ),
    infer,
    inputs,
    never,
)
