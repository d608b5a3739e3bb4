"""Loads OpenBLAS on Linux before MLX does its first matrix product.

MLX's Linux wheel is linked against the reference BLAS, which is 20 to 30 times slower in fp32. A copy
of OpenBLAS that is loaded with global symbols before `mlx.core` takes its place. macOS (Accelerate,
Metal) is left alone, and so is a process in which MLX was imported first.
"""

import ctypes
import ctypes.util
import sys

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0", "libopenblas64_.so.0")
_advice = "install OpenBLAS (apt-get install libopenblas0-pthread): MLX on the CPU is 20 times faster"

loaded: str | None = None
"""Name of the OpenBLAS library in use, or None."""


def preload() -> str | None:
    """Load OpenBLAS globally; returns its name, or None where there is none or none is needed."""
    global loaded
    if loaded or not sys.platform.startswith("linux"):
        return loaded
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        loaded = name
        break
    return loaded


def advice() -> str | None:
    """One line for a Linux user without a GPU and without OpenBLAS; None where nothing is to be said."""
    if loaded or not sys.platform.startswith("linux"):
        return None
    import mlx.core as mx

    return None if mx.is_available(mx.gpu) else _advice
