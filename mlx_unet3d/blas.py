"""Loads OpenBLAS on Linux before MLX binds its matrix product.

MLX's Linux wheel is linked against the reference BLAS, which is 20 to 30 times slower in fp32. A copy
of OpenBLAS that is loaded with global symbols before `mlx.core` takes its place. macOS (Accelerate,
Metal) is left alone.
"""

import ctypes
import sys
import warnings

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")

loaded: str | None = None
"""Name of the OpenBLAS library that MLX uses through this package, or None."""


def preload() -> str | None:
    """Load OpenBLAS globally; returns its name, or None where there is none, or none is needed.

    Warns where it would help but MLX was imported first and has bound the slow one already.
    """
    global loaded
    if loaded or not sys.platform.startswith("linux"):
        return loaded
    late = "mlx.core" in sys.modules
    if late and _has_gpu():
        return None
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if late:
            warnings.warn(
                f"mlx.core was imported before mlx_unet3d, too early for {name}: matrix products on the "
                "CPU will be 20 times slower; import mlx_unet3d first",
                stacklevel=3,
            )
            return None
        loaded = name
        break
    return loaded


def advice() -> str | None:
    """One line for a Linux user without a GPU and without OpenBLAS; None where nothing is to be said."""
    if loaded or not sys.platform.startswith("linux") or _has_gpu():
        return None
    return "without OpenBLAS the CPU is 20 times slower: apt-get install libopenblas0-pthread"


def _has_gpu() -> bool:
    import mlx.core as mx

    return mx.is_available(mx.gpu)
