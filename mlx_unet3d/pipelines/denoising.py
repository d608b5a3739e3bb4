"""The one denoising loop under all pipelines, as a generator of step records."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import NonFiniteError
from ..noise import NoiseSource
from ..schedulers import Scheduler
from .predict import Predict


@dataclass(frozen=True)
class DenoisingStep:
    """The state of a run after a step.

    Attributes:
        step: 0 to total - 1.
        total: number of steps of the run.
        timestep: where the step started, usually 999 to 0.
        latents: (B, C, F, h, w), of Stable Video Diffusion (B, F, C, h, w), in fp32, evaluated; the input of
            the next step.
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


Steps = Generator[DenoisingStep, mx.array | None, None]
"""The records of a run. `send(latents)` in place of `next` goes on from other latents."""


def fold_frames(video: mx.array) -> mx.array:
    """(B, C, F, h, w) -> (B*F, C, h, w), the form that VAEs take."""
    batch, channels, frames, height, width = video.shape
    return video.transpose(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)


def unfold_frames(images: mx.array, batch: int) -> mx.array:
    """(B*F, C, h, w) -> (B, C, F, h, w)."""
    n, channels, height, width = images.shape
    return images.reshape(batch, n // batch, channels, height, width).transpose(0, 2, 1, 3, 4)


def start_latents(
    shape: tuple[int, ...], latents: mx.array | None, noise: NoiseSource, scheduler: Scheduler
) -> mx.array:
    """Return where a run begins: `latents`, or noise of that shape, times `init_noise_sigma`.

    Raises ValueError for latents of another shape.
    """
    if latents is None:
        latents = noise(shape)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; with these settings it must be {shape}")
    return mx.array(latents).astype(mx.float32) * scheduler.init_noise_sigma


def denoise(
    predict: Predict,
    scheduler: Scheduler,
    latents: mx.array,
    *,
    noise: NoiseSource | None = None,
    eta: float = 0.0,
    predictions: Sequence[mx.array] = (),
    first_step: int = 0,
    stop: int | None = None,
    folded: bool = False,
) -> Steps:
    """Denoise latents from `scheduler.timesteps[first_step]` on, in fp32.

    Args:
        predict: the network with its guidance.
        scheduler: laid out, and this run's alone, as its steps change it: see `Scheduler.laid_out`.
        latents: (B, ...).
        noise: where samplers draw from.
        eta: for samplers that take it.
        predictions: those of the first records of a run with the same arguments. They stand for the network
            in these steps: sampler and noise come to where that run stopped, and go on.
        first_step: where in the schedule the run begins.
        stop: the place in the schedule before which it ends; None for its end.
        folded: give the sampler (B*F, C, h, w) of latents (B, C, F, h, w), as some pipelines of diffusers do;
            it then draws noise and takes quantiles a frame.

    Raises NonFiniteError at the step where an infinity or NaN appears.
    """
    batch = latents.shape[0]
    timesteps = scheduler.timesteps[first_step:stop].tolist()
    total, shape = len(timesteps), tuple(latents.shape)
    if len(predictions) > total or any(tuple(p.shape) != shape for p in predictions):
        raise ValueError(
            f"predictions are {[tuple(p.shape) for p in predictions[:1]]} of {len(predictions)} steps; "
            f"this run makes {total} of {shape}: go on with the settings that they were made with"
        )
    if len(predictions) < total:
        predictions = predictions[: predict.resumes_at(len(predictions))]
    options = {"eta": eta} if scheduler.uses_eta else {}
    for i, timestep in enumerate(timesteps):
        if i < len(predictions):
            prediction = predictions[i]
        else:
            prediction = predict(scheduler.scale_model_input(latents, timestep), timestep, i)
        given = [fold_frames(x) if folded else x for x in (prediction, latents)]
        made = scheduler.step(given[0], timestep, given[1], noise=noise, **options)
        latents, denoised = (unfold_frames(x, batch) if folded else x for x in made)
        mx.eval(latents, denoised, prediction)
        if not math.isfinite(mx.abs(latents).max().item()):
            raise NonFiniteError(
                f"the latents are not finite after step {i + 1} of {total} (timestep {timestep}) with a "
                f"network in {predict.dtype}; run it in single precision: --dtype float32, or "
                "from_pretrained(..., dtype=mx.float32)"
            )
        replaced = yield DenoisingStep(i, total, timestep, latents, denoised, prediction)
        if replaced is not None:
            if tuple(replaced.shape) != shape:
                raise ValueError(f"latents of a callback have shape {tuple(replaced.shape)}, not {shape}")
            latents = replaced.astype(mx.float32)
