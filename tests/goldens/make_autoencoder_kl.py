"""Writes tests/goldens/vae: a tiny autoencoder saved by diffusers, and outputs of it.

Needs torch and diffusers. Run from anywhere: python tests/goldens/make_autoencoder_kl.py
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "vae"
SHAPES = {"plain": (3, 16, 12), "odd": (1, 9, 15), "tiled": (1, 28, 22)}


def main() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    vae.save_pretrained(FOLDER)

    data = {}
    for case, (frames, height, width) in SHAPES.items():
        x = torch.rand(frames, 3, height, width) * 2 - 1
        z = torch.randn(frames, 4, height // 2, width // 2)
        if case == "tiled":
            vae.enable_tiling()
        with torch.no_grad():
            latents = vae.encode(x).latent_dist
            data |= {
                f"{case}.x": x,
                f"{case}.z": z,
                f"{case}.mean": latents.mean,
                f"{case}.logvar": latents.logvar,
                f"{case}.sample": latents.sample(torch.Generator("cpu").manual_seed(7)),
                f"{case}.images": vae.decode(z).sample,
            }
    save_file({k: v.contiguous() for k, v in data.items()}, FOLDER / "cases.safetensors")


if __name__ == "__main__":
    main()
