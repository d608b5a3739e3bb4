"""PNDM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import numpy as np

from .arrays import SchedulerOutput, Timestep, output, upcast
from .base import Scheduler
from .config import configured
from .tables import spaced_timesteps

if TYPE_CHECKING:
    from ..noise import NoiseSource

# The first timesteps, with three Runge-Kutta steps of four network calls between them.
RUNGE_KUTTA_POINTS = 4

# Adams-Bashforth weights of the newest outputs, newest first (eq. 10 of the paper for four).
MULTISTEP_WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PNDMScheduler(Scheduler):
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778, algorithm
    2).

    Equals diffusers' PNDMScheduler: Runge-Kutta steps first, then linear multistep ones. With
    `skip_prk_steps` (PLMS, used with Stable Diffusion and its video models), the first step is made twice
    instead, so `timesteps` has one entry more than there are steps.
    """

    repeats_timesteps: ClassVar[bool] = True
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()
        self._reset()

    def _lay_out(self, steps: int) -> None:
        config = self.config
        total = config.num_train_timesteps
        spaced = spaced_timesteps(config.timestep_spacing, steps, total, config.steps_offset)
        spaced = spaced.astype(np.int64)
        if config.skip_prk_steps:
            self._runge_kutta = np.array([], dtype=np.int64)
            self.timesteps = np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])
            return
        if steps < RUNGE_KUTTA_POINTS:
            raise ValueError(
                f"num_inference_steps={steps} is too few for the Runge-Kutta steps that PNDM "
                f"begins with; use at least {RUNGE_KUTTA_POINTS}, or skip_prk_steps=True"
            )
        # t, t - half, t - half, t - stride, then the last one again as t of the next step, ...
        half = total // steps // 2
        points = np.stack([spaced[:RUNGE_KUTTA_POINTS] + half, spaced[:RUNGE_KUTTA_POINTS]], axis=1)
        self._runge_kutta = points.reshape(-1)[1:].repeat(2)[1:-1]
        self.timesteps = np.concatenate([self._runge_kutta, spaced[RUNGE_KUTTA_POINTS - 1 :]])

    def _reset(self) -> None:
        self._calls = 0
        self._outputs: list[mx.array] = []  # newest first
        self._slope: mx.array | float = 0.0  # partial sum of Runge-Kutta's weighted mean
        self._anchor: mx.array | None = None  # the sample at the beginning of the current step

    def step(
        self,
        model_output: mx.array,
        timestep: Timestep,
        sample: mx.array,
        *,
        noise: NoiseSource | None = None,
    ) -> SchedulerOutput:
        """See `Scheduler.step`; no noise is drawn."""
        t = self._scheduled(timestep)
        if not self.config.skip_prk_steps and (
            self._calls >= len(self.timesteps) or t != self.timesteps[self._calls]
        ):
            raise ValueError(
                f"timestep {t} is out of turn: PNDM with Runge-Kutta steps goes through all of "
                "timesteps, from the first. Call set_timesteps to begin anew; use "
                "skip_prk_steps=True to begin later."
            )
        dtype = sample.dtype
        model_output, sample = upcast(model_output, sample)
        now = self._alpha_bar(t)
        x0, _ = self._x0_and_epsilon(model_output, sample, math.sqrt(now), math.sqrt(1 - now))
        if self._calls < len(self._runge_kutta):
            x = self._runge_kutta_step(model_output, t, sample)
        else:
            x = self._multistep(model_output, t, sample)
        self._calls += 1
        return output(x, x0, dtype)

    def _runge_kutta_step(self, model_output: mx.array, t: int, sample: mx.array) -> mx.array:
        """Make one of the four calls of a pseudo Runge-Kutta step (eq. 13 of the paper)."""
        half = self.config.num_train_timesteps // self.num_inference_steps // 2
        call = self._calls % 4
        if call == 0:
            self._outputs.insert(0, model_output)
            self._anchor = sample
            self._slope = 0.0
        self._slope = self._slope + (1 / 3 if call in (1, 2) else 1 / 6) * model_output
        slope = self._slope if call == 3 else model_output
        start = int(self._runge_kutta[self._calls - call])
        return self._transfer(self._anchor, slope, start, t if call % 2 else t - half)

    def _multistep(self, model_output: mx.array, t: int, sample: mx.array) -> mx.array:
        """Make a pseudo linear multistep step (eq. 12 of the paper)."""
        stride = self.config.num_train_timesteps // self.num_inference_steps
        if self._calls == 1:  # repeat the first step with the mean of the slopes at its ends
            mean = (model_output + self._outputs[0]) / 2
            anchor, self._anchor = self._anchor, None
            return self._transfer(anchor, mean, t + stride, t)
        self._outputs = [model_output, *self._outputs[:3]]
        if self._calls == 0:
            self._anchor = sample
        weights = MULTISTEP_WEIGHTS.get(len(self._outputs), (1.0,))
        slope = sum(weight * past for weight, past in zip(weights, self._outputs, strict=False))
        return self._transfer(sample, slope, t, t - stride)

    def _transfer(self, sample: mx.array, slope: mx.array, start: int, end: int) -> mx.array:
        """Move from one timestep to another along a model output (eq. 9 of the paper)."""
        now, then = self._alpha_bar(start), self._alpha_bar(end)
        _, epsilon = self._x0_and_epsilon(slope, sample, math.sqrt(now), math.sqrt(1 - now))
        denominator = now * math.sqrt(1 - then) + math.sqrt(now * (1 - now) * then)
        return math.sqrt(then / now) * sample - ((then - now) / denominator) * epsilon
