"""I2VGenXLUNet: of I2VGen-XL.

Source of the original names: `UNetSD_I2VGen` of VGen.
"""

from collections.abc import Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.numbered_blocks import WITHIN
from mlx_unet3d.checkpoints.originals import unet_key_map
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes

from . import unet_3d_condition
from .kind import Config, Family, Inputs, Kind, diffusers_files
from .pipeline import Pipeline

_ENCODER = "local_temporal_encoder.layers.0"
_NAMES = {
    "local_image_concat.": "image_latents_proj_in.",
    "local_image_embedding.": "image_latents_context_embedding.",
    f"{_ENCODER}.0.norm.": "image_latents_temporal_encoder.norm1.",
    f"{_ENCODER}.0.fn.to_out.0.": "image_latents_temporal_encoder.attn1.to_out.0.",
    f"{_ENCODER}.1.net.0.0.": "image_latents_temporal_encoder.ff.net.0.proj.",
    f"{_ENCODER}.1.net.2.": "image_latents_temporal_encoder.ff.net.2.",
}
_FUSED = f"{_ENCODER}.0.fn.to_qkv.weight"


def key_map(keys: Collection[str]) -> KeyMap:
    """Return the key map of `i2vgen_xl_00854500.pth`."""
    blocks = unet_key_map(keys)

    def parts(key: str) -> list[Part]:
        if key == _FUSED:
            path = "image_latents_temporal_encoder.attn1"
            return [Part(f"{path}.to_{name}.weight", third) for third, name in enumerate("qkv")]
        for theirs, ours in _NAMES.items():
            if key.startswith(theirs):
                return [Part(ours + key.removeprefix(theirs))]
        return blocks(key)

    return parts


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    known = dict(
        in_channels=shapes.inputs("conv_in.weight") // 2,
        out_channels=shapes.outputs("conv_out.weight"),
        **unet_3d_condition.levels_of_3d(shapes),
    )
    return known, dict(norm_num_groups=32, sample_size=32)


def inputs(config: Config) -> Inputs:
    """Return a sample of two frames, as small as the levels allow, an image, its embedding and a text."""
    rng = np.random.default_rng(0)
    size, dim = 2 ** (len(config["block_out_channels"]) - 1), config["cross_attention_dim"]
    sample, latents, image, text = (
        rng.normal(size=shape).astype(np.float32)
        for shape in (
            (1, config["in_channels"], 2, size, size),
            (1, 4, 2, size, size),
            (1, 1, dim),
            (1, 5, dim),
        )
    )
    return Inputs((sample, 500, np.array([16]), latents, image, text))


UNET_I2VGEN_XL = Kind(
    mlx_unet3d.I2VGenXLUNet,
    "unet",
    (
        Family(
            "I2VGen-XL's original UNet",
            (
                "time_embed.0.weight",
                "input_blocks.0.1.proj_in.weight",
                "local_image_concat.0.weight",
                _FUSED,
            ),
            key_map,
            (WITHIN,),
        ),
        diffusers_files(
            mlx_unet3d.I2VGenXLUNet,
            "conv_in.weight",
            "transformer_in.proj_in.weight",
            "image_latents_proj_in.0.weight",
        ),
    ),
    infer,
    inputs,
    from_image=True,
    pipelines=(
        Pipeline(
            "I2VGenXLPipeline",
            {
                "unet": "I2VGenXLUNet",
                "vae": "AutoencoderKL",
                "text_encoder": "CLIPTextModel",
                "image_encoder": "CLIPVisionModelWithProjection",
            },
            mlx_unet3d.DDIMScheduler(
                beta_schedule="squaredcos_cap_v2",
                rescale_betas_zero_snr=True,
                prediction_type="v_prediction",
                set_alpha_to_one=True,
                clip_sample=False,
                steps_offset=1,
            ).config.to_dict(),
            feature_extractor=True,
            recommend=lambda config, name: dict(
                num_frames=16, num_inference_steps=50, guidance_scale=9.0, height=704, width=1280, fps=16
            ),
        ),
    ),
)
