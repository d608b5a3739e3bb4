"""Classifier-free guidance: a network and its inputs -> the function that a denoising loop calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..layers.text_context import TextContext
from ..models.feature_cache import FeatureCache
from .sampling import Sampling

Inputs = Mapping[str, Any]
"""Keywords of a network: arrays with a row a sample, in lists and dicts too, and constants."""

Network = Callable[..., mx.array]
"""network(sample, timestep, feature_cache=..., **inputs) -> prediction, of the dtype of the sample."""


@dataclass(frozen=True)
class _Pass:
    """One run of the network in a step.

    Attributes:
        inputs: of the network, for all frames.
        copies: how often it takes the sample.
        cache: its features.
        a_frame: inputs with an entry a frame, and their axes.
    """

    inputs: Inputs
    copies: int
    cache: FeatureCache | None
    a_frame: Mapping[str, tuple[mx.array, int]]

    def of_frames(self, frames: mx.array | None) -> Inputs:
        """Return the inputs for some frames; None for all."""
        if frames is None:
            return self.inputs
        some = {name: mx.take(array, frames, axis) for name, (array, axis) in self.a_frame.items()}
        if "encoder_hidden_states" in some:
            some["encoder_hidden_states"] = _as_rows(some["encoder_hidden_states"])
        return {**self.inputs, **some}


class Guidance:
    """`Predict` of a network: prediction = negative + scale * (positive - negative), perhaps rescaled.

    Args:
        network: see `Network`.
        sampling: the settings of the run.
        positive, negative: the inputs of B rows; `encoder_hidden_states`, (B, L, D), or (B, F, L, D) with a
            text a frame, becomes a `TextContext`, whose keys and values all steps share. `negative` may be
            None where nothing is guided.
        steps: number of steps of the run.
        dtype: of the network.
        scale: an array with the axes of the prediction, as long or of length 1, in place of
            `sampling.guidance_scale`.
        frame_axes: inputs with an entry a frame, and the axis of these; `Windowed` takes parts of them.
        frames_axis: that of the sample, for a `scale` with an entry a frame.
        sequential: run the network twice a step, for the negative inputs and then for the positive ones, not
            once for both: about half the memory, the same result up to rounding.

    Guidance in the steps of `sampling.guidance_interval` alone, and a `FeatureCache` of
    `sampling.cache_interval`, do less work and change the result.
    Raises ValueError where the interval holds no step.
    """

    def __init__(
        self,
        network: Network,
        sampling: Sampling,
        positive: Inputs,
        negative: Inputs | None = None,
        *,
        steps: int,
        dtype: mx.Dtype,
        scale: mx.array | None = None,
        frame_axes: Mapping[str, int] | None = None,
        frames_axis: int = 2,
        sequential: bool = False,
    ):
        self.network, self.dtype, self.sequential = network, dtype, sequential
        self.frames_axis = frames_axis
        self.scale = sampling.guidance_scale if scale is None else scale
        self.rescale = sampling.guidance_rescale
        first, last = sampling.guidance_interval
        self.guided = [sampling.is_guided and first <= i / steps < last for i in range(steps)]
        if sampling.is_guided and not any(self.guided):
            raise ValueError(
                f"guidance_interval=({first:g}, {last:g}) holds none of the {steps} steps; give a wider one, "
                "or guidance_scale=1 for none"
            )
        self.full = full_steps(self.guided, sampling.cache_interval)

        def one_pass(inputs: Inputs, copies: int) -> _Pass:
            inputs = dict(inputs)
            mx.eval([array for _, array in tree_flatten(inputs)])  # so that another thread can run the steps
            a_frame = {name: (inputs[name], axis) for name, axis in (frame_axes or {}).items()}
            text = inputs.get("encoder_hidden_states")
            if isinstance(text, mx.array):
                if text.ndim == 4:
                    a_frame["encoder_hidden_states"] = text, 1
                inputs["encoder_hidden_states"] = TextContext(_as_rows(text))
            interval = sampling.cache_interval
            cache = FeatureCache(interval, sampling.cache_depth) if interval > 1 else None
            return _Pass(inputs, copies, cache, a_frame)

        self._alone = self._both = [one_pass(positive, 1)]
        if sampling.is_guided and sequential:
            self._both = [one_pass(negative, 1), *self._alone]
        elif sampling.is_guided:
            self._both = [one_pass(_joined(negative, positive), 2)]

    def __call__(
        self, sample: mx.array, timestep: float, step: int, frames: mx.array | None = None
    ) -> mx.array:
        sample = sample.astype(self.dtype)
        outputs = []
        for one in self._both if self.guided[step] else self._alone:
            if one.cache is not None and step in self.full:
                one.cache.reset()
            rows = mx.concatenate([sample] * one.copies)
            inputs = one.of_frames(frames)
            outputs.append(self.network(rows, timestep, feature_cache=one.cache, **inputs))
            if self.sequential:
                mx.eval(outputs)
        prediction = mx.concatenate(outputs).astype(mx.float32)
        if not self.guided[step]:
            return prediction
        negative, positive = mx.split(prediction, 2)
        scale, axis = self.scale, self.frames_axis
        if frames is not None and isinstance(scale, mx.array) and scale.shape[axis] > 1:
            scale = mx.take(scale, frames, axis)
        guided = negative + scale * (positive - negative)
        return rescaled(guided, positive, self.rescale) if self.rescale else guided

    def resumes_at(self, step: int) -> int:
        """Return the last full step: cached features are no part of a run that stopped."""
        return max((i for i in self.full if i <= step), default=0)


def rescaled(guided: mx.array, positive: mx.array, amount: float) -> mx.array:
    """Bring the deviation of each sample of a guided prediction (B, ...) towards that of the positive one, 0
    not at all, 1 fully (arXiv:2305.08891, section 3.4)."""
    axes = list(range(1, guided.ndim))
    wanted, has = (mx.std(x, axis=axes, keepdims=True, ddof=1) for x in (positive, guided))
    return guided * (amount * wanted / has + (1 - amount))


def full_steps(guided: Sequence[bool], cache_interval: int) -> list[int]:
    """Return the steps in which all layers run: every `cache_interval`th, counted anew where guidance sets
    in or ends, for then there are no features of as many samples."""
    full: list[int] = []
    for i in range(len(guided)):
        if i == 0 or guided[i] != guided[i - 1] or i - full[-1] >= cache_interval:
            full.append(i)
    return full


def _as_rows(text: mx.array) -> mx.array:
    """(B, F, L, D) -> (B*F, L, D); (B, L, D) stays."""
    return text.reshape(-1, *text.shape[-2:])


def _joined(negative: Any, positive: Any) -> Any:
    """Stack the rows of two inputs, the negative ones first; constants are the same in both."""
    if isinstance(positive, mx.array):
        return mx.concatenate([negative, positive])
    if isinstance(positive, Mapping):
        return {key: _joined(negative[key], value) for key, value in positive.items()}
    if isinstance(positive, list | tuple):
        return [_joined(*pair) for pair in zip(negative, positive, strict=True)]
    return positive
