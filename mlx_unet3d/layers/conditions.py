"""Conditions: the second argument of every layer, shared by all layers of a forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .chunking import NO_CHUNKS, Chunks, in_sequence, ranges
from .free_noise import FreeNoise
from .freeu import FreeU
from .text_context import TextContext


@dataclass(frozen=True)
class Conditions:
    """The inputs that all layers of a forward share. Letters as in `resnet`: B batch, F frames, N = B*F.

    Attributes:
        batch, num_frames: B and F.
        temb: time embedding (B, T); None where layers have no time projection.
        context: states for cross-attention, (B, L, D), or (N, L, D) with a row a frame; an array or
            TextContext.
        context_mask: added to the scores of cross-attention, (B, 1, L) or (N, 1, L).
        pixel_mask: added to the scores of spatial self-attention, (N, 1, H*W).
        image_only: (B, F), nonzero for frames that are single images, see `AlphaBlender`; None for videos
            only.
        cross_attention_kwargs: keywords for the attention processors.
        freeu: factors of FreeU; None for none.
        free_noise: windows of FreeNoise, for motion modules; None for all frames at once.
        chunks: the sizes of chunks, see `chunking`.
    """

    batch: int = 1
    num_frames: int = 1
    temb: mx.array | None = None
    context: mx.array | TextContext | None = None
    context_mask: mx.array | None = None
    pixel_mask: mx.array | None = None
    image_only: mx.array | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    freeu: FreeU | None = None
    free_noise: FreeNoise | None = None
    chunks: Chunks = NO_CHUNKS

    @property
    def context_states(self) -> mx.array | None:
        """The states of `context` as an array."""
        return self.context.states if isinstance(self.context, TextContext) else self.context

    def of_frames(self, start: int, stop: int) -> "Conditions":
        """Return the conditions of frames `start` to `stop` of all N, which must belong to one sample."""

        def rows(x: mx.array | None) -> slice:
            per_row = self.batch * self.num_frames // x.shape[0]
            return slice(start // per_row, -(-stop // per_row))

        def part(x: mx.array | None) -> mx.array | None:
            return None if x is None else x[rows(x)]

        context = self.context
        if isinstance(context, TextContext):
            context = context.rows(rows)
        return replace(
            self,
            batch=1,
            num_frames=stop - start,
            temb=part(self.temb),
            context=part(context) if isinstance(context, mx.array) else context,
            context_mask=part(self.context_mask),
            pixel_mask=part(self.pixel_mask),
            image_only=None,
            chunks=NO_CHUNKS,
        )


def by_frames(fn: Callable[..., mx.array], states: Sequence[mx.array], cond: Conditions) -> mx.array:
    """Return `fn(*states, cond)`, computed for `cond.chunks.frames` frames of a sample at a time; states are
    (N, ...)."""
    if cond.chunks.frames is None:
        return fn(*states, cond)
    if isinstance(cond.context, mx.array):  # or each chunk would project keys and values again
        cond = replace(cond, context=TextContext(cond.context))
    frames = [
        slice(i * cond.num_frames + r.start, i * cond.num_frames + r.stop)
        for i in range(states[0].shape[0] // cond.num_frames)
        for r in ranges(cond.num_frames, cond.chunks.frames)
    ]
    chunks = ([x[r] for x in states] for r in frames)
    conditions = [cond.of_frames(r.start, r.stop) for r in frames]
    return mx.concatenate(in_sequence(fn, chunks, conditions=conditions))
