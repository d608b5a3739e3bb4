"""mlx-unet3d decode: latents that `generate` left -> a video."""

import argparse
from pathlib import Path

from .. import media
from ..latents import load_latents
from ..models.autoencoder_kl import AutoencoderKL
from ..pipelines.base import decode_latents
from . import options


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "decode",
        help="make a video of latents that a run left",
        description="Decode latents that `generate` left on disk, with the model named in them.",
    )
    parser.add_argument("latents", type=Path, metavar="LATENTS", help="a .latents.safetensors file")
    parser.add_argument("-o", "--output", help="file to write (default: the name it was meant to have)")
    parser.add_argument("--fps", type=options.rate, help="frames a second (default: as asked then)")
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    latents, settings, _ = load_latents(args.latents)
    if latents.shape[0] != 1:
        raise ValueError(f"{args.latents} holds {latents.shape[0]} videos; decode takes one")
    where = {key: settings.get(key) for key in ("model", "revision", "variant")}
    if args.model is not None:
        where = {"model": args.model, "revision": None, "variant": None}
    where |= {key: getattr(args, key) for key in ("revision", "variant") if getattr(args, key) is not None}
    model = where.pop("model")
    if model is None:
        raise ValueError(f"{args.latents} does not name its model; give --model")
    output = args.output if args.output is not None else options.output_of(args.latents)
    fps = args.fps if args.fps is not None else settings.get("fps", 8.0)
    media.check_writable(output, fps=fps)
    options.advise()
    dtype = options.DTYPES[args.vae_dtype or settings.get("vae_dtype", "float32")]
    with options.stage("load"):
        vae = AutoencoderKL.from_pretrained(
            model, subfolder="vae", dtype=dtype, local_files_only=args.local_files_only, **where
        )
    if args.vae_tiling if args.vae_tiling is not None else settings.get("vae_tiling", False):
        vae.enable_tiling()
    with options.stage("decode"):
        frames = decode_latents(vae, latents, progress=True)
    media.write_video(output, media.to_uint8(frames[0]), fps=fps, metadata=settings | {"fps": fps})
    print(output)
    return 0
