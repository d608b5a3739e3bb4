"""Check that MLX runs here: on Linux its package comes without a backend, chosen at installation."""

import functools
import sys


@functools.cache
def missing_backend() -> str | None:
    """One sentence with the cure where `mlx.core` cannot be imported; None where it can."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        reason = str(error).split("\n")[0]
        linux = sys.platform.startswith("linux")
        cure = 'pip install "mlx[cpu]", or "mlx[cuda]" for a GPU' if linux else "pip install --upgrade mlx"
        return f"MLX cannot be loaded ({reason}); {cure}"
    return None
