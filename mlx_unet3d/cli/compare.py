"""mlx-unet3d compare: two videos held against each other, in numbers and as a video."""

import argparse
import math
import os
from pathlib import Path

import numpy as np

from .. import media
from ..atomic import check_place, write_text
from ..errors import printable
from ..media import comparing
from . import options
from .outputs import check_free

_GAIN = 4.0


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="hold two videos against each other",
        description="Print PSNR and SSIM of each frame of two videos, and make a video that shows both.",
        usage="A B [OPTIONS]",
        examples=(
            "mlx-unet3d compare panda.mp4 again.mp4",
            "mlx-unet3d compare panda.gif red.gif -o both.gif",
            "mlx-unet3d compare panda.gif red.gif -o difference.mp4 --mode difference --plot quality.svg",
        ),
    )
    parser.add_argument("first", metavar="A", type=options.path, help="a video, or a folder of images")
    parser.add_argument("second", metavar="B", type=options.path, help="another, of the same size")
    parser.add_argument("-o", "--output", type=options.path, help="video to write (default: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--mode",
        choices=comparing.MODES,
        help="of the output: side by side, the difference, or flicker from one to the other (default: side)",
    )
    parser.add_argument(
        "--gain",
        type=options.rate,
        metavar="X",
        help=f"what --mode difference multiplies by (default: {_GAIN:g})",
    )
    parser.add_argument("--plot", type=options.path, metavar="FILE", help="draw the numbers into an .svg")
    parser.add_argument("--num-frames", type=options.frames, help="compare so many, from the first")
    options.add_file_options(parser)
    options.add_loudness(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check(args)
    paths = (args.first, args.second)
    (a, fps), (b, other) = (media.read_video(path, num_frames=args.num_frames) for path in paths)
    comparing.check_pair(a, b, paths)
    if args.num_frames is not None and len(a) < args.num_frames:
        raise ValueError(f"--num-frames {args.num_frames}: both have only {len(a)} frames; ask for fewer")
    if not math.isclose(fps, other, rel_tol=1e-3):
        options.say(f"{paths[0]} has {fps:g} frames a second, {paths[1]} {other:g}; the first counts")
    decibels, similarities = comparing.psnr(a, b), comparing.ssim(a, b)
    if args.output is not None:
        mode = args.mode or "side"
        shown = comparing.compared(a, b, mode, args.gain or _GAIN)
        rate = fps * 2 if mode == "flicker" else fps
        own = dict(fps=rate, scale=args.scale or 1, codec=args.codec, overwrite=args.overwrite)
        media.write_video(args.output, shown, **own)
    if args.plot is not None:
        write_text(Path(args.plot), comparing.plot(decibels, similarities))
    print("\n".join(table(decibels, similarities)))
    for path in (args.output, args.plot):
        if path is not None:
            print(printable(path))
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise what keeps the results from being written, before videos are read."""
    for name in ("mode", "scale", "codec", "gain"):
        if getattr(args, name) is not None and args.output is None:
            raise ValueError(f"--{name} is for the video of -o; give that too, or leave it out")
    if args.gain is not None and args.mode != "difference":
        raise ValueError(f"--gain {args.gain:g} multiplies a difference; give --mode difference too")
    if args.plot is not None and Path(args.plot).suffix.lower() != ".svg":
        raise ValueError(f"--plot {args.plot} must end in .svg")
    inputs = {os.path.realpath(path) for path in (args.first, args.second)}
    for path in filter(None, (args.output, args.plot)):
        if os.path.realpath(path) in inputs:
            raise ValueError(f"{path} is one of the videos to compare; give another name")
        check_free(path, args.overwrite)
    if args.output is not None:
        media.check_writable(args.output, codec=args.codec, overwrite=args.overwrite)
    if args.plot is not None:
        check_place(Path(args.plot))


def table(decibels: np.ndarray, similarities: np.ndarray) -> list[str]:
    """Lines of a table, one a frame; the last is of the whole clip, its PSNR of the mean squared error."""
    errors = 10 ** (-decibels / 10)
    whole = math.inf if errors.mean() == 0 else -10 * math.log10(errors.mean())
    rows = [(str(i), *pair) for i, pair in enumerate(zip(decibels, similarities, strict=True))]
    rows.append(("all", whole, similarities.mean()))
    return ["frame  PSNR dB    SSIM", *(f"{name:>5}  {db:7.2f}  {like:.4f}" for name, db, like in rows)]
