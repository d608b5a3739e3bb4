"""A clip longer than the model was trained for, in context windows, which may close to a loop.

    python examples/windows.py "a large blue ring shrinking on a light background" --loop
    python examples/windows.py "waves" --model damo-vilab/text-to-video-ms-1.7b --length 16 --frames 48

The first takes seconds, by the model that comes in the package and knows clips of 8 frames. The network
sees a window at a time, so that the memory is that of a window, and predictions are averaged where windows
overlap.
"""

import argparse

import mlx_unet3d

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="a large red circle growing on a dark background")
parser.add_argument("--model", default="demo", help="a folder or hub id of any family with prompts")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--frames", type=int, default=24)
parser.add_argument("--length", type=int, help="frames of a window; default: what the model was trained on")
parser.add_argument("--loop", action="store_true", help="let the last frame lead to the first")
parser.add_argument("--steps", type=int, help="default: what the model recommends, or 50")
parser.add_argument("--output", default="windows.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output)  # before the long part
pipe = mlx_unet3d.load_pipeline(args.model, variant=args.variant)
length = args.length or pipe.num_frames()
windows = mlx_unet3d.ContextWindows(
    length,
    overlap=length // 2,
    schedule="looped_uniform" if args.loop else "standard_uniform",
    closed_loop=args.loop,
)
frames = pipe(
    args.prompt,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    context_windows=windows,
    seed=0,
).frames[0]
mlx_unet3d.export_to_video(frames, args.output, fps=8)
print(args.output)
