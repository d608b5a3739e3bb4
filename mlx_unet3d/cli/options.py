"""Shared by sub-commands: kinds of arguments, dtypes, output names, stage reports."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import blas
from ..dtypes import FLOAT_DTYPES as DTYPES
from ..errors import printable_lines
from ..media import CODECS, MAX_SCALE
from ..memory import parse_memory
from ..values import (  # noqa: F401  kinds of arguments, beside those below
    LONGEST_TEXT,
    at_most,
    check_size,
    count,
    count_from_zero,
    frames,
    integer,
    number,
    rate,
    side,
    text,
)


def path(value: str) -> str:
    """Parse a path or an id, which must not be empty."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError("it names nothing")
    return text(value)


def one_of(*names: str) -> Callable[[str], str]:
    """Return a parser of one of some names."""

    def parse(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value[:40]!r} is none of {', '.join(names)}")
        return value

    return parse


def seed(text: str) -> int:
    """Parse an integer of 64 bits, signed or unsigned."""
    value = integer(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError("a seed of more than 64 bits; use 0 <= seed < 2**64")
    return value


def scale(text: str) -> int:
    """Parse how many pixels each way a pixel becomes."""
    return at_most(count(text), MAX_SCALE)


def check_latents(path: Path, shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless latents (B, C, F, h, w) belong to the single video that their settings
    describe."""
    if shape[0] != 1:
        raise ValueError(f"{path} holds {shape[0]} videos; give a file of one")
    sizes = [settings.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(f"{path} does not say the size of its video; give a file that `generate` left")
    check_size(*sizes)
    length, height, width = sizes
    # A latent stands for 1 to 64 pixels each way; an input video may have a remainder.
    fits = any((height // factor, width // factor) == shape[3:] for factor in range(1, 65))
    if shape[2] != length or not fits:
        raise ValueError(
            f"{path} holds latents of shape {shape}, and its settings say {length} frames of "
            f"{width}x{height}; give a file that `generate` left"
        )


def memory_size(text: str) -> float:
    """Parse a size such as 16GB to GiB."""
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def flag(name: str) -> str:
    """Return the words by which messages name a setting."""
    return "the prompt" if name == "prompt" else "--" + name.replace("_", "-")


def add_model_options(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """Add the options of the model and its VAE; `weights`: True if weights are read, not only configs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=path,
        metavar="PATH_OR_ID",
        help="pipeline folder, hub id owner/name, or demo (default: demo, or what a file says)",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    if weights:
        group.add_argument("--variant", help="weight files to read, such as fp16")
    group.add_argument("--local-files-only", action="store_true", default=False, help="never ask the hub")
    group.add_argument(
        "--vae-dtype",
        choices=DTYPES,
        help="of the decoder, which overflows in float16 with some checkpoints (default: float32)",
    )
    group.add_argument(
        "--vae-tiling",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="decode large frames in tiles, which blend where they meet: less memory, another result",
    )


def add_file_options(parser: argparse._ActionsContainer) -> None:
    """Add --scale and --codec."""
    parser.add_argument(
        "--scale",
        type=scale,
        metavar="N",
        help="make each pixel a square of N by N in the file, for small videos (default: 1)",
    )
    parser.add_argument(
        "--codec",
        choices=CODECS,
        help="of .mp4 and .mov: h264, hevc for smaller files, in .mov prores for editing (default: h264)",
    )


def advise() -> None:
    """Print one line for users who could run it 20 times faster."""
    advice = blas.advice()
    if advice:
        say(f"mlx-unet3d: {advice}")


QUIET, NORMAL, VERBOSE = range(3)
loudness: ContextVar[int] = ContextVar("loudness", default=NORMAL)
"""How much a command says besides its result; errors and warnings are always said."""


def say(text: str, least: int = NORMAL) -> None:
    """Print lines for the user, which may contain file names, unless the command is quieter than `least`."""
    if loudness.get() >= least:
        print(printable_lines(text), file=sys.stderr, flush=True)


def is_quiet() -> bool:
    """Return True if no progress is to be shown."""
    return loudness.get() == QUIET


def add_loudness(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose."""
    group = parser.add_argument_group("messages").add_mutually_exclusive_group()
    shared = dict(dest="loudness", action="store_const", default=NORMAL)
    group.add_argument("--quiet", const=QUIET, **shared, help="print results, warnings and errors alone")
    group.add_argument("--verbose", const=VERBOSE, **shared, help="print settings and the memory plan too")


@contextmanager
def stage(name: str, measured: dict[str, dict[str, float]] | None = None) -> Iterator[None]:
    """Print time and peak memory of a stage when it ends, and add them to those measured, by its name."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    peak = mx.get_peak_memory()
    if measured is not None:
        measured[name.split(",")[0]] = {"seconds": round(seconds, 3), "peak_memory_bytes": peak}
    say(f"{name}: {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB")


LATENTS_SUFFIX = ".latents.safetensors"


def latents_path(output: str) -> Path:
    """Return the path where the latents of a video are kept until it is written."""
    return Path(output.rstrip("/") + LATENTS_SUFFIX)


def output_of(latents: Path) -> str:
    """Return the path of the video for a file of latents; ValueError where the name does not tell it."""
    output = str(latents).removesuffix(LATENTS_SUFFIX)
    if output in (str(latents), ""):
        raise ValueError(f"{latents}: the name tells no output; give --output")
    return output
