"""Base of the samplers for distilled models, LCM and TCD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from .base import Scheduler


class DistilledScheduler(Scheduler):
    """Base of schedulers that use some of the timesteps on which a model was distilled.

    The distillation has `original_inference_steps` evenly spaced timesteps. As in diffusers,
    `timestep_spacing` and `steps_offset` have no effect; the config keeps them for other classes.
    """

    custom_schedules: ClassVar[tuple[str, ...]] = ("timesteps",)

    def __init__(self) -> None:
        super().__init__()
        self._check_original(self.config.original_inference_steps)
        self._original: int | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | np.ndarray | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        original_inference_steps: int | None = None,
    ) -> None:
        """See `Scheduler.set_timesteps`; `original_inference_steps` overrides the config's."""
        if original_inference_steps is not None:
            self._check_original(original_inference_steps)
        self._original = original_inference_steps
        super().set_timesteps(num_inference_steps, timesteps=timesteps, sigmas=sigmas)

    def _check_original(self, steps: int) -> None:
        total = self.config.num_train_timesteps
        if not isinstance(steps, int | np.integer) or not 1 <= steps <= total:
            raise ValueError(
                f"original_inference_steps={steps!r} must be from 1 to num_train_timesteps={total}"
            )

    def _distilled_timesteps(self) -> np.ndarray:
        """Return the timesteps of the distillation, falling."""
        config = self.config
        original = config.original_inference_steps if self._original is None else self._original
        return np.arange(original, 0, -1) * (config.num_train_timesteps // original) - 1

    def _lay_out(self, steps: int, timesteps: np.ndarray | None = None) -> None:
        if timesteps is not None:
            self._check_falling(timesteps)
            self.timesteps = timesteps.astype(np.int64)
            return
        distilled = self._distilled_timesteps()
        if steps > len(distilled):
            raise ValueError(
                f"num_inference_steps={steps} is more than the original_inference_steps={len(distilled)} "
                "that the model was distilled on; use fewer"
            )
        self.timesteps = distilled[self._places(steps, len(distilled))]

    def _places(self, steps: int, original: int) -> np.ndarray:
        """Return the indices of the distillation's timesteps to use."""
        return np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)
