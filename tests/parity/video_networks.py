"""Small configs and seeded inputs of the video networks, on both sides."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_unet3d
import diffusers
import mlx.core as mx
import torch
from reference import to_mlx

MOTION = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    cross_attention_dim=24,
    num_attention_heads=4,
    motion_num_attention_heads=4,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=8,
)
SVD = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    cross_attention_dim=24,
    num_attention_heads=(2, 4),
    layers_per_block=1,
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=48,
    sample_size=8,
)
I2V = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=24,
    attention_head_dim=8,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=8,
)
VAE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    layers_per_block=2,
    latent_channels=4,
    sample_size=16,
)
SDXL = dict(
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    num_attention_heads=(2, 4),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16,
)

Inputs = tuple[list[torch.Tensor | float], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A network: its class on both sides, a small config, and its inputs by batch, frames, height and
    width."""

    name: str
    config: dict[str, Any]
    inputs: Callable[..., Inputs]

    def pair(self, folder: Path, **changes: Any) -> tuple[torch.nn.Module, Any]:
        """diffusers' network with seeded weights, none of them trivial, and ours, through a saved folder."""
        torch.manual_seed(0)
        theirs = getattr(diffusers, self.name)(**{**self.config, **changes})
        randomize(theirs)
        theirs.eval().save_pretrained(folder)
        return theirs, getattr(mlx_unet3d, self.name).from_pretrained(folder)


def temporal_vae_pair(folder: Path, **config: Any) -> tuple[torch.nn.Module, Any]:
    """diffusers' AutoencoderKLTemporalDecoder with seeded weights, and ours, through a saved folder."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLTemporalDecoder(**{**VAE, **config}).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs, mlx_unet3d.AutoencoderKLTemporalDecoder.from_pretrained(folder)


def randomize(model: torch.nn.Module) -> None:
    """Draw all parameters anew: fresh networks have zeros, ones and halves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                scale = "norm" in name and name.endswith("weight")
                parameter.copy_(0.1 * noise + scale + (0.4 if name.endswith("mix_factor") else 0))


def draw(seed: int = 2) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _motion(config, batch=1, frames=3, height=8, width=8, timestep=500.0, tokens=5) -> Inputs:
    randn, dim = draw(), config["cross_attention_dim"]
    dim = dim if isinstance(dim, int) else dim[-1]
    sample = randn(batch, config["in_channels"], frames, height, width)
    more = {}
    if config["addition_embed_type"] is not None:
        ids = torch.tensor([[64.0, 48.0, 0.0, 3.0, 64.0, 64.0]]).repeat(batch, 1)
        more["added_cond_kwargs"] = {"text_embeds": randn(batch, 16), "time_ids": ids}
    if config["time_cond_proj_dim"] is not None:
        more["timestep_cond"] = randn(batch, config["time_cond_proj_dim"])
    return [sample, timestep, randn(batch * frames, tokens, dim)], more


def _svd(config, batch=1, frames=3, height=8, width=8, timestep=0.7, tokens=1) -> Inputs:
    randn, dim = draw(), config["cross_attention_dim"]
    dim = dim if isinstance(dim, int) else dim[-1]
    ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1)
    sample = randn(batch, frames, config["in_channels"], height, width)
    return [sample, timestep, randn(batch, tokens, dim), ids], {}


def _i2v(config, batch=1, frames=3, height=8, width=8, timestep=500.0, tokens=7) -> Inputs:
    randn, dim, c = draw(), config["cross_attention_dim"], config["in_channels"]
    sample, text = randn(batch, c, frames, height, width), randn(batch, tokens, dim)
    latents, image = randn(batch, 4, frames, height, width), randn(batch, dim)
    return [sample, timestep, torch.tensor([16.0, 8.0][:batch]), latents, image, text], {}


MOTION_KIND = Kind("UNetMotionModel", MOTION, _motion)
SVD_KIND = Kind("UNetSpatioTemporalConditionModel", SVD, _svd)
I2V_KIND = Kind("I2VGenXLUNet", I2V, _i2v)
KINDS = {"motion": MOTION_KIND, "svd": SVD_KIND, "i2vgenxl": I2V_KIND}


def theirs_of(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """diffusers' prediction."""
    arguments, more = inputs
    with torch.no_grad():
        return model(*arguments, **more).sample


def ours_of(model: Any, inputs: Inputs, dtype: mx.Dtype = mx.float32, **options: Any) -> mx.array:
    """Our prediction; floating inputs in `dtype` but for those that are numbers."""
    arguments, more = inputs

    def array(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: array(value) for name, value in x.items()}
        if not isinstance(x, torch.Tensor):
            return x
        return to_mlx(x).astype(dtype) if x.ndim > 2 else to_mlx(x)

    made = [array(x) for x in arguments]
    if type(model).__name__ == "I2VGenXLUNet":
        made[4] = made[4].astype(dtype)
    return model(*made, **{name: array(x) for name, x in more.items()}, **options).sample
