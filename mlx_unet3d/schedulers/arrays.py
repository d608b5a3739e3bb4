"""Array operations that the steps of all schedulers share."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

Timestep = int | float | np.number | mx.array


class SchedulerOutput(NamedTuple):
    """The result of one step.

    Attributes:
        prev_sample: the sample at the next, less noisy, timestep; shape and dtype of the sample.
        pred_original_sample: the noise-free sample that the model predicts at this step (after clipping or
            thresholding, where enabled); for previews.
    """

    prev_sample: mx.array
    pred_original_sample: mx.array


def upcast(model_output: mx.array, sample: mx.array) -> tuple[mx.array, mx.array]:
    """Return the two arrays of a step in float32; ValueError where their shapes differ."""
    check_same_shape("model_output", model_output, "sample", sample)
    return model_output.astype(mx.float32), sample.astype(mx.float32)


def output(prev_sample: mx.array, x0: mx.array, dtype: mx.Dtype) -> SchedulerOutput:
    """Return the result of a step in the sample's dtype."""
    return SchedulerOutput(prev_sample.astype(dtype), x0.astype(dtype))


def dynamic_threshold(x0: mx.array, ratio: float, most: float) -> mx.array:
    """Apply dynamic thresholding (Saharia et al. 2022, section 2.3).

    Each sample is clipped to the `ratio` quantile of its magnitudes, itself limited to [1, `most`], and
    divided by it.
    """
    flat = x0.reshape(x0.shape[0], -1)
    ordered = mx.sort(mx.abs(flat), axis=1)
    place = ratio * (flat.shape[1] - 1)
    low = int(place)
    high = min(low + 1, flat.shape[1] - 1)
    below, above = ordered[:, low, None], ordered[:, high, None]
    bound = below + (place - low) * (above - below)
    bound = mx.minimum(mx.maximum(bound, 1.0), most)  # (B, 1)
    return (mx.clip(flat, -bound, bound) / bound).reshape(x0.shape)


def as_number(timestep: Timestep) -> float:
    """Return a timestep as a Python float."""
    if isinstance(timestep, (mx.array, np.ndarray)) and timestep.size != 1:
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a step takes a single one")
    return float(timestep.item() if hasattr(timestep, "item") else timestep)


def check_same_shape(name: str, array: mx.array, other_name: str, other: mx.array) -> None:
    if array.shape != other.shape:
        raise ValueError(
            f"{name} has shape {array.shape} and {other_name} {other.shape}; they must be the same"
        )
