"""Imports the package before anything else, so that OpenBLAS is in place where it is installed."""

import os
from collections.abc import Iterator

import mlx_unet3d  # noqa: F401
import mlx.core as mx
import pytest


def pytest_report_header(config: pytest.Config) -> str:
    import importlib.util

    from mlx_unet3d import blas

    torch = "installed" if importlib.util.find_spec("torch") else "absent: parity tests are skipped"
    return f"mlx {mx.__version__} on {mx.default_device()}, BLAS: {blas.loaded}, torch: {torch}"


@pytest.fixture(autouse=True)
def no_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user of this machine prefers changes no test."""
    for name in ("MODEL", "FOLDER", "FORMAT"):
        monkeypatch.delenv(f"MLX_UNET3D_{name}", raising=False)
    monkeypatch.setenv("MLX_UNET3D_CONFIG", os.devnull + ".toml")


@pytest.fixture
def exact_peaks() -> Iterator[None]:
    """The evaluator waits for each piece of work, so that peaks are those of the graph."""
    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)
