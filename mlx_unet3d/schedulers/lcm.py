"""LCM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .distilled import DistilledScheduler

if TYPE_CHECKING:
    from ..noise import NoiseSource

SIGMA_DATA = 0.5


class LCMScheduler(DistilledScheduler):
    """Multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378, algorithm
    3).

    Equals diffusers' LCMScheduler; `pred_original_sample` is its `denoised`. See `DistilledScheduler`
    for the timesteps; `set_alpha_to_one` changes nothing, as in diffusers.

    `distilled_spacing` does not exist in diffusers. "linspace", as there, spreads the steps over all
    timesteps of the distillation; "strided" takes every k-th of them, beginning with the last, with k =
    `original_inference_steps` // steps, as T2V-Turbo does (Li et al. 2024, arXiv:2405.18750).
    """

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        distilled_spacing: str = "linspace",
    ) -> None:
        super().__init__()
        self._check_choice("distilled_spacing", ("linspace", "strided"))

    @property
    def uses_noise(self) -> bool:
        """True: each step except the last draws noise."""
        return self.num_inference_steps != 1

    def _places(self, steps: int, original: int) -> np.ndarray:
        if self.config.distilled_spacing == "strided":
            return np.arange(steps) * (original // steps)
        return super()._places(steps, original)

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
        t = int(self.timesteps[index])
        now = self._alpha_bar(t)

        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0, _ = self._x0_and_epsilon(model_output, sample, math.sqrt(now), math.sqrt(1 - now))
        x0 = self._clip_or_threshold(x0)

        # The consistency function's boundary condition: the identity at t = 0 (eq. 9).
        scaled = t * self.config.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        x0 = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2) * x0 + skip * sample

        x = x0
        if index + 1 < len(self.timesteps):
            prev = self._alpha_bar(int(self.timesteps[index + 1]))
            x = math.sqrt(prev) * x0 + math.sqrt(1 - prev) * self._draw(noise, sample.shape)
        self._step_index = index + 1
        return output(x, x0, dtype)
