"""The one denoising loop under all pipelines, as a generator of step records."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import NonFiniteError
from ..layers.text_context import TextContext
from ..models.feature_cache import FeatureCache
from ..models.unet_3d_condition import UNet3DConditionModel
from ..noise import NoiseSource
from ..schedulers import Scheduler


@dataclass(frozen=True)
class DenoisingStep:
    """The state of a run after a step.

    Attributes:
        step: 0 to total - 1.
        total: number of steps of the run.
        timestep: where the step started, usually 999 to 0.
        latents: (B, C, F, h, w) in fp32, evaluated; the input of the next step.
        denoised: the same shape; the current guess of the finished latents, for previews.
        prediction: the same shape; the guided output of the network in this step. All of them so far are
            what a run can go on from, see `denoise`.
    """

    step: int
    total: int
    timestep: float
    latents: mx.array
    denoised: mx.array
    prediction: mx.array


def fold_frames(video: mx.array) -> mx.array:
    """(B, C, F, h, w) -> (B*F, C, h, w), the form that schedulers and VAE take."""
    batch, channels, frames, height, width = video.shape
    return video.transpose(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)


def unfold_frames(images: mx.array, batch: int) -> mx.array:
    """(B*F, C, h, w) -> (B, C, F, h, w)."""
    n, channels, height, width = images.shape
    return images.reshape(batch, n // batch, channels, height, width).transpose(0, 2, 1, 3, 4)


@dataclass(frozen=True)
class Pass:
    """One run of the network in a step: its text, how many copies of the sample it takes, its features."""

    context: TextContext
    copies: int
    cache: FeatureCache | None


def full_steps(guided: Sequence[bool], cache_interval: int) -> list[int]:
    """The steps in which all layers run: every `cache_interval`th, counted anew where guidance sets in or
    ends, for then there are no features of as many samples."""
    full: list[int] = []
    for i in range(len(guided)):
        if i == 0 or guided[i] != guided[i - 1] or i - full[-1] >= cache_interval:
            full.append(i)
    return full


def denoise(
    unet: UNet3DConditionModel,
    scheduler: Scheduler,
    latents: mx.array,
    text_states: mx.array,
    *,
    guidance_scale: float,
    first_step: int = 0,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    predictions: Sequence[mx.array] = (),
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    cache_interval: int = 1,
    cache_depth: int = 1,
    sequential_guidance: bool = False,
) -> Iterator[DenoisingStep]:
    """Denoise `latents` (B, C, F, h, w) from `scheduler.timesteps[first_step]` to the end.

    `scheduler` is laid out, and this run's alone, as its steps change it: see `Scheduler.laid_out`.

    `text_states` is (2B, L, D), negative prompts first, where `guidance_scale` > 1, and (B, L, D)
    otherwise: then the network runs once a step. The latents stay in fp32; the network gets its dtype.

    `predictions`, those of the first records of a run with the same arguments, stand for the network in
    these steps: sampler and noise come to where that run stopped, whatever state they keep, and go on.

    `sequential_guidance` runs the network twice a step, for negative prompts and then for the others, where
    else it runs once for both: about half the memory, the same result up to rounding.

    Two ways to do less work, which change the result: guidance only in the steps of `guidance_interval`, in
    shares of the run (arXiv:2404.07724), the others taking one pass; and with `cache_interval` above 1 a
    `FeatureCache` of that interval and `cache_depth`.

    Raises NonFiniteError at the step where an infinity or NaN appears.
    """
    batch = latents.shape[0]

    def new_pass(states: mx.array) -> Pass:
        cache = FeatureCache(cache_interval, cache_depth) if cache_interval > 1 else None
        return Pass(TextContext(states), states.shape[0] // batch, cache)

    states = text_states.astype(unet.dtype)
    alone = [new_pass(states[-batch:])]
    both = [new_pass(states[:batch]), *alone] if sequential_guidance else [new_pass(states)]
    timesteps = scheduler.timesteps[first_step:]
    latents = latents.astype(mx.float32)
    shape = (len(timesteps), *latents.shape)
    if len(predictions) > shape[0] or any(tuple(p.shape) != shape[1:] for p in predictions):
        raise ValueError(
            f"predictions are {[tuple(p.shape) for p in predictions[:1]]} of {len(predictions)} steps; "
            f"this run makes {shape[0]} of {shape[1:]}: go on with the settings that they were made with"
        )
    first, last = guidance_interval
    guided = [guidance_scale > 1 and first <= i / shape[0] < last for i in range(shape[0])]
    if guidance_scale > 1 and not any(guided):
        raise ValueError(
            f"guidance_interval=({first:g}, {last:g}) holds none of the {shape[0]} steps; give a wider one, "
            "or guidance_scale=1 for none"
        )
    full = full_steps(guided, cache_interval)
    # Features are no part of a run that stopped: go back to the last step that made some.
    predictions = predictions[: max((i for i in full if i <= len(predictions)), default=0)]
    for i, timestep in enumerate(timesteps.tolist()):
        if i < len(predictions):
            prediction = predictions[i]
        else:
            model_input = scheduler.scale_model_input(latents, timestep).astype(unet.dtype)
            outputs = []
            for one in both if guided[i] else alone:
                if one.cache is not None and i in full:
                    one.cache.reset()
                sample = unet(
                    mx.concatenate([model_input] * one.copies),
                    timestep,
                    one.context,
                    cross_attention_kwargs=cross_attention_kwargs,
                    feature_cache=one.cache,
                ).sample
                outputs.append(sample)
                if sequential_guidance:
                    mx.eval(outputs)
            prediction = mx.concatenate(outputs).astype(mx.float32)
            if guided[i]:
                negative, positive = mx.split(prediction, 2)
                prediction = negative + guidance_scale * (positive - negative)

        options = {"eta": eta} if scheduler.uses_eta else {}
        latents, denoised = (
            unfold_frames(x, batch)
            for x in scheduler.step(
                fold_frames(prediction), timestep, fold_frames(latents), noise=noise, **options
            )
        )
        mx.eval(latents, denoised, prediction)
        if not math.isfinite(mx.abs(latents).max().item()):
            raise NonFiniteError(
                f"the latents are not finite after step {i + 1} of {len(timesteps)} (timestep {timestep}) "
                f"with a network in {unet.dtype}; run it in single precision: --dtype float32, or "
                "from_pretrained(..., dtype=mx.float32)"
            )
        yield DenoisingStep(i, len(timesteps), timestep, latents, denoised, prediction)
