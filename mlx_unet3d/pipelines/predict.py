"""The step between a sampler and a network: a prediction for a sample."""

from typing import Protocol

import mlx.core as mx


class Predict(Protocol):
    """A network with its guidance, as `denoise` calls it."""

    dtype: mx.Dtype
    """The one that the network computes in."""

    def __call__(
        self, sample: mx.array, timestep: float, step: int, frames: mx.array | None = None
    ) -> mx.array:
        """Return the guided prediction for a sample (B, ...), both float32, in a step of the run.

        `frames` are those of the clip that the sample holds; None for all.
        """
        ...

    def resumes_at(self, step: int) -> int:
        """Return the last step, `step` at most, at which a run that stopped can go on."""
        ...
