"""Single numbers that callers give: Python's own, NumPy's, or arrays."""

import math
from typing import Any

import mlx.core as mx
import numpy as np


def as_python(value: Any) -> Any:
    """A number of NumPy, or an array without axes, as one of Python's; anything else as it is."""
    arrays = np.generic | np.ndarray | mx.array
    return value.item() if isinstance(value, arrays) and value.ndim == 0 else value


def as_count(name: str, value: Any, least: int = 1, also: str = "") -> int:
    """`value` as an integer of at least `least`; `also` ends the rule in the message of the ValueError."""
    number = as_python(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}{also}")
    return number


def as_finite(what: str, value: Any) -> float:
    """`value`, which may be an array of one element, as a float; ValueError unless it is a finite number.

    `what` begins the message.
    """
    number = value.item() if getattr(value, "size", 0) == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{what} is {value!r}; it must be a finite number")
    return float(number)
