"""Write WebP, PNG and folders of PNG; read these, GIF and JPEG."""

import contextlib
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageSequence, PngImagePlugin

from ..errors import printable
from ..inputs import open_input
from . import gif
from .frames import DEFAULT_FPS, MAX_FPS, MIN_FPS, Frames, Reading, RefusedClipError, durations, even_rate

UNIT = 1  # milliseconds
WEBP_QUALITY = 90

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
EXIF_ASCII = b"ASCII\0\0\0"  # the character set, in the first 8 bytes of a user comment

# Pillow tries all its formats regardless of the name, and some start other programs.
FORMATS = ("GIF", "JPEG", "PNG", "WEBP")
MAX_FILE_BYTES = 2**28

# Errors that Pillow's readers raise for truncated, overwritten or malicious files.
DAMAGE = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

PNG_COMMENT, PNG_RATE = "Comment", "fps"


def write_webp(path: Path, frames: Frames, fps: float, comment: str | None, loop: int) -> None:
    """Write an animated WebP, lossy at quality 90."""
    exif = Image.Exif()
    if comment is not None:
        exif[EXIF_IFD] = {USER_COMMENT: EXIF_ASCII + comment.encode("ascii")}
    first, *rest = map(Image.fromarray, frames)
    first.save(
        path,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=durations(len(frames), fps, UNIT),
        loop=loop,
        quality=WEBP_QUALITY,
        method=4,
        exif=exif,
    )


def write_png(path: Path, frames: Frames, fps: float, comment: str | None, loop: int) -> None:
    """Write an animated PNG, or a still one for one frame; lossless."""
    first, *rest = map(Image.fromarray, frames)
    info = _png_info(comment)
    if not rest:
        first.save(path, "PNG", pnginfo=info)
        return
    times = durations(len(frames), fps, UNIT)
    first.save(path, "PNG", save_all=True, append_images=rest, duration=times, loop=loop, pnginfo=info)


def write_folder(folder: Path, frames: Frames, fps: float, comment: str | None) -> None:
    """Fill an empty folder with 00000.png, ...; the first one has the rate and the comment."""
    for i, frame in enumerate(frames):
        info = _png_info(comment if i == 0 else None)
        if i == 0:
            info.add_text(PNG_RATE, repr(float(fps)))
        Image.fromarray(frame).save(folder / f"{i:05}.png", "PNG", pnginfo=info)


def _png_info(comment: str | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if comment is not None:
        info.add_itxt(PNG_COMMENT, comment)
    return info


def read_animation(reading: Reading) -> tuple[Frames, float]:
    """Read frames (F, H, W, 3) and rate of an animated or still image; long frames are repeated."""
    with open_image(reading.path) as image:
        unit = gif.UNIT if image.format == "GIF" else UNIT
        times = []
        reading.check_size(*image.size)  # because seeking the first frame decodes it
        for frame in ImageSequence.Iterator(image):
            if reading.enter(*frame.size):
                reading.add(np.asarray(frame.convert("RGB")))
            times.append(float(frame.info.get("duration", 0)))
    repeats, fps = even_rate(times, unit)
    return reading.clip(repeats), fps


def read_folder(reading: Reading) -> tuple[Frames, float]:
    """Read frames (F, H, W, 3) from all PNG files in the order of their numbers, and their rate."""
    folder, fps = reading.path, DEFAULT_FPS
    paths = png_files(folder)
    first = None
    for path in paths:
        with open_image(path) as image:
            if not reading.enter(*image.size):
                break
            if first is None:
                first, fps = image.size, _rate(image.info.get(PNG_RATE), path)
            if image.size != first:
                sizes = ["{}x{}".format(*size) for size in (first, image.size)]
                raise RefusedClipError(
                    f"{paths[0].name} is {sizes[0]} and {path.name} {sizes[1]} pixels in {folder}; "
                    "the frames of a clip have one size"
                )
            reading.add(np.asarray(image.convert("RGB")))
    return reading.clip(), fps


def _rate(text: object, path: Path) -> float:
    fps = DEFAULT_FPS if text is None else float(text) if isinstance(text, str) else math.nan
    if not MIN_FPS <= fps <= MAX_FPS:
        raise RefusedClipError(f"{path} states {fps} frames a second; use {MIN_FPS:g} to {MAX_FPS:g}")
    return fps


def png_files(folder: Path) -> list[Path]:
    """Return the PNG files of a folder, 2.png before 10.png; ValueError for a folder without any."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() == ".png"]
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise ValueError(f"{folder} holds no .png file; give a folder of frames")

    def by_number(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]

    return sorted(paths, key=by_number)


def read_comment(path: Path) -> str | bytes | None:
    """Return the text that a writer of this module stored in an image; None without one."""
    with open_image(path) as image:
        if image.format == "WEBP":
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
            return comment.removeprefix(EXIF_ASCII) if isinstance(comment, bytes) else comment
        return image.info.get("comment" if image.format == "GIF" else PNG_COMMENT)


class _Metered:
    """A file with a limit on the number of reads, in proportion to its size: in a file of zeros, Pillow would
    search for the next block byte by byte, for minutes."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, 100_000 + size // 64
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, count: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError("its blocks are too many and too small")
        return self._file.read(count)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image; Pillow's errors about its contents, on opening and later, become ValueErrors."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{path} is an image of {size} bytes; at most {MAX_FILE_BYTES} are read: write it as .mp4"
            )
        try:
            with warnings.catch_warnings():
                # Of large pictures, which have stricter limits here, and of tags.
                warnings.simplefilter("ignore")
                with Image.open(_Metered(file, size), formats=FORMATS) as image:
                    yield image
        except RefusedClipError:
            raise
        except DAMAGE as error:
            raise ValueError(
                f"{path} is damaged, or no image that Pillow reads: {printable(str(error))}"
            ) from error
