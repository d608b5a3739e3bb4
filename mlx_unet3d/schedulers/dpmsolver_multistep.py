"""DPM-Solver and DPM-Solver++, multistep, and their stochastic variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .config import configured
from .sigma import alpha_sigma, half_log_snr
from .solver import MultistepScheduler

if TYPE_CHECKING:
    from ..noise import NoiseSource

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
FEW_STEPS = 15  # for fewer steps, lower_order_final lowers the order of the last ones


class DPMSolverMultistepScheduler(MultistepScheduler):
    """DPM-Solver (Lu et al. 2022, arXiv:2206.00927) and DPM-Solver++ (arXiv:2211.01095), multistep.

    Equals diffusers' DPMSolverMultistepScheduler, except that flow matching and learned variances are
    refused. `algorithm_type` "dpmsolver++" solves for the clean sample, "dpmsolver" for the noise; "sde-"
    solves the reverse stochastic equation. As in diffusers, "deis" stands for "dpmsolver++", and the solver
    types of other solvers for "midpoint", so that their configs can be used.
    """

    custom_schedules: ClassVar[tuple[str, ...]] = ("timesteps",)
    substitutes: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
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
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        super().__init__()
        self._check_choice("algorithm_type", ALGORITHMS)
        self._check_choice("solver_type", ("midpoint", "heun"))
        if self.config.variance_type in ("learned", "learned_range"):
            self._refuse("variance_type", None, "the solver has no use for a learned variance")
        if not self._predicts_x0 and final_sigmas_type == "zero":
            raise ValueError(
                f"algorithm_type={algorithm_type!r} cannot go down to final_sigmas_type='zero', "
                "where the noise is undefined; use final_sigmas_type='sigma_min' or "
                "algorithm_type='dpmsolver++'"
            )
        if algorithm_type == "sde-dpmsolver" and solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no solver_order=3; use solver_order=2")

    @property
    def uses_noise(self) -> bool:
        """True for the "sde-" algorithms, which draw noise in each step, even the last."""
        return self._stochastic

    @property
    def _predicts_x0(self) -> bool:
        return self.config.algorithm_type.endswith("++")

    @property
    def _stochastic(self) -> bool:
        return self.config.algorithm_type.startswith("sde-")

    def _usable_timesteps(self) -> int:
        """Return the number of training timesteps with a log-SNR above `lambda_min_clipped`."""
        signal = np.sqrt(self.alphas_cumprod)
        log_snr = np.log(signal) - np.log(np.sqrt(np.float32(1) - self.alphas_cumprod))
        clipped = np.searchsorted(log_snr[::-1], self.config.lambda_min_clipped)
        return self.config.num_train_timesteps - int(clipped)

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
        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        drawn = self._draw(noise, sample.shape) if self._stochastic else None
        x0, epsilon = self._converted(model_output, sample, index)
        newest = x0 if self._predicts_x0 else epsilon
        self._keep(newest, index)
        x = self._update(sample, index, self._order_at(index), drawn)
        self._step_index = index + 1
        return output(x, x0, dtype)

    def _order_at(self, index: int) -> int:
        """Return the order of a step: at most the number of kept outputs, and lower at the end."""
        config = self.config
        left = len(self.timesteps) - index
        ends_low = config.lower_order_final and len(self.timesteps) < FEW_STEPS
        order = len(self._outputs)
        if left == 1 and (ends_low or config.euler_at_final or config.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if left == 2 and ends_low else order

    def _update(self, x: mx.array, index: int, order: int, noise: mx.array | None) -> mx.array:
        """Step from `sigmas[index]` to the next.

        One formula covers the four algorithms: an exponential integrator whose exponent g is the step in
        lambda, with a sign and factor that depend on the algorithm.
        """
        alpha, sigma = alpha_sigma(float(self.sigmas[index + 1]))
        alpha_now, sigma_now = alpha_sigma(float(self.sigmas[index]))
        lambdas = [half_log_snr(sigma) for sigma in (float(self.sigmas[index + 1]), *self._levels)]
        h = lambdas[0] - lambdas[1]
        if h == 0:  # a timestep that occurs twice, or the smallest sigma of training
            return x
        if self._predicts_x0:
            ratio, scale, g = sigma / sigma_now, alpha, -h
        else:
            ratio, scale, g = alpha / alpha_now, sigma, h
        added = sigma * math.sqrt(abs(math.expm1(2 * g))) if self._stochastic else 0.0
        if self._stochastic and self._predicts_x0:
            ratio, g = ratio * math.exp(g), 2 * g
        elif self._stochastic:
            scale = 2 * scale

        growth = math.expm1(g)
        x = ratio * x - scale * growth * self._outputs[0]
        if order > 1:
            slope, curve = self._differences(lambdas, order)
            # growth / g - 1 is about g / 2; "midpoint" approximates it by growth / 2.
            midpoint = order == 2 and self.config.solver_type == "midpoint"
            x = x - scale * (0.5 * growth if midpoint else growth / g - 1) * slope
        if order > 2:
            # The series gives -0.5 for all; diffusers uses 0.5 for "sde-dpmsolver++".
            half = 0.5 if self._stochastic else -0.5
            x = x - scale * ((growth - g) / g**2 + half) * curve
        return x if noise is None else x + added * noise

    def _differences(self, lambdas: list[float], order: int) -> tuple[mx.array, mx.array | None]:
        """Return first and second divided differences of the kept outputs, times h and h²."""
        h = lambdas[0] - lambdas[1]
        r0 = (lambdas[1] - lambdas[2]) / h
        newest = (self._outputs[0] - self._outputs[1]) / r0
        if order == 2:
            return newest, None
        r1 = (lambdas[2] - lambdas[3]) / h
        older = (self._outputs[1] - self._outputs[2]) / r1
        change = (newest - older) / (r0 + r1)
        return newest + r0 * change, change
