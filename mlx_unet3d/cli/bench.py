"""mlx-unet3d bench: measure the time and memory of a step on this machine, as a row for a table."""

import argparse
import statistics
import time

import mlx.core as mx
from PIL import Image

from .. import __version__, memory
from . import families, options
from .config import preference
from .doctor import facts
from .settings import DEFAULTS


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a step on this machine",
        description="Measure steps and decoding on this machine; prints a row of a Markdown table.",
        usage="[OPTIONS]",
        examples=(
            "mlx-unet3d bench",
            "mlx-unet3d bench --model ms-1.7b --num-frames 16 --height 256 --width 256",
        ),
    )
    options.add_model_options(parser)
    parser.add_argument("--num-frames", type=options.frames, help="default: the model's, or 16")
    parser.add_argument("--height", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    parser.add_argument("--width", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    parser.add_argument("--steps", type=options.count, default=3, help="to measure, after one (default: 3)")
    parser.add_argument(
        "--guidance", type=options.number, help="1: one pass a step (default: the model's, or 9)"
    )
    parser.add_argument(
        "--dtype",
        choices=options.DTYPES,
        help="of the network (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options.advise()
    model = args.model if args.model is not None else preference("model")[0]
    dtype = args.dtype or ("float16" if mx.default_device() == mx.gpu else "float32")
    settings = DEFAULTS | {"model": model, "revision": args.revision, "prompt": ""}
    family = families.find_family(settings, local_files_only=args.local_files_only)
    pipe = family.pipeline.from_pretrained(
        model,
        dtype=options.DTYPES[dtype],
        vae_dtype=options.DTYPES[args.vae_dtype or "float32"],
        revision=args.revision,
        variant=args.variant,
        local_files_only=args.local_files_only,
    )
    if args.vae_tiling:
        pipe.enable_vae_tiling()
    chosen = {name: getattr(args, name) for name in ("num_frames", "height", "width", "guidance")}
    settings |= {name: value for name, value in chosen.items() if value is not None}
    settings["steps"] = args.steps + 1
    families.complete(family, pipe, settings, None)
    guided, frames = pipe.is_guided(settings["guidance"]), settings["num_frames"]
    height, width = settings["height"], settings["width"]
    options.check_size(frames, height, width)
    image = Image.new("RGB", (width, height), "gray") if "image" in family.takes else None
    states = families.encode(family, pipe, settings, image)
    mx.reset_peak_memory()
    seconds, latents = [], None
    start = time.perf_counter()
    for record in families.steps(family, pipe, states, None, settings):
        latents = record.latents
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    step = statistics.median(seconds[1:])  # the first run compiles kernels
    start = time.perf_counter()
    pipe.decode(latents)
    decoding = time.perf_counter() - start
    video = memory.Video(frames, height, width, guidance=guided)
    work = memory.step_work(memory.Networks.of(pipe), video, pipe.unet.dtype)
    whole = pipe.num_inference_steps() * step + decoding
    found = facts()
    row = {
        "chip": found["chip"],
        "memory": found["memory"],
        "system": found["system"],
        "mlx-unet3d": __version__,
        "MLX": found["MLX"],
        "model": str(model),
        "dtype": dtype,
        "video": f"{width}x{height}x{frames}{', guided' if guided else ''}",
        "s a step": f"{step:.3g}",
        "s to decode": f"{decoding:.3g}",
        f"frames a second, {pipe.num_inference_steps()} steps": f"{frames / whole:.3g}",
        "peak GB": f"{mx.get_peak_memory() / 1e9:.2f}",
        "TFLOP/s": f"{work.operations / step / 1e12:.3g}",
        "GB/s": f"{work.moved / step / 1e9:.3g}",
    }
    for cells in (row.keys(), ["---"] * len(row), row.values()):
        print("| " + " | ".join(cells) + " |")
    return 0
