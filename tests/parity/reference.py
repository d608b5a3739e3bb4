"""Pairs of networks with the same weights: diffusers' own and ours, loaded from a folder that it saved."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_unet3d import UNet3DConditionModel
from diffusers import UNet3DConditionModel as ReferenceUNet

TINY = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=24,
    attention_head_dim=8,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=8,
)


def to_mlx(x: torch.Tensor) -> mx.array:
    return mx.array(x.detach().numpy())


def relative_error(ours: mx.array | np.ndarray | torch.Tensor, theirs: torch.Tensor | np.ndarray) -> float:
    """Largest difference over the largest value of the reference."""
    theirs, ours = (
        x.detach().numpy() if isinstance(x, torch.Tensor) else np.array(x) for x in (theirs, ours)
    )
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def randomize_constants(model: torch.nn.Module, seed: int = 0) -> None:
    """Fresh temporal convolutions are the identity, fresh norms and biases are trivial: change them all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".conv4.3.weight" in name:
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def unet_pair(folder: Path, seed: int = 0, **config) -> tuple[ReferenceUNet, UNet3DConditionModel]:
    """diffusers' UNet with seeded weights, and ours with the same, through a saved folder."""
    torch.manual_seed(seed)
    theirs = ReferenceUNet(**{**TINY, **config}).eval()
    randomize_constants(theirs, seed)
    theirs.save_pretrained(folder)
    return theirs, UNet3DConditionModel.from_pretrained(folder)


class Inputs:
    """Seeded inputs for a UNet, on both sides."""

    def __init__(self, unet, batch=1, frames=3, height=8, width=8, tokens=7, timestep=981, seed=1):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        config = unet.config
        self.sample = randn(batch, config.in_channels, frames, height, width)
        self.timestep = timestep
        self.text = randn(batch, tokens, config.cross_attention_dim or 8)
        self.shape = (batch, frames, height, width)
        self.randn = randn

    def theirs(self, unet, **kwargs) -> torch.Tensor:
        t = self.timestep
        t = torch.tensor(t) if isinstance(t, list) else t
        with torch.no_grad():
            return unet(self.sample, t, self.text, **kwargs).sample

    def ours(self, unet, **kwargs) -> mx.array:
        t = self.timestep
        t = mx.array(t) if isinstance(t, list) else t
        return unet(to_mlx(self.sample), t, to_mlx(self.text), **kwargs).sample
