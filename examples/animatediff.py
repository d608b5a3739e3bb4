"""A Stable Diffusion model and a motion adapter make a video of a prompt.

    python examples/animatediff.py "a corgi walking in the park"

The base is any Stable Diffusion 1.5 folder or hub id, or a folder that `mlx-unet3d convert` wrote, which
holds the motion modules already: give --motion-adapter "" for it. There is no small model of this family in
the package: the defaults are downloaded in the first run.
"""

import argparse

import mlx_unet3d

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a corgi walking in the park")
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--motion-adapter", default="guoyww/animatediff-motion-adapter-v1-5-3")
parser.add_argument("--motion-lora", help="a folder, file or hub id, of a pan or zoom")
parser.add_argument("--frames", type=int, default=16)
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--output", default="animatediff.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output)  # before the long part
pipe = mlx_unet3d.AnimateDiffPipeline.from_pretrained(args.model, motion_adapter=args.motion_adapter or None)
# The motion modules were trained on this schedule, with the betas of the base model
pipe.scheduler = mlx_unet3d.DDIMScheduler.from_config(
    pipe.scheduler.config,
    beta_schedule="linear",
    clip_sample=False,
    timestep_spacing="linspace",
    steps_offset=1,
)
if args.motion_lora:
    pipe.load_lora_weights(args.motion_lora, "motion", weight=0.8)

frames = pipe(
    args.prompt,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    negative_prompt="bad quality, worse quality",
    seed=7,
).frames  # (B, F, H, W, 3) in [0, 1]
mlx_unet3d.media.write_video(
    args.output, mlx_unet3d.media.to_uint8(frames[0]), fps=8, metadata={"prompt": args.prompt}
)
print(args.output)
