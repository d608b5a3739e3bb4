"""Euler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .sigma import SigmaScheduler
from .tables import sigma_to_timestep, spaced_timesteps

if TYPE_CHECKING:
    from ..noise import NoiseSource


class EulerLadder(SigmaScheduler):
    """Base of the variance-exploding schedulers, whose samples are x0 + sigma * epsilon."""

    @property
    def init_noise_sigma(self) -> float:
        top = float(self.sigmas.max())
        spacing = self.config.timestep_spacing
        return top if spacing in ("linspace", "trailing") else math.sqrt(top**2 + 1)

    def _spaced_timesteps(self, steps: int) -> np.ndarray:
        config = self.config
        return spaced_timesteps(
            config.timestep_spacing,
            steps,
            config.num_train_timesteps,
            config.steps_offset,
            rounded=False,
        ).astype(np.float32)

    def _interpolated_sigmas(self, timesteps: np.ndarray) -> np.ndarray:
        return np.interp(timesteps, np.arange(len(self.train_sigmas)), self.train_sigmas)

    def scale_model_input(self, sample: mx.array, timestep: Timestep) -> mx.array:
        """Return the sample at unit variance, divided by √(sigma² + 1)."""
        sigma = float(self.sigmas[self._current_index(timestep)])
        return (sample.astype(mx.float32) / math.sqrt(sigma**2 + 1)).astype(sample.dtype)

    def _denoised(self, model_output: mx.array, sample: mx.array, sigma: float) -> mx.array:
        """Return the clean sample predicted by a model output."""
        if self.config.prediction_type == "epsilon":
            return sample - sigma * model_output
        if self.config.prediction_type == "v_prediction":
            return (sample - sigma * math.sqrt(sigma**2 + 1) * model_output) / (sigma**2 + 1)
        return model_output

    def _noise_levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sigmas = self._sigmas_at(timesteps)
        return np.ones_like(sigmas), sigmas


def euler_step(sample: mx.array, x0: mx.array, ratio: float) -> mx.array:
    """Return the sample with `ratio` times its noise, on the straight line to the clean sample.

    Equals sample + (sigma_next - sigma) * (sample - x0) / sigma, without a difference of large numbers.
    """
    return ratio * sample + (1 - ratio) * x0


class EulerDiscreteScheduler(EulerLadder):
    """Euler's method for the probability flow, with churn (Karras et al. 2022, arXiv:2206.00364,
    alg. 2).

    Equals diffusers' EulerDiscreteScheduler. `sigma_min` and `sigma_max` are the ends of the karras,
    exponential and beta spacings; None takes those of the schedule.
    """

    custom_schedules: ClassVar[tuple[str, ...]] = ("timesteps", "sigmas")
    prediction_types: ClassVar[tuple[str, ...]] = (
        "epsilon",
        "sample",
        "v_prediction",
        "original_sample",
    )

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        super().__init__()
        self._check_choice("interpolation_type", ("linear", "log_linear"))
        self._check_choice("timestep_type", ("discrete", "continuous"))
        self._check_choice("final_sigmas_type", ("zero", "sigma_min"))

    def _lay_out(
        self, steps: int, timesteps: np.ndarray | None = None, sigmas: np.ndarray | None = None
    ) -> None:
        config = self.config
        continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
        if timesteps is not None and continuous:
            raise ValueError(
                "timesteps cannot be given where timestep_type='continuous' has the network take the "
                "logarithm of sigma; give sigmas, or num_inference_steps"
            )
        if sigmas is not None:
            self._set_sigmas(sigmas, sigma_to_timestep(sigmas[:-1], np.log(self.train_sigmas)), continuous)
            return
        timesteps = self._spaced_timesteps(steps) if timesteps is None else timesteps.astype(np.float32)
        if config.interpolation_type == "linear":
            sigmas = self._interpolated_sigmas(timesteps)
        else:  # one more than steps: the last step then ends at the smallest sigma of training
            ends = np.log(self.train_sigmas[[-1, 0]].astype(np.float64))
            sigmas = np.exp(np.linspace(*ends, steps + 1))
        kind = self.sigma_kind()
        if kind is not None:
            sigmas = self._spaced_sigmas(kind, sigmas, steps)
            timesteps = sigma_to_timestep(sigmas, np.log(self.train_sigmas))
        self._set_sigmas(np.append(sigmas, self._final_sigma(sigmas)), timesteps, continuous)

    def _set_sigmas(self, sigmas: np.ndarray, timesteps: np.ndarray, continuous: bool) -> None:
        self.sigmas = sigmas.astype(np.float32)
        self.timesteps = (0.25 * np.log(sigmas[:-1]) if continuous else timesteps).astype(np.float32)

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> SchedulerOutput:
        """See `Scheduler.step`.

        Args:
            s_churn: total amount of noise added before steps; above 0, `noise` is required (drawn only in
                steps within the range).
            s_tmin, s_tmax: the range of sigma in which noise is added.
            s_noise: its standard deviation.
        """
        index = self._current_index(timestep)
        sigma, sigma_next = float(self.sigmas[index]), float(self.sigmas[index + 1])
        gamma = 0.0
        if s_tmin <= sigma <= s_tmax:
            gamma = min(s_churn / (len(self.sigmas) - 1), math.sqrt(2) - 1)
        sigma_hat = sigma * (gamma + 1)

        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        if gamma > 0:
            extra = s_noise * math.sqrt(sigma_hat**2 - sigma**2)
            sample = sample + extra * self._draw(noise, sample.shape)
        # The network saw the sample before the churn; as in diffusers, only epsilon refers to the raised
        # level.
        level = sigma_hat if self.config.prediction_type == "epsilon" else sigma
        x0 = self._denoised(model_output, sample, level)
        x = euler_step(sample, x0, sigma_next / sigma_hat)
        self._step_index = index + 1
        return output(x, x0, dtype)
