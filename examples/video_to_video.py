"""Two passes: a small video from a prompt, then a larger one from that (the way of ZeroScope XL).

    python examples/video_to_video.py "a panda surfing a wave"

The second pass adds noise to the enlarged frames and removes it again, so it invents detail. Another
checkpoint may make it: cerspense/zeroscope_v2_XL was trained for that, at 1024x576.
"""

import argparse

import mlx_unet3d
import mlx.core as mx
import numpy as np
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a panda surfing a wave")
parser.add_argument("--model", default="damo-vilab/text-to-video-ms-1.7b")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--frames", type=int, default=16)
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--output", default="video_to_video.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output)
dtype = mx.float16 if mx.default_device() == mx.gpu else mx.float32
first = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, dtype=dtype, variant=args.variant)
small = first(
    args.prompt,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    seed=7,
    output_type="pil",
    progress=True,
).frames[0]

size = tuple(n * 3 // 2 // 8 * 8 for n in small[0].size)  # width and height, half as much again
large = np.stack([np.asarray(frame.resize(size, Image.Resampling.LANCZOS)) for frame in small])

# The same networks, without loading them twice.
second = mlx_unet3d.VideoToVideoPipeline(
    first.unet, first.vae, first.text_encoder, first.tokenizer, first.scheduler
)
frames = second(
    args.prompt, large, strength=0.6, num_inference_steps=args.steps, seed=7, progress=True
).frames[0]
mlx_unet3d.media.write_video(
    args.output, mlx_unet3d.media.to_uint8(frames), fps=8, metadata={"prompt": args.prompt}
)
print(args.output)
