"""DEIS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .dpmsolver_multistep import FEW_STEPS
from .sigma import alpha_sigma
from .solver import MultistepScheduler

if TYPE_CHECKING:
    from ..noise import NoiseSource


class DEISMultistepScheduler(MultistepScheduler):
    """Diffusion exponential integrator sampler, multistep in log rho (Zhang and Chen 2022, arXiv:2204.13902).

    Equals diffusers' DEISMultistepScheduler, except that flow matching is refused. Sampling ends at the
    smallest sigma of training, or of the karras, exponential or beta spacing. As in diffusers, "dpmsolver"
    and "dpmsolver++" stand for "deis", and the solver types of other solvers for "logrho".
    """

    substitutes: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
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
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        super().__init__()
        self._check_choice("algorithm_type", ("deis",))
        self._check_choice("solver_type", ("logrho",))

    def _final_sigma(self, sigmas: np.ndarray) -> float:
        return float(self.train_sigmas[0] if self.sigma_kind() is None else sigmas[-1])

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
        index = self._current_index(timestep)
        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        x0, epsilon = self._converted(model_output, sample, index)
        self._keep(epsilon, index)
        left = len(self.timesteps) - index
        order = len(self._outputs)
        if self.config.lower_order_final and len(self.timesteps) < FEW_STEPS:
            order = min(order, left)
        alpha_now, _ = alpha_sigma(float(self.sigmas[index]))
        alpha, _ = alpha_sigma(float(self.sigmas[index + 1]))
        weights = _weights(self._levels[:order], float(self.sigmas[index + 1]))
        kept = zip(weights, self._outputs, strict=False)
        x = alpha * (sample / alpha_now + sum(weight * past for weight, past in kept))
        self._step_index = index + 1
        return output(x, x0, dtype)


def _weights(rhos: Sequence[float], end: float) -> list[float]:
    """Return the weights of the outputs made at `rhos`, for the step from `rhos[0]` to `end`.

    A polynomial in log rho interpolates the outputs and is integrated over rho (eq. 14 of the paper).
    """
    start, places = rhos[0], np.log(rhos)
    weights = []
    for k, place in enumerate(places):
        others = np.delete(places, k)
        lagrange = np.poly1d(np.poly(others) / np.prod(place - others))
        weights.append(_integral(lagrange, end) - _integral(lagrange, start))
    return weights


def _integral(polynomial: np.poly1d, rho: float) -> float:
    """∫ p(log rho) d rho = rho (p - p' + p'' - ...) at log rho."""
    total, sign = 0.0, 1.0
    for _ in range(polynomial.order + 1):
        total += sign * polynomial(math.log(rho))
        polynomial, sign = polynomial.deriv(), -sign
    return rho * float(total)
