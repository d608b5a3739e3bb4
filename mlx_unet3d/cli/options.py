"""What several sub-commands share: kinds of arguments, dtypes, output names, stage reports."""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from .. import blas
from ..memory import parse_memory

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def count(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


def rate(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def memory_size(text: str) -> float:
    """GiB of a size such as 16GB."""
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model_options(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """Which model, and how its VAE runs; `weights`: whether its weights are read, not configs alone."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
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


def advise() -> None:
    """One line for users who could have it 20 times faster."""
    advice = blas.advice()
    if advice:
        print(f"mlx-unet3d: {advice}", file=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Prints time and peak memory of a stage when it is done."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    say(f"{name}: {seconds:.1f} s, peak memory {mx.get_peak_memory() / 1e9:.2f} GB")


LATENTS_SUFFIX = ".latents.safetensors"


def latents_path(output: str) -> Path:
    """Where the latents of a video are kept until it is written."""
    return Path(output.rstrip("/") + LATENTS_SUFFIX)


def output_of(latents: Path) -> str:
    """The video that a file of latents was to become; ValueError where the name does not say."""
    output = str(latents).removesuffix(LATENTS_SUFFIX)
    if output in (str(latents), ""):
        raise ValueError(f"{latents}: the name tells no output; give --output")
    return output
