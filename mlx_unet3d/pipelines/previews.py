"""Previews of a run: a linear map from latents to colours, fitted once to a VAE and kept in a cache."""

import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from ..atomic import write_text
from ..models.autoencoder_kl import AutoencoderKL
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from .decoding import decode_latents

VAE = AutoencoderKL | AutoencoderKLTemporalDecoder

_PICTURES, _SIDE = 32, 64  # of the fit: 2048 latents where a latent stands for 8x8 pixels
_RIDGE = 1e-4
_CHUNK = 8
_POOR, _SMALL = 0.7, 10_000_000
"""Error of a map from which on VAEs of fewer parameters than this are run themselves."""


class Previews:
    """Small frames of latents for eyes: by `latent_colours`, in milliseconds.

    A small VAE whose colours no linear map gives, such as the demo's, decodes them itself.

    Args:
        vae: of a pipeline.
        frames_axis: of the pipeline.
        cache: as `latent_colours`.
    """

    def __init__(self, vae: VAE, frames_axis: int = 2, cache: bool = True):
        self.colours = latent_colours(vae, cache)
        self.frames_axis = frames_axis
        size = sum(array.size for _, array in tree_flatten(vae.parameters()))
        self._vae = vae if self.colours.error > _POOR and size < _SMALL else None

    def __call__(self, latents: mx.array, frame: int | None = None) -> np.ndarray:
        """Return uint8 frames (F, h, w, 3) of the first clip of latents, see `LatentColours`.

        Args:
            latents: such as `record.denoised`.
            frame: one to return alone, 0 to F - 1.

        Raises NonFiniteError where a VAE that decodes itself overflows.
        """
        axis = self.frames_axis
        if frame is not None:
            latents = mx.take(latents, mx.array([frame]), axis)
        if self._vae is None:
            return self.colours(latents[:1], axis)[0]
        clip = latents[:1] if axis == 2 else latents[:1].transpose(0, 2, 1, 3, 4)
        return np.rint(decode_latents(self._vae, clip)[0] * 255).astype(np.uint8)


@dataclass(frozen=True)
class LatentColours:
    """A linear map from the channels of a latent to its mean colour.

    Attributes:
        weights: C rows of red, green and blue, for latents as of a `DenoisingStep`.
        bias: red, green and blue of latents of zeros; 0 to 1.
        error: root mean square error on pictures that the fit did not see, as a share of how much the colours
            of a picture differ: 0 is exact, at 1 the mean colour alone would do as well.
    """

    weights: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    error: float

    def __call__(self, latents: mx.array, frames_axis: int = 2) -> np.ndarray:
        """Map latents to small frames, a pixel a latent.

        Args:
            latents: (B, C, F, h, w), such as `record.denoised`; (B, F, C, h, w) with a `frames_axis` of 1.
            frames_axis: `pipe.frames_axis`.

        Returns uint8 (B, F, h, w, 3). Raises ValueError for other channels than the VAE's.
        """
        x = np.array(mx.array(latents).astype(mx.float32))
        if x.ndim != 5 or frames_axis not in (1, 2) or x.shape[3 - frames_axis] != len(self.weights):
            raise ValueError(
                f"latents have the shape {x.shape}; give (B, C, F, h, w), or (B, F, C, h, w) with "
                f"frames_axis=1, of C = {len(self.weights)} channels"
            )
        x = np.moveaxis(x, 3 - frames_axis, -1)  # (B, F, h, w, C)
        colours = x @ np.float32(self.weights) + np.float32(self.bias)
        return np.rint(np.nan_to_num(colours).clip(0, 1) * np.float32(255)).astype(np.uint8)


def latent_colours(vae: VAE, cache: bool = True) -> LatentColours:
    """Return the map of a VAE, from the user's cache or by `fit_colours`.

    Args:
        vae: of a pipeline.
        cache: keep the map in `cache_folder()` under a checksum of config and weights. A damaged file is made
            anew; where nothing can be written, nothing is kept.
    """
    if not cache:
        return fit_colours(vae)
    path = cache_folder() / f"{_checksum(vae)}.json"
    found = _read(path, vae.config.latent_channels)
    if found is None:
        found = fit_colours(vae)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(found)))
    return found


def cache_folder() -> Path:
    """Return mlx-unet3d/previews in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-unet3d" / "previews"


def fit_colours(vae: VAE) -> LatentColours:
    """Fit a map by least squares to synthetic pictures, encoded and decoded again by the VAE.

    Latents of an encoder lie where those of a run do, which random ones do not; and the decoder says what
    they look like. Every fourth picture is left out of the fit, to measure the error.
    """
    pictures = mx.array(_pictures(_PICTURES, _SIDE)).transpose(0, 3, 1, 2)  # (N, 3, H, W) in [-1, 1]
    latents, colours = [], []
    for start in range(0, _PICTURES, _CHUNK):
        z = vae.encode(pictures[start : start + _CHUNK].astype(vae.dtype)).mode()
        decoded = vae.decode(z, 1) if isinstance(vae, AutoencoderKLTemporalDecoder) else vae.decode(z)
        n, channels, height, width = z.shape
        image = mx.clip(decoded.astype(mx.float32) / 2 + 0.5, 0, 1)
        image = image.reshape(n, 3, height, image.shape[2] // height, width, image.shape[3] // width)
        latents.append(np.array(vae.scale_latents(z).astype(mx.float32)).reshape(n, channels, -1))
        colours.append(np.array(image.mean((3, 5))).reshape(n, 3, -1))
    x = np.concatenate(latents).transpose(0, 2, 1).astype(np.float64)  # (N, h*w, C)
    y = np.concatenate(colours).transpose(0, 2, 1).astype(np.float64)  # (N, h*w, 3)
    x, y = np.nan_to_num(x, posinf=0, neginf=0), np.nan_to_num(y)
    x = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=-1)
    unseen = np.arange(len(x)) % 4 == 3
    rows, wanted = x[~unseen].reshape(-1, x.shape[-1]), y[~unseen].reshape(-1, 3)
    normal = rows.T @ rows
    # Channels without an effect, as of an untrained VAE, get no weight.
    normal[np.diag_indices(len(normal) - 1)] += _RIDGE * np.trace(normal) / len(normal) + 1e-12
    found = np.linalg.solve(normal, rows.T @ wanted)
    left = ((x[unseen] @ found).clip(0, 1) - y[unseen]) ** 2
    spread = y[unseen].var(axis=1).mean()
    error = math.sqrt(left.mean() / spread) if spread > 0 else 1.0
    weights = tuple(tuple(float(f"{value:.6g}") for value in row) for row in found)
    return LatentColours(weights[:-1], weights[-1], round(min(error, 1e6), 4))


def _pictures(count: int, side: int) -> np.ndarray:
    """Pictures (N, H, W, 3) in [-1, 1], always the same: smooth colours, and plain ones with a shape."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    pictures = np.empty((count, side, side, 3), np.float32)
    for i, picture in enumerate(pictures):
        if i % 2:
            coarse = rng.normal(0, 0.6, (4, 4, 3)).astype(np.float32)
            for c in range(3):
                picture[..., c] = Image.fromarray(coarse[..., c]).resize((side, side), Image.BICUBIC)
            continue
        picture[:] = rng.uniform(-1, 1, 3 if i % 4 else 1)
        middle, radius = rng.uniform(0, side, 2), rng.uniform(0.1, 0.4) * side
        away = np.stack([x - middle[0], y - middle[1]])
        inside = np.hypot(*away) < radius if i % 8 < 4 else abs(away).max(0) < radius
        picture[inside] = rng.uniform(-1, 1, 3)
    return pictures.clip(-1, 1)


def _checksum(vae: VAE) -> str:
    rules = [_PICTURES, _SIDE, _RIDGE, vae.config.to_dict()]
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode())
    for name, array in sorted(tree_flatten(vae.parameters())):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.dtype == mx.bfloat16:  # NumPy has none
            array = array.view(mx.uint16)
        digest.update(memoryview(np.ascontiguousarray(np.array(array))).cast("B"))
    return digest.hexdigest()[:32]


def _read(path: Path, channels: int) -> LatentColours | None:
    """The map in a file of the cache; None for none, or a damaged one."""
    try:
        if path.stat().st_size > 2**20:
            return None
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        weights = np.array(found["weights"], np.float64)
        bias = np.array(found["bias"], np.float64)
        error = float(found["error"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    if weights.shape != (channels, 3) or bias.shape != (3,):
        return None
    if not (np.isfinite(weights).all() and np.isfinite(bias).all() and math.isfinite(error)):
        return None
    return LatentColours(tuple(map(tuple, weights.tolist())), tuple(bias.tolist()), error)
