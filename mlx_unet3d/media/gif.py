"""GIF: one palette for all frames, and dithering that does not flicker."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .frames import Frames, durations

MAX_FPS = 50.0  # viewers show frames shorter than 20 ms for 100 ms
UNIT = 10  # milliseconds

Palette = NDArray[np.uint8]
Indices = NDArray[np.uint8]

SAMPLED_PIXELS = 1 << 18
CANDIDATES = 4  # nearest palette colours of a colour, two of which are mixed


def write_gif(path: Path, frames: Frames, fps: float, comment: str | None, loop: int) -> None:
    """Write an animated GIF; `loop` 0 repeats forever, n shows the clip n times."""
    palette, indices = quantize(frames)
    images = []
    for index in indices:
        image = Image.fromarray(index)
        image.putpalette(palette.tobytes())
        images.append(image)
    options: dict[str, object] = {}
    if comment is not None:
        options["comment"] = comment.encode("ascii")
    if loop != 1:  # the file counts repeats after the first showing
        options["loop"] = max(0, loop - 1)
    images[0].save(
        path,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=durations(len(images), fps, UNIT),
        palette=palette.tobytes(),  # otherwise each frame has a copy
        optimize=False,  # would shrink the palettes of some frames
        **options,
    )


def quantize(frames: Frames) -> tuple[Palette, Indices]:
    """(F, H, W, 3) -> one palette (256, 3) and indices (F, H, W); exact up to 256 colours."""
    packed = frames.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, inverse = np.unique(packed, return_inverse=True)
    if len(colours) <= 256:
        exact = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
        return _padded(exact), inverse.reshape(packed.shape).astype(np.uint8)
    palette = _shared_palette(frames)
    return palette, _dither(frames, palette)


def _padded(colours: NDArray[np.integer]) -> Palette:
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    return palette


def _shared_palette(frames: Frames) -> Palette:
    """Return a palette by median cut, then k-means, of pixels sampled evenly from all frames."""
    pixels = frames.reshape(-1, 3)
    step = -(-len(pixels) // SAMPLED_PIXELS)
    # An odd step visits all columns of a clip whose width is a power of two.
    sample = Image.fromarray(pixels[:: step | 1][None])
    reduced = sample.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    return _padded(np.array(reduced.getpalette()).reshape(-1, 3)[:256])


def _dither(frames: Frames, palette: Palette) -> Indices:
    """Dither each pixel between the two palette colours whose mix is nearest to it, in a fixed pattern.

    Error diffusion would be slightly more exact in one frame, but flickers: it changes a quarter of the
    pixels of a static scene. Here, a pixel's index depends only on its own colour and position.
    """
    colours = palette.astype(np.float32)
    first, second = _pairs(frames, colours)
    height, width = frames.shape[1:3]
    tiles = (-(-height // 8), -(-width // 8))
    threshold = np.tile(_bayer(), tiles)[:height, :width]  # (H, W) in (0, 1)
    indices = np.empty(frames.shape[:3], np.uint8)
    for i, frame in enumerate(frames):
        cell = _cells(frame)
        one, other = first[cell], second[cell]
        base, way = colours[one], colours[other] - colours[one]  # (H, W, 3)
        share = ((frame - base) * way).sum(-1) / np.maximum((way * way).sum(-1), 1)
        indices[i] = np.where(share > threshold, other, one)
    return indices


def _cells(pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(..., 3) -> (...), the index of a colour cell, which spans 4 levels of each channel."""
    return (pixels >> 2).astype(np.uint32) @ np.array([1 << 12, 1 << 6, 1], np.uint32)


def _pairs(frames: Frames, colours: NDArray[np.float32]) -> tuple[Indices, Indices]:
    """Return, for each colour cell in use, the nearest palette colour and the one to mix it with."""
    used = np.zeros(1 << 18, bool)
    for frame in frames:
        used[_cells(frame)] = True
    cells = np.flatnonzero(used)
    first, second = np.zeros((2, used.size), np.uint8)
    for part in np.array_split(cells, -(-len(cells) // 4096)):
        middle = np.stack([part >> 12, part >> 6 & 63, part & 63], axis=1) * 4 + np.float32(1.5)
        distance = (colours**2).sum(1) - 2 * middle.astype(np.float32) @ colours.T  # (cells, 256)
        nearest = np.argpartition(distance, CANDIDATES, axis=1)[:, :CANDIDATES]
        order = np.argsort(np.take_along_axis(distance, nearest, 1), axis=1)
        nearest = np.take_along_axis(nearest, order, 1)
        base = colours[nearest[:, :1]]
        way, wanted = colours[nearest[:, 1:]] - base, middle[:, None] - base  # (cells, 3, 3)
        share = (way * wanted).sum(-1) / np.maximum((way * way).sum(-1), 1)
        error = ((wanted - np.clip(share, 0, 1)[..., None] * way) ** 2).sum(-1)
        partner = error.argmin(1)[:, None] + 1
        first[part] = nearest[:, 0]
        second[part] = np.take_along_axis(nearest, partner, 1)[:, 0]
    return first, second


def _bayer() -> NDArray[np.float32]:
    matrix = np.zeros((1, 1), np.float32)
    for _ in range(3):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return ((matrix + 0.5) / 64).astype(np.float32)
