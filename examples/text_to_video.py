"""A prompt becomes a video, through the Python API.

    python examples/text_to_video.py "a panda surfing a wave"

The loop is yours: each record holds the noisy latents and the current guess of the finished ones, so you
can preview, stop early or log. `pipe(prompt, ...)` is the same in one call.
"""

import argparse

import mlx_unet3d
import mlx.core as mx
from tqdm import tqdm

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a panda surfing a wave")
parser.add_argument("--model", default="damo-vilab/text-to-video-ms-1.7b")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--frames", type=int, default=16)
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--output", default="text_to_video.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output)  # before the long part
dtype = mx.float16 if mx.default_device() == mx.gpu else mx.float32
pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, dtype=dtype, variant=args.variant)
pipe.scheduler = mlx_unet3d.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

states = pipe.encode_prompt(args.prompt, negative_prompt="blurry", guidance_scale=9.0)
steps = pipe.steps(states, num_frames=args.frames, num_inference_steps=args.steps, guidance_scale=9.0, seed=7)
for record in tqdm(steps, total=args.steps, desc="denoise"):
    if record.step == args.steps // 2:
        preview = mlx_unet3d.media.to_uint8(pipe.decode(record.denoised[:, :, :1])[0])
        mlx_unet3d.media.write_video("preview.png", preview)

frames = pipe.decode(record.latents, progress=True)  # (B, F, H, W, 3) in [0, 1]
mlx_unet3d.media.write_video(
    args.output, mlx_unet3d.media.to_uint8(frames[0]), fps=8, metadata={"prompt": args.prompt}
)
print(args.output)
