"""Writes tests/goldens/unet: a tiny UNet saved by diffusers, and outputs of it.

Needs torch and diffusers. Run from anywhere: python tests/goldens/make_unet.py
"""

from pathlib import Path

import torch
from diffusers import UNet3DConditionModel
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "unet"


def main() -> None:
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".conv4.3." in name:
                parameter.normal_(0, 0.2)
    unet.save_pretrained(FOLDER)

    shapes = {
        "plain": (2, 3, 8, 8),
        "freeu": (1, 2, 8, 8),
        "residuals": (1, 2, 8, 8),
        "odd": (1, 2, 5, 7),
    }
    data = {}
    for case, (batch, frames, height, width) in shapes.items():
        sample = torch.randn(batch, 4, frames, height, width)
        text = torch.randn(batch, 6, 12)
        timestep = torch.tensor([10.0, 981.0])[:batch]
        kwargs = {}
        if case == "freeu":
            unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
        if case == "residuals":
            down = [torch.randn(2, *s) for s in [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)]]
            mid = torch.randn(2, 16, 4, 4)
            data |= {f"residuals.down.{i}": r for i, r in enumerate(down)} | {"residuals.mid": mid}
            kwargs = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        with torch.no_grad():
            out = unet(sample, timestep, text, **kwargs).sample
        unet.disable_freeu()
        data |= {
            f"{case}.sample": sample,
            f"{case}.text": text,
            f"{case}.timestep": timestep,
            f"{case}.out": out.contiguous(),
        }
    save_file(data, FOLDER / "cases.safetensors")


if __name__ == "__main__":
    main()
