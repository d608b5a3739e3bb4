"""Heun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .euler_discrete import EulerLadder
from .tables import BETA_SCHEDULES, sigma_to_timestep

if TYPE_CHECKING:
    from ..noise import NoiseSource


class HeunDiscreteScheduler(EulerLadder):
    """Heun's method for the probability flow, without churn (Karras et al. 2022, arXiv:2206.00364, alg. 1).

    Equals diffusers' HeunDiscreteScheduler. A step calls the network at its beginning and end and follows the
    mean of both slopes; the last step calls it only at the beginning. So `timesteps` has 2n - 1 entries for n
    steps.
    """

    order: ClassVar[int] = 2
    custom_schedules: ClassVar[tuple[str, ...]] = ("timesteps",)
    beta_schedules: ClassVar[tuple[str, ...]] = (*BETA_SCHEDULES, "exp")

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()
        self._reset()

    def _reset(self) -> None:
        self._slope: mx.array | None = None  # at the beginning of the current step
        self._anchor: mx.array | None = None  # the sample at that point

    def _lay_out(self, steps: int, timesteps: np.ndarray | None = None) -> None:
        timesteps = self._spaced_timesteps(steps) if timesteps is None else timesteps.astype(np.float32)
        sigmas = self._interpolated_sigmas(timesteps)
        kind = self.sigma_kind()
        if kind is not None:
            sigmas = self._spaced_sigmas(kind, sigmas, steps)
            timesteps = sigma_to_timestep(sigmas, np.log(self.train_sigmas))
        # Each level but the first is the end of one step and the beginning of the next.
        self.timesteps = np.repeat(timesteps, 2)[1:].astype(np.float32)
        self.sigmas = np.append(np.repeat(sigmas, 2)[1:], 0.0).astype(np.float32)

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """See `Scheduler.step`; no noise is drawn. Every second call corrects the step of the one before."""
        index = self._current_index(timestep)
        sigma = float(self.sigmas[index])
        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0 = self._denoised(model_output, sample, sigma)
        if self.config.clip_sample:
            x0 = mx.clip(x0, -self.config.clip_sample_range, self.config.clip_sample_range)
        slope = (sample - x0) / sigma
        if self._anchor is None:
            self._anchor, self._slope = sample, slope
            x = sample + (float(self.sigmas[index + 1]) - sigma) * slope
        else:
            x = self._anchor + (sigma - float(self.sigmas[index - 1])) * (self._slope + slope) / 2
            self._anchor = self._slope = None
        self._step_index = index + 1
        return output(x, x0, dtype)
