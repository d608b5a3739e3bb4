"""Latents to frames, in chunks, and the forms that a call returns."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import NonFiniteError
from ..media.export import as_html
from ..models.autoencoder_kl import AutoencoderKL
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from ..models.outputs import ModelOutput
from .denoising import fold_frames
from .progress import progress_bar


@dataclass
class VideoOutput(ModelOutput):
    """Videos, which a notebook shows.

    Attributes:
        frames: by `output_type`: "np", float32 in [0, 1] (B, F, H, W, 3); "mlx", the same as mx.array; "pil",
            B lists of F images; "latent", latents as of a `DenoisingStep`, as mx.array.
        fps: frames a second, for showing them; None for latents, which are not shown. Not one of the values.
    """

    frames: Any
    fps: InitVar[float | None] = None

    def __post_init__(self, fps: float | None) -> None:
        self.fps = fps

    def _repr_html_(self) -> str | None:
        return None if self.fps is None else as_html(self.frames, self.fps)


def decode_latents(
    vae: AutoencoderKL | AutoencoderKLTemporalDecoder,
    latents: mx.array,
    *,
    decode_chunk_size: int | None = None,
    progress: bool = False,
    bar: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Decode latents (B, C, F, h, w) to frames (B, F, H, W, 3) in [0, 1], float32.

    Args:
        vae: a temporal decoder lets the frames of a chunk influence each other.
        latents: as denoised; they are unscaled here.
        decode_chunk_size: frames at a time, over the joined clips of a batch. None for all frames of a clip
            in a temporal decoder, as far as MLX can index them, and as many as the VAE takes well in another.
        progress: show a progress bar.
        bar: options of tqdm for it.

    Raises ValueError for other channels than the VAE's, NonFiniteError where the VAE overflows.
    """
    batch, channels, num_frames = latents.shape[:3]
    if channels != vae.config.latent_channels:
        raise ValueError(f"latents have {channels} channels, the vae takes {vae.config.latent_channels}")
    folded = vae.unscale_latents(fold_frames(latents))
    n = folded.shape[0]
    chunks = []
    with progress_bar(progress, bar, total=n, desc="decode", unit="frame") as shown:
        for start, images in _chunks(vae, folded, num_frames, decode_chunk_size):
            images = images.astype(mx.float32)
            # Before clipping, which would turn an infinity into plain black or white.
            if not math.isfinite(mx.abs(images).max().item()):
                raise NonFiniteError(
                    f"a frame from {start} on is not finite with the VAE in {vae.dtype}; decode in single "
                    "precision: --vae-dtype float32, or from_pretrained(..., vae_dtype=mx.float32)"
                )
            images = mx.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)  # (N, 3, H, W) -> (N, H, W, 3)
            chunks.append(np.array(images))
            shown.update(len(chunks[-1]))
    frames = np.concatenate(chunks)
    return frames.reshape(batch, n // batch, *frames.shape[1:])


def _chunks(
    vae: AutoencoderKL | AutoencoderKLTemporalDecoder, z: mx.array, num_frames: int, size: int | None
) -> Iterator[tuple[int, mx.array]]:
    """Yield the first frame of each chunk of latents (N, C, h, w), and its images."""
    height, width = (side * vae.spatial_factor for side in z.shape[-2:])
    temporal = isinstance(vae, AutoencoderKLTemporalDecoder)
    if size is None and temporal:
        size = min(num_frames, vae.check_frame(height, width))
    elif size is None:
        size = 1 if vae.use_slicing else vae.frames_per_chunk(height, width)
    for start in range(0, z.shape[0], size):
        part = z[start : start + size]
        yield start, vae.decode(part, part.shape[0]) if temporal else vae.decode(part)


def as_output(frames: np.ndarray, output_type: str) -> Any:
    """Return frames (B, F, H, W, 3) in the form of an `output_type` that is made of frames."""
    if output_type == "mlx":
        return mx.array(frames)
    if output_type == "pil":
        pixels = (frames * 255).round().astype(np.uint8)
        return [[Image.fromarray(image) for image in video] for video in pixels]
    return frames
