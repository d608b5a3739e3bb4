"""Run layers a chunk at a time, so that a forward holds the memory of one chunk; the result stays the same.

This saves memory only if each chunk frees its memory before the next one begins. MLX evaluates a graph
breadth-first, which would run the chunks side by side. So each chunk is evaluated or, within `mx.compile`,
where arrays have no values, depends on the previous one. Shapes as in `resnet`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..scalars import as_count


@dataclass(frozen=True)
class Chunks:
    """The sizes of chunks in a forward of a video UNet; None for no chunks.

    Attributes:
        frames: frames of a sample at a time in spatial layers (resnets, resampling, spatial transformers).
        pixels: pixels of all frames at a time in temporal layers.
    """

    frames: int | None = None
    pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "pixels"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_count(name, value, also=", or None"))


NO_CHUNKS = Chunks()

_sketching = ContextVar("sketching", default=False)


def evaluate(*arrays: mx.array) -> bool:
    """Evaluate `arrays`. Return False within `mx.compile` and similar transforms, where arrays have no
    values."""
    try:
        mx.eval(*arrays)
    except ValueError:  # raised by MLX for tracers
        return False
    return True


@contextmanager
def sketched() -> Iterator[None]:
    """Within the block, `in_sequence` runs the first chunk and the last two, and puts arrays of the same size
    in place of the results between. This suffices to predict memory."""
    token = _sketching.set(True)
    try:
        yield
    finally:
        _sketching.reset(token)


def in_sequence(
    fn: Callable[..., mx.array],
    chunks: Iterable[Sequence[mx.array]],
    every: int | None = 1,
    conditions: Sequence[Any] | None = None,
) -> list[mx.array]:
    """Return `fn` of each chunk, computed one after the other; a chunk is a sequence of arrays.

    Args:
        every: evaluate after this number of chunks; None leaves evaluation to the caller, still in order.
        conditions: another argument of `fn` for each chunk; None for none.
    """
    done: list[mx.array] = []
    if _sketching.get():
        chunks = list(chunks)
    like: dict[tuple[int, ...], mx.array] = {}  # the last result by the shape of its chunk
    for k, chunk in enumerate(chunks):
        shape = tuple(chunk[0].shape)
        if _sketching.get() and shape in like and len(done) < len(chunks) - 2:
            like[shape], _ = mx.depends([-like[shape], chunk[0]], [done[-1]])
            done.append(like[shape])
            continue
        if done:
            chunk = mx.depends(list(chunk), [done[-1]])
        done.append(fn(*chunk) if conditions is None else fn(*chunk, conditions[k]))
        like[shape] = done[-1]
        if every is not None and len(done) % every == 0:
            evaluate(done[-1])
    return done


def ranges(length: int, size: int) -> Iterator[slice]:
    """Return slices of at most `size` that cover `length`."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def by_pixels(fn: Callable[..., mx.array], states: Sequence[mx.array], pixels: int | None) -> mx.array:
    """Apply `fn` to chunks of `pixels` pixels of the `states`, each (B, F, L, C); None for all at once."""
    if pixels is None:
        return fn(*states)
    chunks = ([x[:, :, r] for x in states] for r in ranges(states[0].shape[2], pixels))
    return mx.concatenate(in_sequence(fn, chunks), axis=2)


def group_norm_of_parts(norm: nn.GroupNorm, x: mx.array) -> Callable[[mx.array], mx.array]:
    """Return a function that normalizes part of `x` (B, F, L, C) with the statistics of all of `x`.

    Two passes over the frames compute the statistics over all frames and pixels of a group, in fp32.
    """
    batch, frames, pixels, channels = x.shape
    count = frames * pixels * channels // norm.num_groups

    def group_means(of_frame: Callable[[mx.array], mx.array]) -> mx.array:
        """-> (B, 1, 1, C), equal within a group."""
        sums = in_sequence(
            lambda frame: of_frame(frame.astype(mx.float32)).sum(axis=(1, 2)),
            ([x[:, i : i + 1]] for i in range(frames)),
        )
        means = mx.stack(sums).sum(axis=0).reshape(batch, norm.num_groups, -1).sum(axis=-1) / count
        return mx.repeat(means, channels // norm.num_groups, axis=1)[:, None, None, :]

    mean = group_means(lambda frame: frame)
    scale = mx.rsqrt(group_means(lambda frame: mx.square(frame - mean)) + norm.eps) * norm.weight
    evaluate(mean, scale)
    return lambda part: ((part.astype(mx.float32) - mean) * scale + norm.bias).astype(x.dtype)
