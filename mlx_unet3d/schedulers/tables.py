"""Noise schedules, timestep spacings and sigma spacings that the schedulers share, in NumPy.

diffusers makes its tables in float32. The tables here are rounded to float32 in the same places, because some
integer timesteps depend on that rounding; other computations are float64.
"""

from __future__ import annotations

import math

import numpy as np

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("linspace", "leading", "trailing")


def make_betas(schedule: str, start: float, end: float, steps: int) -> np.ndarray:
    """Return the variances beta_t that the forward process adds, (steps,) float32.

    "linear" is from DDPM (Ho et al. 2020), "scaled_linear" from latent diffusion (Rombach et al. 2022),
    "squaredcos_cap_v2" from improved DDPM (Nichol and Dhariwal 2021), "sigmoid" from GeoDiff (Xu et al.
    2022), and "laplace" from Hang et al. 2024; for "exp", ᾱ decays exponentially.
    """
    if schedule == "linear":
        return np.linspace(start, end, steps).astype(np.float32)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps).astype(np.float32) ** 2
    if schedule == "sigmoid":
        ramp = np.linspace(-6.0, 6.0, steps).astype(np.float32)
        return (1 / (1 + np.exp(-ramp)) * np.float32(end - start) + np.float32(start)).astype(np.float32)
    curves = {"squaredcos_cap_v2": _cosine_alpha_bar, "laplace": _laplace_alpha_bar, "exp": _exp_alpha_bar}
    alpha_bar = curves[schedule]
    level = [alpha_bar(i / steps) for i in range(steps + 1)]
    return np.array([min(1 - level[i + 1] / level[i], 0.999) for i in range(steps)], dtype=np.float32)


def _cosine_alpha_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(t: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _exp_alpha_bar(t: float) -> float:
    return math.exp(-12.0 * t)


def cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    """Return ᾱ_t, the product of (1 - beta) up to t, (T,) float32."""
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Return betas whose last timestep is pure noise (Lin et al. 2023, algorithm 1), (T,) float32."""
    signal = np.sqrt(cumulative_alphas(betas))
    first, last = signal[0], signal[-1]
    signal = (signal - last) * (first / (first - last))
    alphas_cumprod = signal**2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return np.float32(1) - alphas


def spaced_timesteps(
    spacing: str, steps: int, total: int, offset: int, *, rounded: bool = True
) -> np.ndarray:
    """Return `steps` of the `total` training timesteps, falling (Lin et al. 2023, table 2).

    Args:
        spacing: "linspace" (both ends), "leading" (multiples of total // steps, plus `offset`) or "trailing"
            (back from the last one). `offset` has no effect on the others.
        rounded: round "linspace" to integers; otherwise its values are float32.

    Returns:
        (steps,) float64, or float32 for an unrounded "linspace".
    """
    if spacing == "linspace":
        if not rounded:
            return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].copy()
        return np.linspace(0, total - 1, steps).round()[::-1].copy()
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round()[:steps] - 1
    return (np.arange(steps) * (total // steps)).astype(np.float64)[::-1] + offset


def solver_timesteps(
    spacing: str, steps: int, total: int, offset: int, usable: int | None = None
) -> np.ndarray:
    """Return the spacing of the multistep solvers: one point more than steps, without the last.

    Args:
        usable: number of training timesteps to use, out of `total`; None for all.
    """
    usable = total if usable is None else usable
    if spacing == "trailing":
        return np.arange(usable, 0, -total / steps).round()[:steps] - 1
    return spaced_timesteps(spacing, steps + 1, usable, offset)[:-1]


def spaced_sigmas(kind: str, first: float, last: float, steps: int) -> np.ndarray:
    """Return noise levels from `first` down to `last`, (steps,) float64.

    Args:
        kind: "karras" (Karras et al. 2022, eq. 5, rho 7), "exponential" and "lu" (even in log
            sigma; Lu et al. 2022) or "beta" (Lee et al. 2024: quantiles of Beta(0.6, 0.6)).
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        rho = 7.0
        high, low = first ** (1 / rho), last ** (1 / rho)
        return (high + ramp * (low - high)) ** rho
    if kind in ("exponential", "lu"):
        return np.exp(np.linspace(math.log(first), math.log(last), steps))
    return last + np.array([_beta_quantile(q) for q in 1 - ramp]) * (first - last)


def _beta_quantile(q: float, a: float = 0.6) -> float:
    """Return the q-quantile of Beta(a, a), by bisection on the power series of its distribution function."""
    if q > 0.5:
        return 1.0 - _beta_quantile(1.0 - q, a)
    norm = math.gamma(a) ** 2 / math.gamma(2 * a)
    low, high = 0.0, 0.5
    for _ in range(60):
        x = 0.5 * (low + high)
        term, total = 1.0, 1.0 / a
        for n in range(1, 60):  # x <= 0.5, so that the error of 60 terms is 2**-60
            term *= (n - a) / n * x
            total += term / (a + n)
        low, high = (x, high) if x**a * total < q * norm else (low, x)
    return 0.5 * (low + high) if q > 0 else 0.0


def sigma_to_timestep(sigmas: np.ndarray, log_table: np.ndarray) -> np.ndarray:
    """Return fractional training timesteps of noise levels, by interpolation in log sigma.

    Args:
        sigmas: (n,) noise levels.
        log_table: (T,) float32, log sigma of each training timestep, rising.
    """
    if len(log_table) == 1:  # the only timestep
        return np.zeros(len(sigmas))
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    below = np.searchsorted(log_table, log_sigmas, side="right") - 1
    below = below.clip(0, len(log_table) - 2)
    low, high = log_table[below], log_table[below + 1]
    weight = ((low - log_sigmas) / (low - high)).clip(0, 1)
    return (1 - weight) * below + weight * (below + 1)
