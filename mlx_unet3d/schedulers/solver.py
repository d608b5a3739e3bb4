"""Base of the multistep exponential integrators: DPM-Solver, DEIS and UniPC."""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import numpy as np

from .sigma import SigmaScheduler, alpha_sigma
from .tables import sigma_to_timestep, solver_timesteps


class MultistepScheduler(SigmaScheduler):
    """Base of the multistep solvers: schedule, kept outputs and refused arguments."""

    substitutes: ClassVar[dict[str, dict[str, str]]] = {}
    """Values in other solvers' configs, with their substitutes here."""

    def __init__(self) -> None:
        for name, values in self.substitutes.items():
            value = self.config[name]
            if value in values:
                self.config = self.config.replaced(**{name: values[value]})
        super().__init__()
        if self.config.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order={self.config.solver_order!r} must be 1, 2 or 3")
        self._check_choice("final_sigmas_type", ("zero", "sigma_min"))
        flow = "flow matching is for other models than these"
        self._refuse("use_flow_sigmas", False, flow)
        self._refuse("flow_shift", 1.0, flow)
        self._refuse("use_dynamic_shifting", False, flow)
        self._refuse("time_shift_type", "exponential", flow)
        self._reset()

    def _reset(self) -> None:
        self._outputs: list[mx.array] = []  # converted model outputs, newest first
        self._levels: list[float] = []  # the sigma of each

    def _keep(self, model_output: mx.array, index: int) -> None:
        """Keep a converted model output made at `sigmas[index]`.

        It replaces an output of the same sigma, because two outputs at one point define no slope.
        """
        sigma = float(self.sigmas[index])
        same = int(self._levels[:1] == [sigma])
        self._outputs = [model_output, *self._outputs[same:]][: self.config.solver_order]
        self._levels = [sigma, *self._levels[same:]][: self.config.solver_order]

    def _usable_timesteps(self) -> int:
        return self.config.num_train_timesteps

    def _lay_out(self, steps: int, timesteps: np.ndarray | None = None) -> None:
        config = self.config
        kind = self.sigma_kind()
        if kind is None:
            if timesteps is None:
                timesteps = solver_timesteps(
                    config.timestep_spacing,
                    steps,
                    config.num_train_timesteps,
                    config.steps_offset,
                    self._usable_timesteps(),
                )
            timesteps = timesteps.astype(np.int64)
            sigmas = np.interp(timesteps, np.arange(len(self.train_sigmas)), self.train_sigmas)
        else:
            sigmas = self._spaced_sigmas(kind, self.train_sigmas[::-1], steps)
            timesteps = sigma_to_timestep(sigmas, np.log(self.train_sigmas))
            if self._rounds(kind):
                timesteps = timesteps.round()
        self.timesteps = timesteps.astype(np.int64)  # truncates unrounded values, as diffusers does
        self.sigmas = np.append(sigmas, self._final_sigma(sigmas)).astype(np.float32)

    def _rounds(self, kind: str) -> bool:
        return kind in ("karras", "lu") and self.config.beta_schedule != "squaredcos_cap_v2"

    def _converted(self, model_output: mx.array, sample: mx.array, index: int) -> tuple[mx.array, mx.array]:
        """Return (x0, epsilon) of a model output, after thresholding."""
        alpha, sigma = alpha_sigma(float(self.sigmas[index]))
        x0, epsilon = self._x0_and_epsilon(model_output, sample, alpha, sigma)
        if self.config.thresholding:
            x0 = self._threshold(x0)
            epsilon = (sample - alpha * x0) / sigma
        return x0, epsilon
