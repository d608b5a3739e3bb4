"""Frames of any form to a file, by the names of `diffusers.utils`; and to HTML, for notebooks."""

import base64
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, features

from ..diffusers_names import answers_diffusers
from . import gif, images
from .files import write_video
from .frames import Frames, as_frames, check_frames, to_uint8

MAX_SIDE = 512  # pixels of a video in a page
MAX_VIDEOS = 4
MAX_BYTES = 2**21  # of each; a notebook keeps them
MIN_SIDE = 64  # below, frames are left out

AnyFrames = np.ndarray | mx.array | Sequence[Image.Image] | Sequence[np.ndarray]
"""One clip: (F, H, W, 3), uint8 or floats in [0, 1]; or a list of images, or of arrays (H, W, 3)."""


@answers_diffusers
def export_to_video(
    video_frames: AnyFrames, output_video_path: str | os.PathLike[str] | None = None, fps: float = 10
) -> str:
    """Write a clip as .mp4, or in the format of another suffix; returns the path.

    Args:
        video_frames: of one video, `pipe(...).frames[0]`: (F, H, W, 3), uint8 or floats in [0, 1], or a list
            of images or arrays (H, W, 3).
        output_video_path: see `write_video`, which also writes settings into the file; None for a new file in
            the folder for temporary ones.
        fps: frames a second. Models are made for other rates than this default, which is diffusers': 8 for
            text to video and AnimateDiff, 7 for Stable Video Diffusion, 16 for I2VGen-XL.

    Raises as `write_video`; TypeError or ValueError for several videos, or values outside [0, 1].
    """
    return _exported(video_frames, output_video_path, fps, ".mp4")


@answers_diffusers
def export_to_gif(
    image: AnyFrames, output_gif_path: str | os.PathLike[str] | None = None, fps: float = 10
) -> str:
    """Write a clip as .gif; arguments and errors are those of `export_to_video`."""
    return _exported(image, output_gif_path, fps, ".gif")


def _exported(frames: AnyFrames, path: str | os.PathLike[str] | None, fps: float, suffix: str) -> str:
    pixels = as_pixels(frames)
    if path is None:
        with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
            path = file.name
    return str(write_video(path, pixels, fps=fps))


def as_pixels(frames: Any) -> Frames:
    """Return one clip of any form as uint8 (F, H, W, 3); TypeError or ValueError for anything else."""
    if hasattr(frames, "frames"):
        raise TypeError("frames are the output of a pipeline; give one of its videos, output.frames[0]")
    if isinstance(frames, list | tuple) and len(frames) and isinstance(frames[0], list | tuple):
        raise ValueError(f"frames are a list of {len(frames)} videos; give one, frames[0]")
    frames = as_frames(frames)
    if isinstance(frames, mx.array) and mx.issubdtype(frames.dtype, mx.floating):
        frames = frames.astype(mx.float32)  # NumPy has no bfloat16
    frames = np.array(frames) if isinstance(frames, mx.array) else frames
    if getattr(frames, "ndim", 0) == 5:
        raise ValueError(f"frames have the shape {frames.shape}, a batch of videos; give one, frames[0]")
    if isinstance(frames, np.ndarray) and np.issubdtype(frames.dtype, np.floating):
        frames = to_uint8(frames)
    check_frames(frames)
    return frames


def as_html(videos: Sequence[Any], fps: float) -> str:
    """Return HTML that plays clips of any form, small, inside itself.

    At most `MAX_VIDEOS` of them, each of at most `MAX_SIDE` pixels a side and `MAX_BYTES` before base64.
    """
    shown = []
    for video in videos[:MAX_VIDEOS]:
        pixels = as_pixels(video)
        count, height, width, _ = pixels.shape
        data, kind = _small(pixels, fps)
        shown.append(
            f'<img alt="{count} frames of {width}x{height} pixels" style="max-width: 100%" '
            f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
        )
    hidden = len(videos) - len(shown)
    return "\n".join(shown + [f"<p>and {hidden} more</p>"] * (hidden > 0))


def _small(frames: Frames, fps: float) -> tuple[bytes, str]:
    """Return the bytes of an animated image, and its kind: smaller pixels, then fewer frames, until it
    fits."""
    kind, write = ("webp", images.write_webp) if features.check("webp") else ("gif", gif.write_gif)
    side = MAX_SIDE
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"video.{kind}"
        while True:
            write(file, _shrunk(frames, side), fps, None, 0)
            if file.stat().st_size <= MAX_BYTES:
                return file.read_bytes(), kind
            if side > MIN_SIDE:
                side = side * 3 // 4
            else:
                frames, fps = frames[::2], fps / 2


def _shrunk(frames: Frames, side: int) -> Frames:
    height, width = frames.shape[1:3]
    share = side / max(height, width)
    if share >= 1:
        return frames
    size = max(1, round(width * share)), max(1, round(height * share))
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    )
