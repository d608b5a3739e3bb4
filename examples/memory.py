"""Effects of the memory options of the networks: the peak of a forward and of a decode with each.

    python examples/memory.py
    python examples/memory.py --model damo-vilab/text-to-video-ms-1.7b --variant fp16 --size 256

The first takes seconds, by the model that comes in the package.
The results stay the same; the peaks are above the weights. On a Mac the fused attention needs no slices:
try forward chunking and small decode chunks first, and half precision before both.
"""

import argparse
import math
import time

import mlx_unet3d
import mlx.core as mx

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo", help="a folder or hub id")
parser.add_argument("--variant", help="weight files to read, such as fp16")
parser.add_argument("--frames", type=int, default=8)
parser.add_argument("--size", type=int, default=64, help="pixels each way, a multiple of 64")
args = parser.parse_args()

# Without a limit MLX prepares work ahead of the device, and the peak shows that instead.
mx.set_memory_limit(1)
pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, variant=args.variant)
unet, vae = pipe.unet, pipe.vae


def measure(name, fn):
    mx.clear_cache()
    mx.reset_peak_memory()
    weights, start = mx.get_active_memory(), time.perf_counter()
    mx.eval(fn())
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - weights
    print(f"{name:<44}{peak / 1e6:8.0f} MB {seconds:8.1f} s")


side = args.size // vae.spatial_factor
# Prompt and negative prompt
sample = mx.random.normal((2, unet.config.in_channels, args.frames, side, side)).astype(unet.dtype)
text = mx.random.normal((2, 77, unet.config.cross_attention_dim)).astype(unet.dtype)


def forward():
    return unet(sample, 500, text).sample


measure("UNet, plain", forward)
# Must divide the batch of the spatial transformers, B*F, and of the temporal ones, B*H*W, at all levels.
coarsest = side // 2 ** (len(unet.config.block_out_channels) - 1)
chunk_size = math.gcd(2 * args.frames, 2 * coarsest**2) // 2
unet.enable_forward_chunking(chunk_size, dim=0)
measure(f"UNet, feed-forwards in chunks of {chunk_size}", forward)
unet.disable_forward_chunking()
unet.set_attention_slice("max")
measure("UNet, attention one head at a time", forward)
unet.set_attention_slice(None)
measure(
    "UNet, two passes of one", lambda: [unet(sample[i : i + 1], 500, text[i : i + 1]).sample for i in (0, 1)]
)

latents = mx.random.normal((args.frames, vae.config.latent_channels, side, side))
for chunk in (args.frames, None, 1):
    name = f"{vae.frames_per_chunk(args.size, args.size)} (default)" if chunk is None else chunk
    measure(f"VAE, frames at once: {name}", lambda chunk=chunk: vae.decode(latents, chunk_size=chunk))
