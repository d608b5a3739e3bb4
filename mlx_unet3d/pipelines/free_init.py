"""FreeInit (arXiv:2312.07537): denoise several times, each from noise with the low frequencies of the last
video."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..noise import NoiseSource
from ..scalars import as_count, as_finite
from ..schedulers import Scheduler
from ..schedulers.sigma import SigmaScheduler
from .components import Components
from .denoising import Steps, denoise
from .predict import Predict
from .sampling import Sampling

METHODS = ("butterworth", "gaussian", "ideal")


@dataclass(frozen=True)
class FreeInit:
    """Settings of FreeInit; names, defaults and numbers of diffusers.

    Attributes:
        num_iters: runs of the denoising loop.
        use_fast_sampling: fewer steps in all iterations but the last, n/iters, 2n/iters, ...
        method: edge of the filter, "butterworth", "gaussian" or "ideal".
        order: steepness of "butterworth".
        spatial_stop_frequency, temporal_stop_frequency: where the low frequencies end, 0 to 1, 1 the highest
            of an axis; with a zero among them there are none.

    Raises ValueError for other values.
    """

    num_iters: int = 3
    use_fast_sampling: bool = False
    method: str = "butterworth"
    order: float = 4
    spatial_stop_frequency: float = 0.25
    temporal_stop_frequency: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_iters", as_count("num_iters", self.num_iters))
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(map(repr, METHODS))}")
        if as_finite("order", self.order) <= 0:
            raise ValueError(f"order={self.order} must be above 0")
        for name in ("spatial_stop_frequency", "temporal_stop_frequency"):
            if not 0 <= as_finite(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")

    def steps(self, num_inference_steps: int, iteration: int) -> int:
        """Return the steps of an iteration, of which the first is 0."""
        if not self.use_fast_sampling:
            return num_inference_steps
        return max(1, int(num_inference_steps / self.num_iters * (iteration + 1)))

    def lay_out(self, sampling: Sampling, scheduler: Scheduler) -> list[Scheduler]:
        """Return copies of the scheduler, one an iteration; ValueError where there are no steps to divide."""
        if self.use_fast_sampling and (sampling.timesteps is not None or sampling.sigmas is not None):
            raise ValueError(
                "use_fast_sampling of FreeInit divides num_inference_steps; leave out timesteps and sigmas, "
                "or call enable_free_init without it"
            )
        steps = (self.steps(sampling.num_inference_steps, i) for i in range(self.num_iters))
        return [replace(sampling, num_inference_steps=n).lay_out(scheduler) for n in steps]

    def low_frequencies(self, frames: int, height: int, width: int) -> np.ndarray:
        """Return the share of each frequency to keep, (F, h, w), the frequency 0 in the middle."""
        space, time = self.spatial_stop_frequency, self.temporal_stop_frequency
        if space == 0 or time == 0:
            return np.zeros((frames, height, width))
        t, y, x = np.meshgrid(*(2 * np.arange(n) / n - 1 for n in (frames, height, width)), indexing="ij")
        square = (space / time * t) ** 2 + y**2 + x**2
        if self.method == "butterworth":
            return 1 / (1 + (square / space**2) ** self.order)
        if self.method == "gaussian":
            return np.exp(-square / (2 * space**2))
        return (square <= 2 * space).astype(float)

    def mix(self, latents: mx.array, noise: mx.array) -> mx.array:
        """Return the low frequencies of latents and the high ones of noise, both (B, C, F, h, w), in fp32."""
        axes = (-3, -2, -1)
        low = np.fft.ifftshift(self.low_frequencies(*latents.shape[-3:]))
        mixed = np.fft.fftn(np.array(latents, np.float64), axes=axes) * low
        mixed += np.fft.fftn(np.array(noise, np.float64), axes=axes) * (1 - low)
        return mx.array(np.fft.ifftn(mixed, axes=axes).real.astype(np.float32))


class FreeInitMethods(Components):
    """A pipeline with the switches of FreeInit, which is part of its state as FreeU is of its UNet's."""

    free_init: FreeInit | None = None

    def enable_free_init(
        self,
        num_iters: int = 3,
        use_fast_sampling: bool = False,
        method: str = "butterworth",
        order: float = 4,
        spatial_stop_frequency: float = 0.25,
        temporal_stop_frequency: float = 0.25,
    ) -> None:
        """Make videos in several iterations, which takes as many times as long and makes them steadier.

        Arguments see `FreeInit`. The records of a run are those of all iterations.
        """
        self.free_init = FreeInit(
            num_iters, use_fast_sampling, method, order, spatial_stop_frequency, temporal_stop_frequency
        )

    def disable_free_init(self) -> None:
        """Make videos in one iteration again."""
        self.free_init = None

    @property
    def free_init_enabled(self) -> bool:
        """True between `enable_free_init` and `disable_free_init`."""
        return self.free_init is not None

    def _schedulers(self, sampling: Sampling) -> list[Scheduler]:
        """Return a copy of the scheduler for each iteration, one without FreeInit."""
        if self.free_init is None:
            return [sampling.lay_out(self.scheduler)]
        return self.free_init.lay_out(sampling, self.scheduler)


@dataclass(frozen=True)
class Run:
    """One iteration: network, scheduler, and the places in its schedule before which it ends and where it
    begins."""

    predict: Predict
    scheduler: Scheduler
    stop: int
    first: int = 0

    @property
    def steps(self) -> int:
        """The number of its steps."""
        return self.stop - self.first


def denoise_again(
    runs: Sequence[Run],
    latents: mx.array,
    free_init: FreeInit | None,
    *,
    noise: NoiseSource,
    eta: float = 0.0,
    predictions: Sequence[mx.array] = (),
    start: mx.array | None = None,
) -> Steps:
    """Denoise in iterations, or once in the only one; the records count through all of them.

    Args:
        runs: the iterations.
        latents: (B, C, F, h, w), where the first begins; all others take their low frequencies from that.
        free_init: how others begin.
        noise, eta, predictions: see `denoise`.
        start: the noise, of unit variance, that later iterations add to the last video; None for `latents`,
            which are noise alone, at that variance.

    As in diffusers, a video is brought back to the last timestep of training, wherever the schedule begins.
    Samplers that know the noise of their schedule's timesteps alone, such as DPM++, go back to the first of
    them where that is another; diffusers takes the last one for it. Samplers that begin at a noise level
    above 1, such as Euler's, go back to that level; diffusers scales their first noise twice, and later noise
    not at all.
    """
    total, done = sum(run.steps for run in runs), 0
    if len(predictions) > total:
        raise ValueError(
            f"predictions are those of {len(predictions)} steps; this run makes {total}: go on with the "
            "settings that they were made with"
        )
    if start is None:
        start = latents / runs[0].scheduler.init_noise_sigma
    for i, run in enumerate(runs):
        scheduler = run.scheduler
        if i > 0:
            sigma, last = scheduler.init_noise_sigma, scheduler.config.num_train_timesteps - 1
            if sigma != 1:
                last = scheduler.timesteps[run.first]
                sigma = float(scheduler.sigmas[run.first]) if run.first else sigma
            elif isinstance(scheduler, SigmaScheduler) and last not in scheduler.timesteps:
                last = scheduler.timesteps[0]
            noisy = scheduler.add_noise(latents, start, last)
            latents = free_init.mix(noisy, noise(tuple(latents.shape)) * sigma)
        steps = denoise(
            run.predict,
            scheduler,
            latents,
            noise=noise,
            eta=eta,
            predictions=predictions[done : done + run.steps],
            first_step=run.first,
            stop=run.stop,
        )
        record = next(steps, None)
        while record is not None:
            replaced = yield replace(record, step=done + record.step, total=total)
            latents = record.latents if replaced is None else replaced.astype(mx.float32)
            try:
                record = steps.send(replaced)
            except StopIteration:
                record = None
        done += run.steps
