"""FreeNoise (arXiv:2310.15169): motion modules attend within windows of a long clip, whose results are
averaged.

A clip may then have more frames than a motion module has positions: within a window they count from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..scalars import as_count
from .chunking import in_sequence

WEIGHTING_SCHEMES = ("flat", "pyramid", "delayed_reverse_sawtooth")


@dataclass(frozen=True)
class FreeNoise:
    """The windows of FreeNoise; names of diffusers.

    Attributes:
        context_length: frames of a window, c.
        context_stride: frames from the start of a window to that of the next, 1 to c.
        weighting_scheme: weights of the frames of a window in the average: "flat", all equal; "pyramid", most
            in the middle; "delayed_reverse_sawtooth", hardly any before the middle, then falling.

    Raises ValueError for other values.
    """

    context_length: int = 16
    context_stride: int = 4
    weighting_scheme: str = "pyramid"

    def __post_init__(self) -> None:
        length = as_count("context_length", self.context_length)
        stride = as_count("context_stride", self.context_stride)
        if stride > length:
            raise ValueError(
                f"context_stride={stride} exceeds context_length={length}: frames between windows would be "
                f"in none; use a stride of at most {length}"
            )
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            schemes = ", ".join(map(repr, WEIGHTING_SCHEMES))
            raise ValueError(f"weighting_scheme={self.weighting_scheme!r} must be one of {schemes}")
        object.__setattr__(self, "context_length", length)
        object.__setattr__(self, "context_stride", stride)

    def average(self, fn: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """`fn` of each window of x (N, F, K), averaged by the weights, which are summed in fp32.

        Windows run one after the other: beside its input and result, this takes the memory of one. Where the
        windows do not end with the clip, one more does. Of it count the frames that no other window has, and
        these as they are; diffusers scales all of them but the first of such frames down, unless weights are
        flat.
        """
        frames = x.shape[1]
        starts = window_starts(frames, self.context_length, self.context_stride)
        if len(starts) == 1:
            return fn(x)
        shares = mx.array(self.shares(frames))[..., None]  # (windows, c, 1)
        rest = None  # frames of the last window to which the next ones add

        def run(window: mx.array, k: int) -> mx.array:
            """The frames that no later window has."""
            nonlocal rest
            y = fn(window).astype(mx.float32) * shares[k]
            if rest is not None and rest.shape[1]:
                y = mx.concatenate([y[:, : rest.shape[1]] + rest, y[:, rest.shape[1] :]], axis=1)
            done = (frames if k + 1 == len(starts) else starts[k + 1]) - starts[k]
            rest = y[:, done:]
            return y[:, :done].astype(x.dtype)

        windows = ([x[:, start : start + self.context_length]] for start in starts)
        return mx.concatenate(in_sequence(run, windows, conditions=range(len(starts))), axis=1)

    def shares(self, frames: int) -> np.ndarray:
        """How much of each frame of each window counts, (windows, c): 1 in sum for a frame of the clip."""
        length, stride = self.context_length, self.context_stride
        starts = window_starts(frames, length, stride)
        weights = np.tile(window_weights(self.weighting_scheme, length), (len(starts), 1))
        if len(starts) > 1 and starts[-1] - starts[-2] < stride:
            weights[-1, : starts[-2] + length - starts[-1]] = 0
        sums = np.zeros(frames)
        for start, row in zip(starts, weights, strict=True):
            sums[start : start + length] += row
        for start, row in zip(starts, weights, strict=True):
            row /= sums[start : start + length]
        return weights.astype(np.float32)


def window_starts(frames: int, length: int, stride: int) -> list[int]:
    """First frames of windows of `length`, each `stride` behind the last; one more ends with the clip where
    these do not."""
    if frames <= length:
        return [0]
    starts = list(range(0, frames - length + 1, stride))
    return starts if starts[-1] + length == frames else [*starts, frames - length]


def window_weights(scheme: str, length: int) -> np.ndarray:
    """Weights (length,) of the frames of a window by one of `WEIGHTING_SCHEMES`, such as 1, 2, 2, 1."""
    if scheme == "flat":
        return np.ones(length)
    falling = np.arange((length + 1) // 2, 0, -1.0)
    if scheme == "pyramid":
        return np.concatenate([falling[::-1][: length // 2], falling])
    rising = np.full(length // 2, 0.01)
    if length % 2 == 0:
        rising[-1] = length // 2
    return np.concatenate([rising, falling])
