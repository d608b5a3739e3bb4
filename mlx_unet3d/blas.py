"""Loads OpenBLAS on Linux before MLX binds its matrix product.

MLX's Linux wheel is linked against the reference BLAS, which is 20 to 30 times slower in fp32. A copy
of OpenBLAS that is loaded with global symbols before `mlx.core` takes its place: the system's, or else the
one inside numpy's wheel. The latter has other names and wider integers, so a C compiler, which MLX needs on
a CPU itself, builds a few lines between the two. macOS (Accelerate, Metal) is left alone.
"""

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")

_NAMES_IN_NUMPY = ("scipy_cblas_{}gemm64_", "cblas_{}gemm64_")
"""Of its products, in wheels of numpy 2 and 1."""

_BRIDGE = """
#include <stdint.h>
#define GEMM(OURS, THEIRS, T) \\
    void THEIRS(int, int, int, int64_t, int64_t, int64_t, T, const T *, int64_t, const T *, int64_t, \\
                T, T *, int64_t); \\
    void OURS(int order, int ta, int tb, int m, int n, int k, T alpha, const T *a, int lda, const T *b, \\
              int ldb, T beta, T *c, int ldc) { \\
        THEIRS(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); \\
    }
"""

loaded: str | None = None
"""Name of the OpenBLAS library that MLX uses through this package, or None."""


def preload() -> str | None:
    """Load OpenBLAS globally; returns the file's name, or None where there is none, or none is needed.

    Warns where it would help but MLX was imported first and has bound the slow one already.
    """
    global loaded
    if loaded or not sys.platform.startswith("linux"):
        return loaded
    late = "mlx.core" in sys.modules
    if late and _has_gpu():
        return None
    name = _load_from_system() or _load_from_numpy()
    if name and late:
        warnings.warn(
            f"mlx.core was imported before mlx_unet3d, too early for {name}: matrix products on the "
            "CPU will be 20 times slower; import mlx_unet3d first",
            stacklevel=3,
        )
        return None
    loaded = name
    return loaded


def _load_from_system() -> str | None:
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def _load_from_numpy() -> str | None:
    """The OpenBLAS of numpy's wheel, under MLX's names for it; None where anything is not as expected."""
    numpy = importlib.util.find_spec("numpy")
    if numpy is None or numpy.origin is None:
        return None
    for path in sorted((Path(numpy.origin).parents[1] / "numpy.libs").glob("lib*openblas*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            theirs = next(name for name in _NAMES_IN_NUMPY if hasattr(library, name.format("s")))
            with tempfile.TemporaryDirectory() as folder:
                bridge = f"{folder}/bridge.so"
                products = "".join(
                    f"GEMM(cblas_{letter}gemm, {theirs.format(letter)}, {kind})\n"
                    for letter, kind in (("s", "float"), ("d", "double"))
                )
                subprocess.run(
                    ["cc", "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", bridge],
                    input=_BRIDGE + products,
                    text=True,
                    check=True,
                    capture_output=True,
                )
                ctypes.CDLL(bridge, mode=ctypes.RTLD_GLOBAL)
            return path.name
        except (OSError, StopIteration, subprocess.CalledProcessError):
            continue
    return None


def advice() -> str | None:
    """One line for a Linux user without a GPU and without OpenBLAS; None where nothing is to be said."""
    if loaded or not sys.platform.startswith("linux") or _has_gpu():
        return None
    return (
        "without OpenBLAS the CPU is 20 times slower: apt-get install libopenblas0-pthread, or a C compiler"
    )


def _has_gpu() -> bool:
    import mlx.core as mx

    return mx.is_available(mx.gpu)
