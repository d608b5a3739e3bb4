"""The options that all video UNets share: compilation, FreeU, convolutions and chunking."""

import dataclasses
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..compilation import CompiledForward
from ..layers.adapted import walk
from ..layers.chunking import NO_CHUNKS, Chunks
from ..layers.convolution import set_convolution
from ..layers.freeu import FreeU
from ..layers.text_context import TextContext
from ..layers.transformers import BasicTransformerBlock
from ..scalars import as_count

Context = mx.array | TextContext
"""Text or image states (B, L, D), or a `TextContext` that also holds their keys and values."""


class UNetOptions(nn.Module):
    """A mixin for a network with `_forward(sample, context, ...)`, which passes `freeu` and `chunks` to its
    layers."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.freeu: FreeU | None = None
        self.chunks: Chunks = NO_CHUNKS
        self._compiled: CompiledUNet | None = None

    def compile(self) -> None:
        """Run forwards compiled by `mx.compile`, which fuses all chains of element-wise operations.

        The built-in layers are fused either way, so this only helps with adapters beside the weights, FreeU
        or custom processors. The first call with a new shape or dtype traces the network. Changes of weights,
        adapters, quantization, processors and options take effect. Custom processors must neither evaluate
        arrays nor keep them. Results equal those of the plain forward up to rounding.
        """
        self._compiled = CompiledUNet(self)

    def uncompile(self) -> None:
        """Undo `compile`."""
        self._compiled = None

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Enable FreeU (arXiv:2309.11497) in the two coarsest up blocks: `s1`, `s2` scale low frequencies of
        the skips, `b1`, `b2` half of the backbone channels. For video: 0.9, 0.2, 1.2, 1.4. A zero among them
        disables FreeU, as in diffusers."""
        factors = (s1, s2, b1, b2)
        if not all(np.isfinite(f) for f in factors):
            raise ValueError(f"FreeU factors (s1, s2, b1, b2)={factors} must be finite numbers")
        self.freeu = FreeU(*map(float, factors)) if all(factors) else None

    def disable_freeu(self) -> None:
        """Disable FreeU."""
        self.freeu = None

    def set_convolution(self, mode: str) -> None:
        """Set "fast" or "precise" 3x3 convolutions on a Mac's GPU.

        "precise" computes direct sums, accumulated in float32, where MLX would use Winograd's algorithm,
        whose rounding error is 0.7 % a layer in float16 and 6 % in bfloat16. "auto", the default, is precise
        in bfloat16 and fast in other dtypes. The modes do not differ on other devices. Raises ValueError for
        other modes.
        """
        set_convolution(self.modules(), mode)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Run feed-forwards a chunk at a time to save memory; the result stays the same.

        Args:
            chunk_size: size of a chunk, 1 for None or 0; must divide the axis in every block, or the
                forward raises a ValueError.
            dim: 0 cuts the batch axis (B*F for spatial, B*H*W for temporal transformers), 1 the tokens
                (H*W and F).
        """
        if dim not in (0, 1):
            raise ValueError(f"Make sure to set `dim` to either 0 or 1, not {dim}")
        self._set_chunking(as_count("chunk_size", chunk_size or 1, also=", or None"), dim)

    def disable_forward_chunking(self) -> None:
        """Undo `enable_forward_chunking`."""
        self._set_chunking(None, 0)

    def _set_chunking(self, size: int | None, dim: int) -> None:
        for _, module in walk(self):
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(size, dim)

    def enable_frame_chunking(self, frames: int = 1) -> None:
        """Run spatial layers (resnets, resampling, spatial transformers) on `frames` frames at a time to save
        memory; the result stays the same.

        Raises ValueError for less than 1.
        """
        self.chunks = dataclasses.replace(self.chunks, frames=frames)

    def disable_frame_chunking(self) -> None:
        """Undo `enable_frame_chunking`."""
        self.chunks = dataclasses.replace(self.chunks, frames=None)

    def enable_pixel_chunking(self, pixels: int = 64) -> None:
        """Run temporal layers on `pixels` pixels of all frames at a time to save memory.

        The result stays the same up to rounding: group norms still take their statistics over all pixels.
        Raises ValueError for less than 1.
        """
        self.chunks = dataclasses.replace(self.chunks, pixels=pixels)

    def disable_pixel_chunking(self) -> None:
        """Undo `enable_pixel_chunking`."""
        self.chunks = dataclasses.replace(self.chunks, pixels=None)

    def check_cache_depth(self, depth: int) -> None:
        """Raise ValueError for a `FeatureCache.depth` that leaves no layer of this network to save."""
        most = sum(len(block.resnets) for block in self.up_blocks) - 1
        if as_count("depth", depth) > most:
            raise ValueError(
                f"the depth of a feature cache is {depth!r}; it must be an integer from 1 to {most}, which "
                f"leaves at least one of the {most + 1} layers on the way up to save"
            )


class CompiledUNet(CompiledForward):
    """The compiled `_forward` of a network. Keys and values of a `TextContext` are inputs of the trace."""

    def __init__(self, unet: UNetOptions):
        super().__init__(unet)
        self._unet = unet
        self._projected: WeakSet[TextContext] = WeakSet()

    def __call__(self, sample: mx.array, context: Context | None, *others: Any) -> tuple[mx.array, ...]:
        if not isinstance(context, TextContext):
            return super().__call__(sample, context, *others)
        with self._lock:
            if context not in self._projected:
                # Building the graph computes nothing, but makes the context project all keys and values.
                self._unet._forward(sample, context, *others[:-1])  # without features: all layers run
                mx.eval(context.take_apart())
                self._projected.add(context)
        return super().__call__(sample, context.take_apart(), *others)

    def forward(self, sample: mx.array, context: Any, *others: Any) -> tuple[mx.array, ...]:
        if isinstance(context, tuple):
            context = TextContext.put_together(*context)
        return self._unet._forward(sample, context, *others)
