"""Frames of files, uint8 (F, H, W, 3), red green blue, and their durations."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import NonFiniteError

Frames = NDArray[np.uint8]

# The rate of ModelScope's clips, also used for files without a rate.
DEFAULT_FPS = 8.0
MIN_FPS, MAX_FPS = 0.1, 240.0
# A few bytes of a file can encode any number of pixels; clips for a network are far below these bounds.
MAX_PIXELS = 2**25  # of a frame: 8K video
MAX_BYTES = 2**29  # of the frames of a clip
MAX_FRAMES = 10_000
MAX_SCALE = 64

Size = tuple[int | None, int | None]
"""Height and width to which frames are resized, each None for no change."""


class RefusedClipError(ValueError):
    """A clip that exceeds a limit of this package, not of its format."""


def to_uint8(frames: NDArray[np.floating] | mx.array) -> Frames:
    """Convert float frames in [0, 1], of any shape, to uint8: `round(255 * x)`, halves to even.

    Raises:
        TypeError: not a float array.
        NonFiniteError: a value is infinite or NaN.
        ValueError: a value is outside [0, 1] by more than half a level of 255.
    """
    if isinstance(frames, mx.array):
        if not mx.issubdtype(frames.dtype, mx.floating):
            raise TypeError(f"frames are {frames.dtype}; give floats in [0, 1]")
        frames = np.array(frames.astype(mx.float32))
    if not isinstance(frames, np.ndarray) or not np.issubdtype(frames.dtype, np.floating):
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise TypeError(f"frames are {kind}; give an array of floats in [0, 1]")
    frames = frames.astype(np.float32, copy=False)
    finite = np.isfinite(frames)
    if not finite.all():
        raise NonFiniteError(
            f"{finite.size - np.count_nonzero(finite)} of {finite.size} pixel values are infinite "
            "or NaN; decode in float32"
        )
    low, high = (float(frames.min()), float(frames.max())) if frames.size else (0.0, 0.0)
    if low < -0.5 / 255 or high > 1 + 0.5 / 255:
        raise ValueError(
            f"pixel values span [{low:.4g}, {high:.4g}]; the range is [0, 1]: from [-1, 1] take x / 2 + 0.5"
        )
    return np.rint(np.clip(frames, 0, 1) * np.float32(255)).astype(np.uint8)


def as_frames(frames: Frames | Sequence[Image.Image | Frames]) -> Frames:
    """Stack a list of images or of arrays (H, W, 3) to frames (F, H, W, 3); return anything else
    unchanged."""
    if not isinstance(frames, list | tuple) or not frames:
        return frames
    arrays = [np.asarray(f.convert("RGB")) if isinstance(f, Image.Image) else f for f in frames]
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return frames
    if len({(array.shape, array.dtype) for array in arrays}) > 1:
        raise ValueError("the frames differ in size or dtype; the frames of a clip have one of each")
    return np.stack(arrays)


def check_frames(frames: Frames) -> None:
    """Raise TypeError or ValueError unless frames are uint8 (F, H, W, 3) and not empty."""
    if not isinstance(frames, np.ndarray):
        raise TypeError(f"frames are a {type(frames).__name__}; give a uint8 NumPy array")
    if frames.dtype != np.uint8:
        raise TypeError(f"frames are {frames.dtype}; files hold uint8: use to_uint8(frames)")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames have the shape {frames.shape}; give (frames, height, width, 3)")


def check_fps(fps: float, highest: float = MAX_FPS) -> None:
    """Raise TypeError or ValueError unless `MIN_FPS <= fps <= highest`."""
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise TypeError(f"fps={fps!r} is a {type(fps).__name__}; give a number")
    if not (math.isfinite(fps) and MIN_FPS <= fps <= highest):
        raise ValueError(f"fps={fps} is out of range; use {MIN_FPS:g} <= fps <= {highest:g}")


def check_scale(scale: int, shape: Sequence[int] | None = None) -> None:
    """Raise TypeError or ValueError unless each pixel can become a square of `scale` pixels each way.

    Args:
        scale: 1 to 64.
        shape: (F, H, W, ...) of the frames; None where it is not known yet.
    """
    if isinstance(scale, bool) or not isinstance(scale, int):
        raise TypeError(f"scale={scale!r} is a {type(scale).__name__}; give an integer")
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"scale={scale} is out of range; use 1 <= scale <= {MAX_SCALE}")
    if shape is None or scale == 1:
        return
    count, height, width = shape[:3]
    most = math.isqrt(min(MAX_PIXELS // (height * width), MAX_BYTES // (3 * count * height * width)))
    if scale > most:
        raise ValueError(
            f"scale={scale} makes {count} frames of {width * scale}x{height * scale} pixels, too many to "
            f"read back; use scale <= {max(most, 1)}"
        )


def scaled(frames: Frames, scale: int) -> Frames:
    """Repeat each pixel of frames (F, H, W, 3) `scale` times each way; errors as `check_scale`."""
    check_scale(scale, frames.shape)
    return frames if scale == 1 else frames.repeat(scale, axis=1).repeat(scale, axis=2)


def durations(count: int, fps: float, unit: int) -> list[int]:
    """Return the durations of `count` frames in milliseconds, multiples of `unit` that never drift from the
    rate.

    Every frame ends at the multiple nearest to its true end: at 8 frames a second and a unit of 10, 130 and
    120 alternate.
    """
    period = 1000 / Fraction(fps) / unit
    ends = [math.floor(i * period + Fraction(1, 2)) for i in range(count + 1)]
    return [unit * (end - start) for start, end in itertools.pairwise(ends)]


def even_rate(times: Sequence[float], unit: int) -> tuple[list[int], float]:
    """Undo `durations`: return the number of repeats of each frame that gives an even rate, and that rate.

    Encoders merge equal adjacent frames into one longer frame, and other programs use any durations; a
    duration within one `unit` of the shortest counts as one period.
    """
    if all(time <= 0 for time in times):
        return [1] * len(times), DEFAULT_FPS
    known = [time if time > 0 else 100 for time in times]  # the duration that viewers use for 0
    shortest = min(known)
    single = [time for time in known if time <= shortest + unit]
    period = sum(single) / len(single)
    repeats = [max(1, round(time / period)) for time in known]
    return repeats, 1000 * sum(repeats) / sum(known)


class Reading:
    """Collects the frames of one clip as they are read: only the requested ones, resized, within the limits.

    Args:
        path: of the clip, for messages.
        num_frames: number of requested frames; None for all.
        size: height and width to which they are resized.
    """

    def __init__(self, path: Path, num_frames: int | None = None, size: Size = (None, None)):
        self.path, self.num_frames, self.size = path, num_frames, size
        self.frames: list[Frames] = []
        self.seen = 0

    def check_size(self, width: int, height: int) -> None:
        """Raise RefusedClipError for a frame that would take too much memory, before it is decoded."""
        if width * height > MAX_PIXELS or 0 in (width, height):
            raise RefusedClipError(
                f"{self.path} has a frame of {width}x{height} pixels; at most {MAX_PIXELS:,} pixels are read"
            )

    def enter(self, width: int, height: int) -> bool:
        """Return True if the next frame is requested; RefusedClipError as `check_size`, and for too many
        frames."""
        self.check_size(width, height)
        self.seen += 1
        if self.seen > MAX_FRAMES:
            raise RefusedClipError(f"{self.path} has more than {MAX_FRAMES} frames; cut it")
        return self.num_frames is None or len(self.frames) < self.num_frames

    def add(self, frame: Frames) -> None:
        """Store a frame (H, W, 3)."""
        height, width = (
            n if n is not None else own for n, own in zip(self.size, frame.shape[:2], strict=True)
        )
        if (height, width) != frame.shape[:2]:
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))
        self.frames.append(frame)
        self._check(len(self.frames))

    def clip(self, repeats: Sequence[int] | None = None) -> Frames:
        """Return the frames (F, H, W, 3), each repeated by its number in `repeats`."""
        shapes = {frame.shape for frame in self.frames}
        if len(shapes) > 1:
            sizes = ", ".join(sorted(f"{width}x{height}" for height, width, _ in shapes)[:4])
            raise RefusedClipError(
                f"{self.path} has frames of {sizes} pixels; the frames of a clip have one size"
            )
        if repeats is None:
            return np.stack(self.frames)
        order = itertools.chain.from_iterable(map(itertools.repeat, range(len(self.frames)), repeats))
        order = list(itertools.islice(order, self.num_frames or self._most() + 1))
        self._check(len(order))
        return np.stack([self.frames[i] for i in order])

    def _most(self) -> int:
        return min(MAX_BYTES // self.frames[0].nbytes, MAX_FRAMES)

    def _check(self, count: int) -> None:
        if count > self._most():
            height, width, _ = self.frames[0].shape
            raise RefusedClipError(
                f"{self.path} has more than {self._most()} frames of {width}x{height} pixels, which take "
                f"more than {MAX_BYTES / 1e9:.1f} GB; read fewer (--num-frames, num_frames=), or "
                "smaller ones (--height and --width, size=)"
            )
