"""Two passes: a small video from a prompt, then a larger one from that (the way of ZeroScope XL).

    python examples/video_to_video.py "a large ring growing"
    python examples/video_to_video.py "a panda surfing a wave" --model cerspense/zeroscope_v2_576w

The first takes seconds, by the model that comes in the package. The second pass adds noise to the enlarged
frames and removes it again, so it invents detail. Another checkpoint may make it: cerspense/zeroscope_v2_XL
was trained for that, at 1024x576.
"""

import argparse

import mlx_unet3d
import numpy as np
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a large red circle moving left on a light background")
parser.add_argument("--model", default="demo", help="a folder or hub id")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--frames", type=int, help="default: what the model recommends, or 16")
parser.add_argument("--steps", type=int, help="default: what the model recommends, or 50")
parser.add_argument("--strength", type=float, default=0.6, help="how much the second pass changes")
parser.add_argument("--output", default="video_to_video.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output)  # before the long part
first = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, variant=args.variant)
settings = dict(num_inference_steps=args.steps, seed=0)
small = first(args.prompt, num_frames=args.frames, output_type="pil", **settings).frames[0]

size = tuple(n * 3 // 2 // 8 * 8 for n in small[0].size)  # width and height, half as much again
large = np.stack([np.asarray(frame.resize(size, Image.Resampling.LANCZOS)) for frame in small])

# The same networks, without loading them twice.
second = mlx_unet3d.VideoToVideoPipeline.from_pipe(first)
frames = second(args.prompt, large, strength=args.strength, **settings).frames[0]
pixels = mlx_unet3d.media.to_uint8(frames)
mlx_unet3d.media.write_video(args.output, pixels, fps=8, metadata={"prompt": args.prompt})
print(args.output)
