"""OpenBLAS in place of the reference BLAS on Linux; nothing anywhere else."""

import subprocess
import sys

import pytest
from mlx_unet3d import blas

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux needs OpenBLAS")
found = pytest.mark.skipif(blas.loaded is None, reason="OpenBLAS is not installed")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@linux
@found
def test_loaded_before_mlx():
    done = run("import mlx_unet3d, mlx_unet3d.blas as b; print(b.loaded, b.advice())")
    assert done.stdout.split() == [blas.loaded, "None"]
    assert not done.stderr


@linux
@found
def test_warns_when_too_late():
    done = run("import mlx.core, mlx_unet3d, mlx_unet3d.blas as b; print(b.loaded)")
    if done.stdout.split() == ["None"]:
        assert "import mlx_unet3d first" in done.stderr


@linux
def test_advice_where_there_is_none(monkeypatch):
    monkeypatch.setattr(blas, "loaded", None)
    monkeypatch.setattr(blas, "_LIBRARIES", ("libnosuch.so",))
    assert blas.preload() is None
    if not blas._has_gpu():
        assert "libopenblas0-pthread" in blas.advice()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(blas, "loaded", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.preload() is None
    assert blas.advice() is None
