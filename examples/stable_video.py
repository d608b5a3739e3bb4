"""A picture begins to move: Stable Video Diffusion.

    python examples/stable_video.py photo.jpg

The video is 576x1024 pixels, or a portrait's on its side. More motion: a higher `motion_bucket_id` or
`noise_aug_strength`. `decode_chunk_size` bounds the memory of the decoder. There is no small model of this
family in the package: the default is downloaded in the first run.
"""

import argparse

import mlx_unet3d

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("--model", default="stabilityai/stable-video-diffusion-img2vid-xt")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--output", default="stable_video.gif")
args = parser.parse_args()

mlx_unet3d.media.check_writable(args.output, fps=7)  # before the long part
image = mlx_unet3d.media.read_image(args.image)
pipe = mlx_unet3d.StableVideoDiffusionPipeline.from_pretrained(args.model, variant=args.variant)
pipe.enable_release()  # each network goes when it is done with

height, width = sorted(pipe.default_size())
frames = pipe(
    image,
    height=height if image.width >= image.height else width,
    width=width if image.width >= image.height else height,
    num_inference_steps=args.steps,
    fps=7,
    motion_bucket_id=127,
    decode_chunk_size=4,
    seed=7,
).frames
mlx_unet3d.export_to_video(frames[0], args.output, fps=7)
print(args.output)
