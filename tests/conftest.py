"""Imports the package before anything else, so that OpenBLAS is in place where it is installed."""

import mlx_unet3d  # noqa: F401
import pytest


def pytest_report_header(config: pytest.Config) -> str:
    import importlib.util

    import mlx.core as mx
    from mlx_unet3d import blas

    torch = "installed" if importlib.util.find_spec("torch") else "absent: parity tests are skipped"
    return f"mlx {mx.__version__} on {mx.default_device()}, BLAS: {blas.loaded}, torch: {torch}"
