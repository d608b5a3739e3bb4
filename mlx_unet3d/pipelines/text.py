"""States of encoded prompts, as they go from `encode_prompt` to the denoising loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class TextStates(NamedTuple):
    """The pair that diffusers' `encode_prompt` returns.

    As a NumPy array, it is those of the two that are there, stacked.

    Attributes:
        prompt_embeds: (B, L, D).
        negative_prompt_embeds: the same shape, or None where nothing is guided.
    """

    prompt_embeds: mx.array
    negative_prompt_embeds: mx.array | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array([np.array(states) for states in self if states is not None], dtype=dtype)


def stacked(states: tuple[mx.array, mx.array | None], guidance_scale: float) -> mx.array:
    """The pair of `encode_prompt` as `denoise` takes it: (2B, L, D), negative first, or (B, L, D).

    Raises TypeError for anything but a pair, ValueError where guidance lacks negative states.
    """
    if not isinstance(states, tuple) or len(states) != 2:
        raise TypeError(
            f"text states are a {type(states).__name__}; give the pair that encode_prompt returns"
        )
    positive, negative = states
    if guidance_scale <= 1:
        return positive
    if negative is None or negative.shape != positive.shape:
        shape = None if negative is None else tuple(negative.shape)
        raise ValueError(
            f"guidance_scale={guidance_scale:g} needs negative states of shape {tuple(positive.shape)}, "
            f"not {shape}; call encode_prompt with the same guidance_scale"
        )
    return mx.concatenate([negative, positive])
