"""mlx-unet3d decode: latents saved by `generate` -> a video."""

import argparse
from pathlib import Path
from typing import Any

from .. import media
from ..checkpoints import read_component_config
from ..latents import SavedLatents, open_latents
from ..models.autoencoder_kl import AutoencoderKL
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from ..pipelines.decoding import decode_latents
from . import options
from .outputs import add_json, announce, check_free, drop_codec, file_options
from .settings import DEFAULTS, is_same_model, of_file, public, trusted

# Settings of the file that the command line can override.
_CHANGED = (
    *("model", "revision", "variant", "fps", "scale", "codec"),
    *("vae_dtype", "vae_tiling", "decode_chunk_size"),
)
_FPS = 8.0


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "decode",
        help="make a video of latents that a run left",
        description="Decode latents that `generate` left on disk, with the model named in them.",
        usage="LATENTS [OPTIONS]",
        examples=(
            "mlx-unet3d decode panda.gif.latents.safetensors",
            "mlx-unet3d decode panda.gif.latents.safetensors -o panda.mp4 --fps 12",
        ),
    )
    parser.add_argument("latents", type=Path, metavar="LATENTS", help="a .latents.safetensors file")
    parser.add_argument(
        "-o",
        "--output",
        type=options.path,
        help="file to write (default: the name it was meant to have)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_json(parser)
    options.add_loudness(parser)
    parser.add_argument("--fps", type=options.rate, help="frames a second (default: as asked then)")
    options.add_file_options(parser)
    parser.add_argument(
        "--decode-chunk-size",
        type=options.count,
        metavar="N",
        help="frames that the decoder of Stable Video Diffusion takes together (default: as then)",
    )
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    saved = open_latents(args.latents)
    settings = DEFAULTS | of_file(saved.settings, saved.path)
    given = {key: getattr(args, key) for key in _CHANGED if getattr(args, key) is not None}
    if args.model is not None and not is_same_model(args.model, settings["model"]):
        settings |= {"revision": None, "variant": None}  # they belong to the other model
    output = options.output_of(args.latents) if args.output is None else args.output
    drop_codec(output, settings)
    settings |= given
    if settings["model"] is None:
        raise ValueError(f"{saved.path} does not name its model; give --model")
    options.check_latents(saved.path, saved.shape, settings)
    trusted({"model": settings["model"]}, saved.path, given)
    rate = settings["fps"] or _FPS
    check_free(output, args.overwrite)
    media.check_scale(settings["scale"], [settings[n] for n in ("num_frames", "height", "width")])
    media.check_writable(
        output, fps=rate, metadata=public(settings), overwrite=args.overwrite, **file_options(settings)
    )
    make_video(args, saved, settings, output)
    return 0


def make_video(args: argparse.Namespace, saved: SavedLatents, settings: dict[str, Any], output: str) -> None:
    """Decode latents with these settings and write the video."""
    latents, _ = saved.read()
    rate = settings["fps"] or _FPS
    options.advise()
    stages: dict[str, dict[str, float]] = {}
    with options.stage("load", stages):
        where = dict(revision=settings["revision"], local_files_only=args.local_files_only)
        config = read_component_config(settings["model"], "config.json", subfolder="vae", **where)
        temporal = config.get("_class_name") in AutoencoderKLTemporalDecoder.class_names
        kind = AutoencoderKLTemporalDecoder if temporal else AutoencoderKL
        vae = kind.from_pretrained(
            settings["model"],
            subfolder="vae",
            dtype=options.DTYPES[settings["vae_dtype"]],
            variant=settings["variant"],
            **where,
        )
    if settings["vae_tiling"]:
        vae.enable_tiling()
    with options.stage("decode", stages):
        chunk = settings["decode_chunk_size"]
        frames = decode_latents(vae, latents, decode_chunk_size=chunk, progress=not options.is_quiet())
    own = dict(metadata=public(settings), **file_options(settings))
    media.write_video(output, media.to_uint8(frames[0]), fps=rate, **own)
    announce(args, output, settings, stages)
