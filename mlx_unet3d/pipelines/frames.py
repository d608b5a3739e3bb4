"""Frames in any accepted form -> an array."""

from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..image_processor import vae_pixels


def as_pixels(video: Any) -> np.ndarray:
    """Frames in any accepted form -> float32 (B, F, H, W, 3) in [0, 1]; TypeError or ValueError else."""
    frames = as_frames(video)
    return frames.astype(np.float32) / 255 if frames.dtype == np.uint8 else frames


def resized(video: Any, height: int, width: int) -> mx.array:
    """Frames in any accepted form -> (B, F, 3, height, width) in [-1, 1], resized as diffusers does it:
    images and uint8 by a Lanczos filter, floats to the nearest pixel."""
    frames = as_frames(video)
    if frames.dtype == np.uint8:
        images = vae_pixels(frames.reshape(-1, *frames.shape[2:]), height, width, factor=1)
        return images.reshape(*frames.shape[:2], *images.shape[1:])
    rows, columns = (
        np.arange(new) * old // new for new, old in zip((height, width), frames.shape[2:4], strict=True)
    )
    return mx.array(frames[:, :, rows][:, :, :, columns].transpose(0, 1, 4, 2, 3) * 2 - 1)


def as_frames(video: Any) -> np.ndarray:
    """Frames in any accepted form -> (B, F, H, W, 3), uint8 or float32 in [0, 1]; TypeError or ValueError
    else."""
    if video is None:
        raise ValueError("video is None; give frames (F, H, W, 3), a list of images, or latents")
    if isinstance(video, list | tuple):
        if not video:
            raise ValueError("video is an empty list; it must have at least one frame")
        parts = [as_array(part) for part in video]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"the frames of video differ in shape: {sorted(shapes)}")
        # Arrays of five axes are batches already.
        video = np.concatenate(parts) if parts[0].ndim == 5 else np.stack(parts)
    if not isinstance(video, np.ndarray):
        raise TypeError(
            f"video is a {type(video).__name__}; give a NumPy array, a list of images or an mx.array"
        )
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video has shape {video.shape}; it must be (frames, height, width, 3)")
    if video.dtype == np.uint8:
        return video
    if not np.issubdtype(video.dtype, np.floating):
        raise TypeError(f"video is {video.dtype}; it must be uint8, or floats in [0, 1]")
    if not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(
            f"video has values from {video.min():.3g} to {video.max():.3g}; floats must lie in [0, 1]"
        )
    return video.astype(np.float32)


def as_array(part: Any) -> np.ndarray:
    """A frame (H, W, 3) of an image, frames (F, H, W, 3) of a list of them; an array as it is."""
    if isinstance(part, Image.Image):
        return np.asarray(part.convert("RGB"))
    if isinstance(part, list | tuple) and part:
        frames = [as_array(frame) for frame in part]
        shapes = {frame.shape for frame in frames}
        if len(shapes) > 1:
            raise ValueError(f"the frames of video differ in shape: {sorted(shapes)}")
        return np.stack(frames)
    if not isinstance(part, np.ndarray):
        raise TypeError(f"video has a {type(part).__name__} in it; give images or NumPy arrays")
    return part
