"""Base of the schedulers that step through falling noise levels sigma."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from .base import Scheduler
from .tables import spaced_sigmas

SIGMA_KINDS = ("karras", "exponential", "beta", "lu")


class SigmaScheduler(Scheduler):
    """Base of schedulers whose steps go from `sigmas[i]` to `sigmas[i + 1]`, with sigma = √((1 - ᾱ) / ᾱ).

    Attributes:
        sigmas: (n + 1,) float32, falling; the last one is where the last step ends.
        train_sigmas: (T,) float32, one for each training timestep, rising.
    """

    repeats_timesteps: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        if self.config.get("rescale_betas_zero_snr", False):
            # Not 0 but the smallest number of float16, so that the first sigma stays finite.
            self.alphas_cumprod[-1] = 2**-24
        self.train_sigmas = np.sqrt((np.float32(1) - self.alphas_cumprod) / self.alphas_cumprod)
        self.sigmas = np.append(self.train_sigmas[::-1], np.float32(0))
        self.sigma_kind()

    def sigma_kind(self) -> str | None:
        """Return the kind of sigma spacing in the config: "karras", ..., or None for that of the
        timesteps."""
        names = {"lu": "use_lu_lambdas"}
        asked = [
            kind for kind in SIGMA_KINDS if self.config.get(names.get(kind, f"use_{kind}_sigmas"), False)
        ]
        if len(asked) > 1:
            raise ValueError(
                f"{type(self).__name__} was asked for {' and '.join(asked)} sigmas at once; set "
                "one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas"
            )
        return asked[0] if asked else None

    def _spaced_sigmas(self, kind: str, ends: np.ndarray, steps: int) -> np.ndarray:
        """Return sigmas of a kind between the ends of a schedule, or the config's sigma_max and sigma_min."""
        first, last = self.config.get("sigma_max"), self.config.get("sigma_min")
        first = float(ends[0]) if first is None else first
        last = float(ends[-1]) if last is None else last
        return spaced_sigmas(kind, first, last, steps)

    def _check_range(self) -> None:
        """Accept all timesteps: steps depend on `sigmas`, which lie within the tables."""

    def _final_sigma(self, sigmas: np.ndarray) -> float:
        """Return the sigma at which the last step ends, given where the steps begin."""
        return 0.0 if self.config.final_sigmas_type == "zero" else float(self.train_sigmas[0])

    def _noise_levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sigmas = self._sigmas_at(timesteps)
        alphas = 1 / np.sqrt(sigmas**2 + 1)
        return alphas, sigmas * alphas

    def _sigmas_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the sigmas for `add_noise`: at the current or first step of sampling, or else those of the
        timesteps."""
        self._require_schedule()
        if self._begin_index is None:
            places = [self.index_for_timestep(timestep) for timestep in timesteps]
        elif self._step_index is not None:
            places = [self._step_index] * len(timesteps)
        else:
            places = [self._begin_index] * len(timesteps)
        return self.sigmas[places].astype(np.float64)


def alpha_sigma(sigma: float) -> tuple[float, float]:
    """Return (alpha, sigma) of the variance-preserving sample with signal-to-noise ratio 1 / sigma²."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha


def half_log_snr(sigma: float) -> float:
    """Return lambda = log(alpha / sigma) of the DPM-Solver papers; infinite for sigma 0."""
    return -math.log(sigma) if sigma > 0 else math.inf
