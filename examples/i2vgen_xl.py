"""A picture begins to move as a prompt says: I2VGen-XL.

    python examples/i2vgen_xl.py photo.jpg "a boat rocks on the waves"

The middle of the picture is cut out in the aspect ratio of the video. There is no small model of this
family in the package: the default is downloaded in the first run.
"""

import argparse

import mlx_unet3d

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("prompt")
parser.add_argument("--model", default="ali-vilab/i2vgen-xl")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--output", default="i2vgen_xl.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output, fps=16)  # before the long part
pipe = mlx_unet3d.I2VGenXLPipeline.from_pretrained(args.model, variant=args.variant)
frames = pipe(
    args.prompt,
    args.image,
    num_inference_steps=args.steps,
    negative_prompt="distorted, low resolution, static",
    target_fps=16,
    seed=7,
).frames
mlx_unet3d.export_to_video(frames[0], args.output, fps=16)
print(args.output)
