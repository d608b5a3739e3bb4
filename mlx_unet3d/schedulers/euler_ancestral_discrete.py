"""Ancestral Euler sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .euler_discrete import EulerLadder, euler_step

if TYPE_CHECKING:
    from ..noise import NoiseSource


class EulerAncestralDiscreteScheduler(EulerLadder):
    """Euler steps to below the next sigma, then noise up to it (k-diffusion's sample_euler_ancestral).

    Equals diffusers' EulerAncestralDiscreteScheduler.
    """

    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()

    @property
    def uses_noise(self) -> bool:
        """True: each step draws noise, even the last, where it has no weight."""
        return True

    def _lay_out(self, steps: int) -> None:
        self.timesteps = self._spaced_timesteps(steps)
        sigmas = self._interpolated_sigmas(self.timesteps)
        self.sigmas = np.append(sigmas, 0.0).astype(np.float32)

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """See `Scheduler.step`."""
        index = self._current_index(timestep)
        sigma, sigma_next = float(self.sigmas[index]), float(self.sigmas[index + 1])
        sigma_up = sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)

        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0 = self._denoised(model_output, sample, sigma)
        x = euler_step(sample, x0, sigma_down / sigma)
        x = x + sigma_up * self._draw(noise, sample.shape)
        self._step_index = index + 1
        return output(x, x0, dtype)
