"""How much memory there is, and MLX's own limits."""

import os
import re

import mlx.core as mx

from ..chips import GIB

_SHARE_OF_RAM = 0.8  # on a CPU; MLX's own default limit
_MOST_CACHE = 2 * GIB


def available() -> int:
    """Bytes that MLX should keep to on this machine: the GPU's recommended working set, or on a CPU four
    fifths of the memory."""
    if mx.default_device() == mx.gpu:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if recommended:
            return int(recommended)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _SHARE_OF_RAM)


def parse_memory(text: str) -> float:
    """GiB of a memory size as people write it: "16GB", "16 GiB" and "16" are one.

    ValueError for anything but a number of at least 1, with or without GB or GiB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text.strip().lower())
    if match is None or float(match[1]) < 1:
        raise ValueError(f"memory {text!r} must be a size of at least 1 GB, such as 16GB")
    return float(match[1])


def apply_limits(budget: int) -> None:
    """Make MLX wait, not run ahead, where `budget` bytes are exceeded, and bound what it keeps for reuse.

    Its other users in the process are bound as well.
    """
    mx.set_memory_limit(budget)
    mx.set_cache_limit(min(_MOST_CACHE, budget // 4))
