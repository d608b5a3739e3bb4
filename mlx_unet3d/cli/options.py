"""Shared by sub-commands: kinds of arguments, dtypes, output names, stage reports."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import blas
from ..errors import printable_lines
from ..memory import parse_memory
from ..values import check_size, text
from ..values import count as count
from ..values import frames as frames
from ..values import number as number
from ..values import rate as rate
from ..values import side as side

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


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
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError("a seed of more than 64 bits; use 0 <= seed < 2**64")
    return value


def check_latents(path: Path, shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless latents (B, C, F, h, w) belong to the single video that their settings
    describe."""
    if shape[0] != 1:
        raise ValueError(f"{path} holds {shape[0]} videos; give a file of one")
    sizes = [settings.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(f"{path} does not say the size of its video; give a file that `generate` left")
    check_size(*sizes)
    frames, height, width = sizes
    # A latent stands for 1 to 64 pixels each way; an input video may have a remainder.
    fits = any((height // factor, width // factor) == shape[3:] for factor in range(1, 65))
    if shape[2] != frames or not fits:
        raise ValueError(
            f"{path} holds latents of shape {shape}, and its settings say {frames} frames of "
            f"{width}x{height}; give a file that `generate` left"
        )


def memory_size(text: str) -> float:
    """Parse a size such as 16GB to GiB."""
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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


def advise() -> None:
    """Print one line for users who could run it 20 times faster."""
    advice = blas.advice()
    if advice:
        print(f"mlx-unet3d: {advice}", file=sys.stderr)


def say(text: str) -> None:
    """Print lines for the user, which may contain file names."""
    print(printable_lines(text), file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print time and peak memory of a stage when it ends."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    say(f"{name}: {seconds:.1f} s, peak memory {mx.get_peak_memory() / 1e9:.2f} GB")


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
