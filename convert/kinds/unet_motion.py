"""UNetMotionModel: AnimateDiff's network, and the 2-D UNet of Stable Diffusion of which it is made."""

from collections.abc import Callable, Collection
from typing import Any

import mlx_unet3d
import numpy as np
from mlx_unet3d.checkpoints.numbered_blocks import WITHIN, resnet, unet_key_map
from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.motion_adapter import adapter_of, infer_unet2d, motion_config
from mlx_unet3d.pipelines import motion_training

from . import motion_adapter
from .kind import Config, Family, Inputs, Kind, diffusers_files
from .pipeline import Pipeline


def key_map_2d(keys: Collection[str]) -> KeyMap:
    """Return the key map of the UNet in a checkpoint of Stable Diffusion."""
    return unet_key_map(keys, _layer)


def _layer(block: str, number: int, place: str, rest: str) -> Part | None:
    if block and place == "0":
        return resnet(f"{block}.resnets.{number}", rest)
    return Part(f"{block}.attentions.{number}.{rest}") if block and place == "1" else None


def infer_2d(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    config = infer_unet2d(shapes)
    sample_size = 128 if "addition_embed_type" in config else 64
    assumed = dict(attention_head_dim=config.pop("attention_head_dim"), sample_size=sample_size)
    return config, assumed


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    of_unet, assumed = infer_2d(shapes)
    of_adapter, more = motion_adapter.infer(shapes)
    made = motion_config(
        mlx_unet3d.UNetMotionModel,
        of_unet | assumed,
        {
            "motion_transformer_layers_per_mid_block": 1,
            **of_adapter,
            **more,
            "conv_in_channels": None,
        },
    )
    names = {"attention_head_dim": "num_attention_heads"}
    keys = {names.get(key, key) for key in (*assumed, *more)} & made.keys()
    return {k: v for k, v in made.items() if k not in keys}, {k: made[k] for k in keys}


def check_base(config: Config, where: str) -> None:
    """Raise CheckpointError for a UNet without motion modules made for it, and name it."""
    channels, text = config.get("in_channels", 4), config.get("cross_attention_dim", 1280)
    added = config.get("addition_embed_type") is not None
    reason = None
    if channels != 4:
        kinds = {
            9: "an inpainting model",
            8: "a model that edits images",
            7: "an upscaler",
            5: "a depth model",
        }
        reason = f"{kinds.get(channels, 'a UNet of other inputs')}, with {channels} input channels"
    elif added and text == 1280:
        reason = "the refiner of Stable Diffusion XL"
    elif added and config["addition_embed_type"] != "text_time":
        reason = f"a UNet with the conditions {str(config['addition_embed_type'])[:100]!r}"
    elif text == 1024 and not added:
        reason = "a Stable Diffusion 2, with text of 1024 channels"
    if reason is not None:
        raise CheckpointError(
            f"{where} is {reason}; motion modules are for the text-to-image models Stable Diffusion 1.5 and "
            "XL: give one of these"
        )


def combine(base: Config, adapter: Config, where: str, where_adapter: str) -> dict[str, Any]:
    """Return the config of a `UNetMotionModel` from those of a 2-D UNet and a motion adapter.

    Raises CheckpointError, which names the UNet, if no such module was made for it.
    """
    check_base(base, where)
    if adapter.get("conv_in_channels") is not None:
        raise CheckpointError(
            f"{where_adapter} is of PIA, which widens the first convolution; put both together with "
            "UNetMotionModel.from_unet2d, and save_pretrained"
        )
    of_unet, of_adapter = (
        tuple(config.get("block_out_channels", (320, 640, 1280, 1280))) for config in (base, adapter)
    )
    if of_unet != of_adapter:
        raise CheckpointError(
            f"{where_adapter} has motion modules for {base_model(of_adapter)}, {where} is "
            f"{base_model(of_unet)}; take modules that were made for this model"
        )
    complete = mlx_unet3d.MotionAdapter.config_class.from_dict(
        {k: v for k, v in adapter.items() if k != "quantization"}
    )
    return motion_config(mlx_unet3d.UNetMotionModel, base, complete)


def base_model(widths: tuple[int, ...]) -> str:
    """Return the name of the model with levels of these widths."""
    name = {4: "Stable Diffusion 1.5", 3: "Stable Diffusion XL"}.get(len(widths), "another model")
    return f"{name} (levels of {', '.join(map(str, widths))} channels)"


def _adapter(config: Config) -> dict[str, Any]:
    known = {k: v for k, v in config.items() if k != "quantization"}
    return adapter_of(mlx_unet3d.UNetMotionModel.config_class.from_dict(known))


def about_others(config: Config) -> dict[str, Config]:
    """Return the config of Stable Diffusion XL's autoencoder, which has other latents under the same names
    and shapes."""
    if config.get("addition_embed_type") is None:
        return {}
    return {"vae": dict(scaling_factor=0.13025, sample_size=1024, force_upcast=True)}


def inputs(config: Config) -> Inputs:
    """Return a small sample of two frames, a text for each, and SDXL's conditions."""
    rng = np.random.default_rng(0)
    # Large enough for norms a frame: those of a single pixel would be mere rounding.
    size, dim = 2 ** len(config["block_out_channels"]), config["cross_attention_dim"]
    sample = rng.normal(size=(1, config["in_channels"], 2, size, size)).astype(np.float32)
    text = rng.normal(size=(2, 5, dim if isinstance(dim, int) else dim[-1])).astype(np.float32)
    more: dict[str, Any] = {}
    if config.get("addition_embed_type") is not None:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        more["added_cond_kwargs"] = {
            "text_embeds": rng.normal(size=(1, pooled)).astype(np.float32),
            "time_ids": np.array([[64, 48, 0, 3, 64, 64]], np.float32),
        }
    return Inputs((sample, 500, text), more)


def _recommend(guidance_scale: float) -> Callable[[Config, str], dict[str, Any]]:
    """diffusers' defaults, at the size that the base model was trained at."""

    def recommend(config: Config, name: str) -> dict[str, Any]:
        size = config.get("sample_size")
        sizes = dict(height=size * 8, width=size * 8) if isinstance(size, int) else {}
        return sizes | dict(num_frames=16, num_inference_steps=50, guidance_scale=guidance_scale, fps=8)

    return recommend


# The schedule of Stable Diffusion 1.5 and XL, which the training of the motion modules changes.
_OF_BASE = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
_SCHEDULER = motion_training.ANIMATEDIFF.scheduler_config(_OF_BASE)
ANIMATEDIFF = Pipeline(
    "AnimateDiffPipeline",
    {"unet": "UNetMotionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"},
    _SCHEDULER,
    {"tokenizer": False},
    only=lambda config: config.get("addition_embed_type") is None,
    recommend=_recommend(7.5),
)
ANIMATEDIFF_XL = Pipeline(
    "AnimateDiffSDXLPipeline",
    {
        "unet": "UNetMotionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
    _SCHEDULER,
    {"tokenizer": False, "tokenizer_2": True},
    recommend=_recommend(5.0),
)

UNET_MOTION = Kind(
    mlx_unet3d.UNetMotionModel,
    "unet",
    (
        diffusers_files(
            mlx_unet3d.UNetMotionModel,
            "conv_in.weight",
            "down_blocks.0.resnets.0.conv1.weight",
            f"{motion_adapter.MODULE}.norm.weight",
        ),
    ),
    infer,
    inputs,
    pipelines=(ANIMATEDIFF, ANIMATEDIFF_XL),
    parts={"motion_adapter": ("MotionAdapter", _adapter)},
)

UNET_2D = Kind(
    mlx_unet3d.UNetMotionModel,
    "unet",
    (
        Family(
            "a UNet of Stable Diffusion",
            (
                "time_embed.0.weight",
                "input_blocks.0.0.weight",
                "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
                "output_blocks.0.0.in_layers.0.weight",
            ),
            key_map_2d,
            (WITHIN,),
            without=(
                "input_blocks.0.1.proj_in.weight",
                "middle_block.0.time_stack.in_layers.0.weight",
            ),
        ),
        Family(
            "a UNet2DConditionModel with diffusers' names",
            (
                "conv_in.weight",
                "down_blocks.0.resnets.0.conv1.weight",
                "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
                "conv_out.weight",
            ),
            lambda keys: lambda key: [Part(key)],
            without=(
                "down_blocks.0.temp_convs.0.conv1.0.weight",
                f"{motion_adapter.MODULE}.norm.weight",
            ),
        ),
    ),
    infer_2d,
    inputs,
    pipelines=(ANIMATEDIFF, ANIMATEDIFF_XL),
    combine=combine,
    called="UNet2DConditionModel",
    about_others=about_others,
)
"""Not a network of its own: part of a `UNetMotionModel`, together with a motion adapter."""
