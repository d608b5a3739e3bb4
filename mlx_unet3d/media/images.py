"""WebP, PNG, folders of PNG, and reading whatever Pillow reads."""

import contextlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, PngImagePlugin

from . import gif
from .frames import DEFAULT_FPS, Frames, durations, even_rate

UNIT = 1  # milliseconds
WEBP_QUALITY = 90

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
EXIF_ASCII = b"ASCII\0\0\0"  # names the character set, in the first 8 bytes of a user comment

# What Pillow's readers raise, by format, over a file that is cut off or overwritten.
DAMAGE = (OSError, SyntaxError, ValueError, IndexError, struct.error)

PNG_COMMENT, PNG_RATE = "Comment", "fps"


def write_webp(path: Path, frames: Frames, fps: float, comment: str | None, loop: int) -> None:
    """Writes an animated WebP, lossy at quality 90."""
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
    """Writes an animated PNG, or a still one for one frame; lossless."""
    first, *rest = map(Image.fromarray, frames)
    info = _png_info(comment)
    if not rest:
        first.save(path, "PNG", pnginfo=info)
        return
    times = durations(len(frames), fps, UNIT)
    first.save(path, "PNG", save_all=True, append_images=rest, duration=times, loop=loop, pnginfo=info)


def write_folder(folder: Path, frames: Frames, fps: float, comment: str | None) -> None:
    """Fills an empty folder with 00000.png, ...; the first one carries the rate and the comment."""
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


def read_animation(path: Path) -> tuple[Frames, float]:
    """Frames (F, H, W, 3) and rate of an animated or still image; long frames are repeated."""
    with open_image(path) as image:
        unit = gif.UNIT if image.format == "GIF" else UNIT
        frames, times = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            times.append(float(frame.info.get("duration", 0)))
    repeats, fps = even_rate(times, unit)
    return np.repeat(np.stack(frames), repeats, axis=0), fps


def read_folder(folder: Path) -> tuple[Frames, float]:
    """Frames (F, H, W, 3) of all PNG files in the order of their numbers, and their rate."""
    paths = png_files(folder)
    frames, fps = [], DEFAULT_FPS
    for path in paths:
        with open_image(path) as image:
            if path == paths[0]:
                fps = float(image.info.get(PNG_RATE, DEFAULT_FPS))
            frames.append(np.asarray(image.convert("RGB")))
        if frames[-1].shape != frames[0].shape:
            sizes = ["{1}x{0}".format(*frame.shape) for frame in (frames[0], frames[-1])]
            raise ValueError(
                f"{paths[0].name} is {sizes[0]} and {path.name} {sizes[1]} pixels in {folder}; "
                "the frames of a clip have one size"
            )
    return np.stack(frames), fps


def png_files(folder: Path) -> list[Path]:
    """The PNG files of a folder, 2.png before 10.png; ValueError where there are none."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() == ".png"]
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise ValueError(f"{folder} holds no .png file; give a folder of frames")

    def by_number(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]

    return sorted(paths, key=by_number)


def read_comment(path: Path) -> str | bytes | None:
    """The text that a writer of this file put into an image, None where there is none."""
    with open_image(path) as image:
        if image.format == "WEBP":
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
            return comment.removeprefix(EXIF_ASCII) if isinstance(comment, bytes) else comment
        return image.info.get("comment" if image.format == "GIF" else PNG_COMMENT)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image opened; what Pillow raises over its contents, then and later, becomes a ValueError."""
    try:
        with Image.open(path) as image:
            yield image
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged, or no image that Pillow reads: {error}") from error
