"""DDIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx

from .arrays import SchedulerOutput, Timestep, output, upcast
from .base import Scheduler
from .config import configured

if TYPE_CHECKING:
    from ..noise import NoiseSource


class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models (Song et al. 2020, arXiv:2010.02502, eq. 12).

    Equals diffusers' DDIMScheduler.
    """

    uses_eta: ClassVar[bool] = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()

    def variance(self, timestep: int, prev_timestep: int) -> float:
        """Return the variance of the noise that a step with eta 1 adds (eq. 16, squared)."""
        now, prev = self._alpha_bar(timestep), self._alpha_bar(prev_timestep)
        return (1 - prev) / (1 - now) * (1 - now / prev)

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        eta: float = 0.0,
        noise: NoiseSource | None = None,
        use_clipped_model_output: bool = False,
    ) -> SchedulerOutput:
        """See `Scheduler.step`.

        Args:
            eta: amount of noise to add, from 0 (none: DDIM) to 1 (as in DDPM). Above 0, `noise` is required.
            use_clipped_model_output: derive the noise direction from the clipped clean sample.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be from 0 (no noise added) to 1 (as much as DDPM)")
        t = self._scheduled(timestep)
        prev_t = t - self.config.num_train_timesteps // self.num_inference_steps
        now, prev = self._alpha_bar(t), self._alpha_bar(prev_t)
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)

        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0, epsilon = self._x0_and_epsilon(model_output, sample, alpha, sigma)
        x0 = self._clip_or_threshold(x0)
        if use_clipped_model_output:
            epsilon = (sample - alpha * x0) / sigma

        variance = eta**2 * self.variance(t, prev_t)
        # Not below 0: with eta 1 and ᾱ 0, rounding can make the difference negative.
        direction = math.sqrt(max(1 - prev - variance, 0.0))
        x = math.sqrt(prev) * x0 + direction * epsilon
        if eta > 0:
            x = x + math.sqrt(variance) * self._draw(noise, sample.shape)
        return output(x, x0, dtype)
