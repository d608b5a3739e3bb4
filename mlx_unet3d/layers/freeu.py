"""FreeU: weaken low frequencies of the skips, strengthen half of the backbone (arXiv:2309.11497)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class FreeU:
    """The factors of the first (1) and second (2) up block: `s` for skips, `b` for the backbone."""

    s1: float
    s2: float
    b1: float
    b2: float


@lru_cache(maxsize=32)
def _low_frequencies(height: int, width: int) -> np.ndarray:
    """Return cosines and sines of the frequencies {0, -1} x {0, -1}, (H*W, K), times 1 / sqrt(H*W)."""
    rows, columns = np.divmod(np.arange(height * width), width)
    # An axis of one pixel has the frequency 0 only.
    fys = (0, -1) if height > 1 else (0,)
    fxs = (0, -1) if width > 1 else (0,)
    basis = []
    for fy in fys:
        for fx in fxs:
            angle = 2 * math.pi * (fy * rows / height + fx * columns / width)
            basis += [np.cos(angle), np.sin(angle)]
    return (np.stack(basis, axis=1) / math.sqrt(height * width)).astype(np.float32)


def scale_low_frequencies(x: mx.array, scale: float) -> mx.array:
    """Multiply four low frequencies of each (H, W) map of x (N, H, W, C) by `scale`; same dtype.

    Equals the real part of diffusers' `fourier_filter(x, threshold=1, scale)`, without a Fourier
    transform: the band is {0, -1} x {0, -1}, so a projection on at most eight vectors is enough.
    """
    n, height, width, channels = x.shape
    basis = mx.array(_low_frequencies(height, width))  # (L, K)
    maps = x.reshape(n, height * width, channels).astype(mx.float32)  # (N, L, C)
    low = basis @ (basis.T @ maps)  # (N, L, C)
    return (maps + (scale - 1.0) * low).reshape(x.shape).astype(x.dtype)


def apply_freeu(freeu: FreeU, resolution_idx: int, hidden: mx.array, skip: mx.array):
    """Apply FreeU to the two inputs of a resnet of up block `resolution_idx`; both (N, H, W, C).

    Blocks after the second are unchanged, as in diffusers.
    """
    if resolution_idx > 1:
        return hidden, skip
    scale, gain = (freeu.s1, freeu.b1) if resolution_idx == 0 else (freeu.s2, freeu.b2)
    half = hidden.shape[-1] // 2
    gains = np.where(np.arange(hidden.shape[-1]) < half, gain, 1.0)
    hidden = hidden * mx.array(gains).astype(hidden.dtype)
    return hidden, scale_low_frequencies(skip, scale)
