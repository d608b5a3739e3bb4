"""Writes tests/goldens/clip_vision: a tiny image encoder saved by transformers, outputs of it, and images as
transformers and diffusers prepare them.

Needs torch, transformers and diffusers. Run from anywhere: python tests/goldens/make_clip_vision.py
"""

from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.deprecated.i2vgen_xl.pipeline_i2vgen_xl import _center_crop_wide, _resize_bilinear
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

FOLDER = Path(__file__).parent / "clip_vision"


def main() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=9,
        patch_size=4,
        hidden_act="gelu",
    )
    model = CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif "position" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.save_pretrained(FOLDER)
    pixels = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    data = {"pixels": pixels, "embeds": output.image_embeds}
    data |= {f"states.{k}": state for k, state in enumerate(output.hidden_states)}

    image = torch.randint(0, 256, (23, 31, 4), dtype=torch.uint8)
    rgb = image[..., :3].contiguous()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 9}, crop_size={"height": 6, "width": 14})
    processor.save_pretrained(FOLDER)
    data["image"] = image
    data["standard"] = processor(images=Image.fromarray(image.numpy()), return_tensors="pt").pixel_values
    x = rgb.permute(2, 0, 1)[None].float() / 255
    data["antialiased"] = _resize_with_antialiasing(x, (7, 40))
    cropped = _center_crop_wide(Image.fromarray(rgb.numpy()), (12, 16))
    data["cropped"] = torch.from_numpy(np.array(cropped))
    data["bilinear"] = torch.from_numpy(np.array(_resize_bilinear(cropped, (5, 4))))
    save_file({k: v.contiguous() for k, v in data.items()}, FOLDER / "cases.safetensors")


if __name__ == "__main__":
    main()
