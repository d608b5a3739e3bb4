"""DDPM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .base import Scheduler
from .config import configured
from .tables import BETA_SCHEDULES

if TYPE_CHECKING:
    from ..noise import NoiseSource

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", None)


class DDPMScheduler(Scheduler):
    """Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239, eq. 7).

    Equals diffusers' DDPMScheduler, except that `variance_type="fixed_large_log"` is refused: there,
    diffusers takes the root of a negative number. A `variance_type` of None, as in configs of DPM-Solver,
    stands for "fixed_small". With a learned variance (Nichol and Dhariwal 2021), the model output has twice
    the channels of the sample on axis 1: the prediction, then the variance.
    """

    custom_schedules: ClassVar[tuple[str, ...]] = ("timesteps",)
    beta_schedules: ClassVar[tuple[str, ...]] = (*BETA_SCHEDULES, "sigmoid", "laplace")

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        self._check_choice("variance_type", VARIANCE_TYPES)

    @property
    def uses_noise(self) -> bool:
        """True: each step draws noise, except at timestep 0."""
        return True

    def _lay_out(self, steps: int, timesteps: np.ndarray | None = None) -> None:
        if timesteps is None:
            super()._lay_out(steps)
            return
        self._check_falling(timesteps)
        self.timesteps = timesteps.astype(np.int64)

    def _alpha_bar(self, timestep: int) -> float:
        return float(self.alphas_cumprod[timestep]) if timestep >= 0 else 1.0

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """See `Scheduler.step`."""
        t = self._scheduled(timestep)
        place = self.index_for_timestep(t) + 1
        prev_t = int(self.timesteps[place]) if place < len(self.timesteps) else -1
        now, prev = self._alpha_bar(t), self._alpha_bar(prev_t)
        beta = 1 - now / prev

        dtype = sample.dtype
        model_output, learned = self._split(model_output, sample)
        model_output, sample = upcast(model_output, sample)
        x0, _ = self._x0_and_epsilon(model_output, sample, math.sqrt(now), math.sqrt(1 - now))
        x0 = self._clip_or_threshold(x0)

        x = (math.sqrt(prev) * beta / (1 - now)) * x0
        x = x + (math.sqrt(now / prev) * (1 - prev) / (1 - now)) * sample
        if t > 0:
            small = max((1 - prev) / (1 - now) * beta, 1e-20)
            x = x + self._deviation(small, beta, learned) * self._draw(noise, sample.shape)
        return output(x, x0, dtype)

    def _split(self, model_output: mx.array, sample: mx.array) -> tuple[mx.array, mx.array | None]:
        """Return the prediction, and the learned variance or None."""
        if self.config.variance_type not in ("learned", "learned_range"):
            return model_output, None
        channels = sample.shape[1]
        if model_output.shape[1] != 2 * channels:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} needs {2 * channels} channels in the "
                f"model output, twice those of the sample; it has {model_output.shape[1]}"
            )
        prediction, variance = mx.split(model_output, 2, axis=1)
        return prediction, variance.astype(mx.float32)

    def _deviation(self, small: float, large: float, learned: mx.array | None) -> float | mx.array:
        """Return the standard deviation of the noise, from the posterior's variance and beta."""
        kind = self.config.variance_type
        if kind == "learned":
            return mx.sqrt(learned)
        if kind == "learned_range":  # from -1 to 1, interpolates their logarithms
            share = (learned + 1) / 2
            return mx.exp(0.5 * (share * math.log(large) + (1 - share) * math.log(small)))
        return math.sqrt(large if kind == "fixed_large" else small)
