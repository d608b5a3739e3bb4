"""A prompt becomes a video, through the Python API.

    python examples/text_to_video.py "a large ring growing"
    python examples/text_to_video.py "a panda surfing" --model damo-vilab/text-to-video-ms-1.7b --variant fp16

The first takes seconds, by the model that comes in the package. The loop is yours: each record holds the
noisy latents and the current guess of the finished ones, so you can preview, stop early or log.
`pipe(prompt, ...)` is the same in one call.
"""

import argparse

import mlx_unet3d
from tqdm import tqdm

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a large red circle moving left on a light background")
parser.add_argument("--model", default="demo", help="a folder or hub id")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--negative-prompt", help="such as: blurry")
parser.add_argument("--frames", type=int, help="default: what the model recommends, or 16")
parser.add_argument("--steps", type=int, help="default: what the model recommends, or 25")
parser.add_argument("--output", default="text_to_video.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output)  # before the long part
pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, variant=args.variant)
pipe.scheduler = mlx_unet3d.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

states = pipe.encode_prompt(args.prompt, args.negative_prompt)
total = args.steps or pipe.recommended.num_inference_steps or 25
steps = pipe.steps(states, num_frames=args.frames, num_inference_steps=total, seed=0)
for record in tqdm(steps, total=total, desc="denoise"):
    if record.step == total // 2:
        preview = pipe.decode(record.denoised[:, :, :1])[0]
        mlx_unet3d.export_to_video(preview, "preview.png")

frames = pipe.decode(record.latents)  # (B, F, H, W, 3) in [0, 1]
pixels = mlx_unet3d.media.to_uint8(frames[0])
mlx_unet3d.media.write_video(args.output, pixels, fps=8, metadata={"prompt": args.prompt})
print(args.output)
