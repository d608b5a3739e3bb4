"""Run layers a chunk at a time: a forward then holds the memory of a chunk, and its result stays the same.

A chunk saves only if its memory is freed before the next one begins. MLX evaluates a graph in order of
breadth, which would run the chunks side by side. So each is evaluated, or within `mx.compile`, where nothing
can be, made to wait for the one before. Shapes as in `resnet`.
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
    """The chunks in which a forward of a video UNet takes its layers; None for all at once.

    Attributes:
        frames: frames of a sample that spatial layers (resnets, resampling, spatial transformers) take at a
            time.
        pixels: pixels of all frames that temporal layers take at a time.
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
    """Evaluate `arrays`; False within `mx.compile` and the like, where arrays have no values yet."""
    try:
        mx.eval(*arrays)
    except ValueError:  # what MLX raises for tracers
        return False
    return True


@contextmanager
def sketched() -> Iterator[None]:
    """Within it, a sequence runs its first piece and its last two, and puts arrays of the same size for those
    between: for the prediction of memory, to which they add nothing else."""
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
    """`fn` of each of the chunks, one after the other; a chunk is one array or several.

    Args:
        every: evaluate after so many chunks; None leaves that to the caller, and keeps their order.
        conditions: a further argument of `fn` for each chunk; None for none.
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
    """Slices of at most `size` that cover `length`."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def by_pixels(fn: Callable[..., mx.array], states: Sequence[mx.array], pixels: int | None) -> mx.array:
    """`fn` of `pixels` of the pixels of `states`, each (B, F, L, C), at a time, joined; None for all."""
    if pixels is None:
        return fn(*states)
    pieces = ([x[:, :, r] for x in states] for r in ranges(states[0].shape[2], pixels))
    return mx.concatenate(in_sequence(fn, pieces), axis=2)


def group_norm_of_parts(norm: nn.GroupNorm, x: mx.array) -> Callable[[mx.array], mx.array]:
    """A function that normalizes any part of `x` (B, F, L, C) as `norm` does within all of it.

    The statistics, over all frames and pixels of a group, take two passes over the frames, in fp32.
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
