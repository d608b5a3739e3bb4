"""Draws the contact sheet beside this file: clips of the demo model under their prompts.

    python examples/gallery/make.py

The clips are the model's own for seed 0, 1, 2, ..., each in its first try.
"""

import argparse
from pathlib import Path

import mlx_unet3d
import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PROMPTS = [
    "a large red circle moving left on a dark background",
    "a small blue square moving up on a light background",
    "a large green triangle growing on a dark background",
    "a yellow ring moving right on a dark background",
    "a large purple cross shrinking on a light background",
    "a small cyan circle moving down on a dark background",
    "a large blue ring standing still on a light background",
    "a small red triangle moving right on a light background",
    "a large yellow cross moving up on a dark background",
    "a large cyan square growing on a dark background",
    "a small green circle moving left on a light background",
    "a large purple triangle moving down on a dark background",
]
COLUMNS, ZOOM, MARGIN, CAPTION = 4, 3, 8, 44  # clips a row; pixels a pixel; around a clip; under it


def contact_sheet(clips: np.ndarray, prompts: list[str]) -> np.ndarray:
    """uint8 clips (P, F, H, W, 3) -> one clip (F, rows, columns, 3) of all of them with their prompts."""
    _, frames, height, width, _ = clips.shape
    cell = (width * ZOOM + MARGIN, height * ZOOM + CAPTION)
    rows = -(-len(clips) // COLUMNS)
    blank = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(blank), ImageFont.load_default(13)
    places = [(MARGIN + i % COLUMNS * cell[0], MARGIN + i // COLUMNS * cell[1]) for i in range(len(clips))]
    for (x, y), prompt in zip(places, prompts, strict=True):
        words = prompt.split()
        middle = next(i for i in range(len(words)) if len(" ".join(words[: i + 1])) * 2 >= len(prompt))
        lines = " ".join(words[: middle + 1]), " ".join(words[middle + 1 :])
        draw.text((x, y + height * ZOOM + 3), "\n".join(lines), "black", font)
    sheet = []
    for f in range(frames):
        image = blank.copy()
        for place, clip in zip(places, clips, strict=True):
            large = Image.fromarray(clip[f]).resize((width * ZOOM, height * ZOOM), Image.Resampling.BICUBIC)
            image.paste(large, place)
        sheet.append(np.asarray(image))
    return np.stack(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("contact_sheet.gif"))
    args = parser.parse_args()
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, dtype=mx.float32)
    seeds = list(range(len(PROMPTS)))
    frames = pipe(PROMPTS, num_frames=8, num_inference_steps=args.steps, seed=seeds).frames
    sheet = contact_sheet(mlx_unet3d.media.to_uint8(frames), PROMPTS)
    metadata = {"model": args.model, "weights": pipe.weights_checksum}
    mlx_unet3d.media.write_video(args.output, sheet, fps=6, metadata=metadata)
    print(args.output)


if __name__ == "__main__":
    main()
