"""UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .sigma import alpha_sigma, half_log_snr
from .solver import MultistepScheduler

if TYPE_CHECKING:
    from ..noise import NoiseSource


class UniPCMultistepScheduler(MultistepScheduler):
    """Unified predictor-corrector, B(h) version (Zhao et al. 2023, arXiv:2302.04867).

    Equals diffusers' UniPCMultistepScheduler, except that flow matching and another predictor (`solver_p`)
    are refused. `disable_corrector` lists steps without a corrector. `sigma_min` and `sigma_max` are the ends
    of the karras, exponential and beta spacings; None takes those of training.
    """

    substitutes: ClassVar[dict[str, dict[str, str]]] = {
        "solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"},
    }

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        super().__init__()
        self._check_choice("solver_type", ("bh1", "bh2"))
        self._refuse("solver_p", None, "the predictor is UniP itself")
        self._refuse("shift_terminal", None, "flow matching is for other models than these")
        if not predict_x0 and thresholding:
            raise ValueError("thresholding=True works on the clean sample; use predict_x0=True")
        if final_sigmas_type == "zero" and not predict_x0:
            raise ValueError(
                "predict_x0=False cannot go down to final_sigmas_type='zero', where the noise is "
                "undefined; use final_sigmas_type='sigma_min' or predict_x0=True"
            )
        if final_sigmas_type == "zero" and not lower_order_final and solver_order > 1:
            raise ValueError(
                "lower_order_final=False needs final_sigmas_type='sigma_min': the step to sigma 0 "
                "is infinite in log-SNR and can only be of first order"
            )

    def _reset(self) -> None:
        super()._reset()
        self._last_sample: mx.array | None = None
        self._last_order = 1

    def _final_sigma(self, sigmas: np.ndarray) -> float:
        # The karras, exponential and beta spacings already end at the smallest sigma; diffusers repeats it.
        if self.sigma_kind() is not None and self.config.final_sigmas_type == "sigma_min":
            return float(sigmas[-1])
        return super()._final_sigma(sigmas)

    def _rounds(self, kind: str) -> bool:
        return kind == "karras"

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """See `Scheduler.step`; no noise is drawn."""
        config = self.config
        index = self._current_index(timestep)
        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0, epsilon = self._converted(model_output, sample, index)
        newest = x0 if config.predict_x0 else epsilon
        if self._last_sample is not None and index - 1 not in config.disable_corrector:
            sample = self._update(self._last_sample, index, self._last_order, newest)

        self._keep(newest, index)
        order = len(self._outputs)
        if config.lower_order_final:
            order = min(order, len(self.timesteps) - index)
        self._last_sample, self._last_order = sample, order
        x = self._update(sample, index + 1, order)
        self._step_index = index + 1
        return output(x, x0, dtype)

    def _update(self, x: mx.array, target: int, order: int, corrector: mx.array | None = None) -> mx.array:
        """Step from `sigmas[target - 1]` to `sigmas[target]`: UniP, or UniC with the output at the target."""
        alpha, sigma = alpha_sigma(float(self.sigmas[target]))
        alpha_now, sigma_now = alpha_sigma(float(self.sigmas[target - 1]))
        now = half_log_snr(float(self.sigmas[target - 1]))
        h = half_log_snr(float(self.sigmas[target])) - now
        if h == 0:  # a timestep that occurs twice, or the smallest sigma
            return x
        if self.config.predict_x0:
            ratio, scale, g = sigma / sigma_now, alpha, -h
        else:
            ratio, scale, g = alpha / alpha_now, sigma, h

        # Positions of the older outputs, in steps h from the current one, and their differences.
        places = [(half_log_snr(sigma) - now) / h for sigma in self._levels[1:order]]
        newest = self._outputs[0]
        terms = [(self._outputs[k + 1] - newest) / place for k, place in enumerate(places)]
        if corrector is not None:
            places, terms = [*places, 1.0], [*terms, corrector - newest]
        x = ratio * x - scale * math.expm1(g) * newest
        if terms:
            step = g if self.config.solver_type == "bh1" else math.expm1(g)
            weights = _weights(places, g, step)
            x = x - scale * step * sum(w * term for w, term in zip(weights, terms, strict=True))
        return x


def _weights(places: Sequence[float], g: float, step: float) -> list[float]:
    """Return the weights that make a B(h) step exact for polynomials (eq. 8): Σ_k weight_k place_k^i =
    b_i."""
    if len(places) == 1:  # the paper's choice, which preserves the order
        return [0.5]
    phi, factorial, b = math.expm1(g) / g - 1, 1, []
    for i in range(1, len(places) + 1):
        b.append(phi * factorial / step)
        factorial *= i + 1
        phi = phi / g - 1 / factorial
    powers = np.vander(places, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, b)]
