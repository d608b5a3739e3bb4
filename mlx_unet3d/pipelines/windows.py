"""Context windows: a network sees some frames of a clip at a time, and predictions are averaged.

Memory is then that of a window however long the clip is, and positions of frames count from 0 in each. Other
than with FreeNoise, the network runs once a window. Sources: ComfyUI-AnimateDiff-Evolved, for schedules and
weights; MultiDiffusion (arXiv:2302.08113), for the average.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..layers.free_noise import window_starts, window_weights
from ..scalars import as_count
from .predict import Predict

SCHEDULES = ("static_standard", "standard_uniform", "looped_uniform")
FUSES = ("pyramid", "flat", "overlap-linear")

Frames = tuple[int, ...]
"""The frames of a window, in the order in which the network sees them."""


@dataclass(frozen=True)
class ContextWindows:
    """The windows in which a network sees a clip. A clip of at most `length` frames is seen at once.

    Attributes:
        length: frames of a window, c; what the network was trained on suits best, 16 for AnimateDiff.
        overlap: frames that neighbours share, 0 to c - 1.
        stride: 1 for windows of neighbouring frames alone; with 2 also those of every second frame, with 3 of
            every fourth, and so on, as far as the clip is long enough. Not for "static_standard".
        schedule: "static_standard", the same windows in all steps; "standard_uniform", windows that move from
            step to step, but not over the end of the clip; "looped_uniform", which go on at its beginning.
        fuse: weights of the frames of a window in the average: "pyramid", most in the middle; "flat";
            "overlap-linear", a linear fade over `overlap` frames at each end, but not at those of the clip.
        closed_loop: make the last frame lead to the first; only for "looped_uniform".

    Raises ValueError for other values.
    """

    length: int = 16
    overlap: int = 4
    stride: int = 1
    schedule: str = "standard_uniform"
    fuse: str = "pyramid"
    closed_loop: bool = False

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("overlap", 0), ("stride", 1)):
            object.__setattr__(self, name, as_count(name, getattr(self, name), least))
        if self.overlap >= self.length:
            raise ValueError(
                f"overlap={self.overlap} leaves windows of length={self.length} no frame of their own; use "
                f"an overlap of at most {self.length - 1}"
            )
        for name, known in (("schedule", SCHEDULES), ("fuse", FUSES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, known))}"
                )
        if self.closed_loop and self.schedule != "looped_uniform":
            raise ValueError(f"closed_loop needs schedule='looped_uniform', not {self.schedule!r}")
        if self.stride > 1 and self.schedule == "static_standard":
            raise ValueError(
                f"stride={self.stride} means nothing to schedule='static_standard'; leave it 1, or use "
                "another schedule"
            )

    def windows(self, frames: int, step: int) -> list[Frames]:
        """Return the windows of a clip of so many frames in a step of the run; all frames are in some."""
        if frames <= self.length:
            return [tuple(range(frames))]
        if self.schedule == "static_standard":
            starts = window_starts(frames, self.length, self.length - self.overlap)
            return [tuple(range(start, start + self.length)) for start in starts]
        windows = self._uniform(frames, step)
        if self.schedule == "standard_uniform":
            windows = self._unrolled(windows, frames)
        return list(dict.fromkeys(windows))

    def _uniform(self, frames: int, step: int) -> Iterator[Frames]:
        """Yield windows that begin elsewhere in each step, and go on at the beginning of the clip."""
        part = halved(step)
        offset = round(frames * part)
        for spacing in (2**i for i in range(self.stride)):
            if (self.length - 1) * spacing >= frames:  # it would meet itself
                break
            first = int(part * spacing) + offset
            stop = frames + offset - (0 if self.closed_loop else self.overlap)
            for start in range(first, stop, self.length * spacing - self.overlap):
                yield tuple(frame % frames for frame in range(start, start + self.length * spacing, spacing))

    def _unrolled(self, windows: Iterator[Frames], frames: int) -> Iterator[Frames]:
        """Yield two windows for each that goes on at the beginning: one from there, and one to the end."""
        for window in windows:
            if window[0] <= window[-1]:
                yield window
                continue
            spacing = (window[1] - window[0]) % frames
            last = frames - 1 - (self.length - 1) * spacing  # where the last window begins
            first = next(after for before, after in pairwise(window) if after < before)
            for start in (min(first, last), last):
                yield tuple(range(start, start + self.length * spacing, spacing))

    def shares(self, windows: list[Frames], frames: int) -> list[np.ndarray]:
        """Return how much of each frame of each window counts, (c,): 1 in sum for a frame of the clip."""
        weights = [self._weights(window, frames) for window in windows]
        sums = np.zeros(frames)
        for window, row in zip(windows, weights, strict=True):
            sums[list(window)] += row
        return [row / sums[list(window)] for window, row in zip(windows, weights, strict=True)]

    def _weights(self, window: Frames, frames: int) -> np.ndarray:
        if self.fuse != "overlap-linear":
            return window_weights(self.fuse, len(window))
        places, weights = np.arange(1, len(window) + 1), np.ones(len(window))
        if self.closed_loop or window[0] != 0:
            weights = np.minimum(weights, places / (self.overlap + 1))
        if self.closed_loop or window[-1] != frames - 1:
            weights = np.minimum(weights, places[::-1] / (self.overlap + 1))
        return weights


def halved(step: int) -> float:
    """Return the bits of a step behind the point in reverse: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{step:064b}"[::-1], 2) / 2**64


class Windowed:
    """`Predict` in context windows: that of each window, averaged.

    Windows run one after the other, so that memory is that of one, beside clips of latents.

    Args:
        predict: of the network; is given the frames of each window.
        context: the windows.
        axis: of the frames in samples.
    """

    def __init__(self, predict: Predict, context: ContextWindows, axis: int = 2):
        self.predict, self.context, self.axis = predict, context, axis
        self.dtype = predict.dtype

    def __call__(
        self, sample: mx.array, timestep: float, step: int, frames: mx.array | None = None
    ) -> mx.array:
        count = sample.shape[self.axis]
        windows = self.context.windows(count, step)
        if len(windows) == 1:
            return self.predict(sample, timestep, step, frames)
        total, before = None, (slice(None),) * self.axis
        for window, share in zip(windows, self.context.shares(windows, count), strict=True):
            chosen = mx.array(window)
            part = self.predict(mx.take(sample, chosen, self.axis), timestep, step, chosen)
            share = mx.array(share.astype(np.float32)).reshape(-1, *(1,) * (part.ndim - self.axis - 1))
            if total is None:
                shape = (*part.shape[: self.axis], count, *part.shape[self.axis + 1 :])
                total = mx.zeros(shape)
            total = total.at[(*before, chosen)].add(part * share)
            mx.eval(total)
        return total

    def resumes_at(self, step: int) -> int:
        return self.predict.resumes_at(step)


def in_windows(predict: Predict, context: ContextWindows | None, axis: int) -> Predict:
    """Return `predict` in context windows, where there are some."""
    return predict if context is None else Windowed(predict, context, axis)
