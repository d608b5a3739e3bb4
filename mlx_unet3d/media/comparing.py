"""Two clips held against each other: PSNR and SSIM a frame, a video of both, and a plot of the numbers."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .frames import Frames, check_frames

WINDOW, SIGMA = 11, 1.5  # of the paper's Gaussian
_K1, _K2 = 0.01, 0.03
MODES = ("side", "difference", "flicker")
_GAP = 4  # pixels between two clips side by side


def psnr(a: Frames, b: Frames) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each frame in dB, over all pixels and channels.

    Args:
        a, b: uint8 frames (F, H, W, 3).

    Returns float64 (F,), infinite for equal frames. Raises TypeError or ValueError as `check_pair`.
    """
    check_pair(a, b)
    errors = [((x.astype(np.float64) - y) ** 2).mean() for x, y in zip(a, b, strict=True)]
    return np.array([math.inf if error == 0 else 10 * math.log10(255**2 / error) for error in errors])


def ssim(a: Frames, b: Frames) -> NDArray[np.float64]:
    """Return the structural similarity of each frame, 1 for equal ones.

    As Wang et al. 2004 ("Image quality assessment: from error visibility to structural similarity"): a
    Gaussian window of 11x11 with a standard deviation of 1.5, at the places where it lies inside of the
    frame, K1 = 0.01, K2 = 0.03; the mean over places and over red, green and blue.

    Args:
        a, b: uint8 frames (F, H, W, 3) of at least 11x11 pixels.

    Returns float64 (F,). Raises TypeError or ValueError as `check_pair`, and for smaller frames.
    """
    check_pair(a, b)
    height, width = a.shape[1:3]
    if min(height, width) < WINDOW:
        raise ValueError(
            f"frames of {width}x{height} are too small for SSIM; give at least {WINDOW}x{WINDOW}"
        )
    return np.array([_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)])


def _ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(H, W, 3) -> (H - 10, W - 10, 3)."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        length = x.shape[axis] - WINDOW + 1
        x = sum(tap * x.take(range(i, i + length), axis) for i, tap in enumerate(taps))
    return x


def check_pair(a: Frames, b: Frames, names: Sequence[str] = ("a", "b")) -> None:
    """Raise TypeError or ValueError unless both are frames, of one size and number."""
    for frames in (a, b):
        check_frames(frames)
    if a.shape != b.shape:
        first, second = (
            f"{name} has {count} frames of {width}x{height} pixels"
            for name, (count, height, width, _) in zip(names, (a.shape, b.shape), strict=True)
        )
        sizes = a.shape[1:3] != b.shape[1:3]
        cure = (
            "write both with one --height, --width and --scale"
            if sizes
            else f"compare the first {min(len(a), len(b))} with --num-frames"
        )
        raise ValueError(f"{first}, {second}; {cure}")


def compared(a: Frames, b: Frames, mode: str = "side", gain: float = 4.0) -> Frames:
    """Return a clip that shows two.

    Args:
        a, b: uint8 frames (F, H, W, 3).
        mode: "side", both beside each other; "difference", the absolute difference times `gain`; "flicker",
            each frame of `a` followed by that of `b`, to be shown at twice the rate.
        gain: of a difference, above 0.

    Returns uint8 frames. Raises TypeError or ValueError as `check_pair`, and for an unknown mode.
    """
    check_pair(a, b)
    if mode == "side":
        gap = np.full((*a.shape[:2], _GAP, 3), 128, np.uint8)
        return np.concatenate([a, gap, b], axis=2)
    if mode == "difference":
        return np.stack(
            [
                np.rint(np.minimum(abs(x.astype(np.float32) - y) * gain, 255)).astype(np.uint8)
                for x, y in zip(a, b, strict=True)
            ]
        )
    if mode == "flicker":
        return np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
    raise ValueError(f"mode={mode!r} is none of {', '.join(MODES)}")


def plot(decibels: Sequence[float], similarities: Sequence[float]) -> str:
    """Return an SVG of PSNR and SSIM over the frames; frames without a difference stand at the upper edge."""
    panels = [
        _panel(0, "PSNR, dB", decibels, "#1f6fb4"),
        _panel(1, "SSIM", similarities, "#b4471f"),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="480" height="300" viewBox="0 0 480 300" '
        'font-family="sans-serif" font-size="11">\n<rect width="480" height="300" fill="white"/>\n'
        + "".join(panels)
        + f'<text x="265" y="295" text-anchor="middle">frame, 0 to {len(decibels) - 1}</text>\n</svg>\n'
    )


def _panel(number: int, title: str, values: Sequence[float], colour: str) -> str:
    left, right, top, bottom = 60, 470, 22 + 138 * number, 128 + 138 * number
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
    step = (right - left) / max(len(values) - 1, 1)

    def height(value: float) -> float:
        return top if value == math.inf else bottom - (value - low) / (high - low) * (bottom - top)

    points = " ".join(f"{left + i * step:.1f},{height(value):.1f}" for i, value in enumerate(values))
    dots = "".join(
        f'<circle cx="{left + i * step:.1f}" cy="{height(value):.1f}" r="2" fill="{colour}"/>'
        for i, value in enumerate(values)
    )
    return (
        f'<text x="{left}" y="{top - 8}">{title}</text>\n'
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#999"/>\n'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{high:.4g}</text>\n'
        f'<text x="{left - 6}" y="{bottom + 4}" text-anchor="end">{low:.4g}</text>\n'
        f'<polyline points="{points}" fill="none" stroke="{colour}"/>{dots}\n'
    )
