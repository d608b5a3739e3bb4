"""TCD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .distilled import DistilledScheduler

if TYPE_CHECKING:
    from ..noise import NoiseSource


class TCDScheduler(DistilledScheduler):
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, arXiv:2402.19159).

    Equals diffusers' TCDScheduler, which never clips or thresholds, regardless of the config. See
    `DistilledScheduler` for the timesteps.
    """

    uses_eta: ClassVar[bool] = True

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
    ) -> None:
        super().__init__()

    @property
    def uses_noise(self) -> bool:
        """True: each step except the last draws noise, unless eta is 0."""
        return self.num_inference_steps != 1

    def _distilled_timesteps(self) -> np.ndarray:
        if self._original is None:
            return super()._distilled_timesteps()
        return np.arange(self.config.num_train_timesteps)[::-1]  # any timestep is allowed, as in diffusers

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        eta: float = 0.3,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """See `Scheduler.step`.

        Args:
            eta: gamma of the paper, the share of each step that is noised again, from 0 (none) to 1 (all).
                Above 0, `noise` is required.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be from 0 (no noise added) to 1 (each step noised anew)")
        index = self._current_index(timestep)
        last = index + 1 == len(self.timesteps)
        prev_t = 0 if last else int(self.timesteps[index + 1])
        # Denoise down to s, below the next timestep, then add noise up to it. diffusers rounds the product to
        # float32.
        s = int(np.floor(np.float32(1 - eta) * np.float32(prev_t)))
        now, aim, below = (self._alpha_bar(t) for t in (int(self.timesteps[index]), prev_t, s))

        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0, epsilon = self._x0_and_epsilon(model_output, sample, math.sqrt(now), math.sqrt(1 - now))
        x = math.sqrt(below) * x0 + math.sqrt(1 - below) * epsilon
        if eta > 0 and not last:
            share = aim / below
            x = math.sqrt(share) * x + math.sqrt(1 - share) * self._draw(noise, sample.shape)
        self._step_index = index + 1
        return output(x, x0, dtype)
