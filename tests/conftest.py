"""Imports the package before anything else, so that OpenBLAS is in place where it is installed."""

import os
from collections.abc import Iterator

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # they share the cores; OpenBLAS and torch read this where they are loaded, in children too
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, str(max(CORES // WORKERS, 1)))

import mlx_unet3d  # noqa: E402, F401
import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: one a core, each with 2 GB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min(CORES, memory // 2_000_000_000), 1)


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
