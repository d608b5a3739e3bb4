"""AutoencoderKL: the autoencoder of latent diffusion.

Source of the original names: `AutoencoderKL` of latent diffusion, Rombach et al., arXiv:2112.10752.
"""

import re
from collections.abc import Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes

from .kind import Config, Family, Inputs, Kind, diffusers_files, never

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d{1,4})\.(?:block\.(\d{1,4})\.(.+)|(\w+)\.conv\.(\w+))")
_MID = re.compile(r"((?:en|de)coder)\.mid\.(?:block_([12])\.(.+)|attn_1\.(\w+)\.(\w+))")
# From training: the loss with its discriminator, and the moving average of all weights.
_UNUSED = ("loss.", "model_ema.")


def key_map(keys: Collection[str]) -> KeyMap:
    """Return the key map of LDM's autoencoder, whose decoder counts its levels from the finest."""
    ups = [int(match[2]) for match in map(_BLOCK.fullmatch, keys) if match and match[1] == "decoder.up"]
    finest = max(ups, default=0)

    def parts(key: str) -> list[Part]:
        if key.startswith(_UNUSED):
            return []
        return [Part(_name(key, finest))]

    return parts


def _name(key: str, finest: int) -> str:
    if match := _MID.fullmatch(key):
        path, block, rest, attention, kind = match.groups()
        if block is not None:
            return f"{path}.mid_block.resnets.{int(block) - 1}.{_resnet(rest)}"
        if attention in _ATTENTION:
            return f"{path}.mid_block.attentions.0.{_ATTENTION[attention]}.{kind}"
    elif match := _BLOCK.fullmatch(key):
        path, level, block, rest, sampler, kind = match.groups()
        decoding = path == "decoder.up"
        blocks = f"{path}_blocks.{finest - int(level) if decoding else level}"
        if block is not None:
            return f"{blocks}.resnets.{block}.{_resnet(rest)}"
        if sampler == ("upsample" if decoding else "downsample"):
            return f"{blocks}.{sampler}rs.0.conv.{kind}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)


def _resnet(rest: str) -> str:
    return re.sub(r"^nin_shortcut\.", "conv_shortcut.", rest)


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    levels = range(shapes.count("encoder.down_blocks.{}.resnets.0.conv1.weight"))
    known = dict(
        in_channels=shapes.inputs("encoder.conv_in.weight"),
        out_channels=shapes.outputs("decoder.conv_out.weight"),
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * shapes.count("decoder.up_blocks.{}.resnets.0.conv1.weight"),
        block_out_channels=tuple(
            shapes.outputs(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in levels
        ),
        layers_per_block=shapes.count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        latent_channels=shapes.inputs("decoder.conv_in.weight"),
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )
    return known, dict(norm_num_groups=32, act_fn="silu", scaling_factor=0.18215, sample_size=512)


def inputs(config: Config) -> Inputs:
    """Return latents to decode."""
    latents = np.random.default_rng(0).normal(size=(1, config["latent_channels"], 4, 4))
    return Inputs((latents.astype(np.float32),), method="decode")


AUTOENCODER_KL = Kind(
    mlx_unet3d.AutoencoderKL,
    "vae",
    (
        Family(
            "an autoencoder of latent diffusion",
            (
                "encoder.conv_in.weight",
                "encoder.down.0.block.0.conv1.weight",
                "decoder.up.0.block.0.conv1.weight",
            ),
            key_map,
            ("first_stage_model.",),
            without=("decoder.conv_out.time_mix_conv.weight",),
        ),
        diffusers_files(
            mlx_unet3d.AutoencoderKL,
            "encoder.conv_in.weight",
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight",
        ),
    ),
    infer,
    inputs,
    never,
)
