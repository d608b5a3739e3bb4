"""OpenBLAS in place of the reference BLAS on Linux; nothing anywhere else."""

import shutil
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


FROM_NUMPY = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("blas", sys.argv[1])
blas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blas)
blas._LIBRARIES = ()
print(blas.preload())
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
a, b = (mx.array(np.random.default_rng(i).normal(size=(300, 500)).astype(np.float32)) for i in (0, 1))
for ours, theirs in (a @ b.T, np.array(a) @ np.array(b).T), (a.T @ b, np.array(a).T @ np.array(b)):
    assert np.array_equal(ours, theirs)
"""


@linux
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.skipif(blas._has_gpu(), reason="MLX uses the GPU")
def test_that_of_numpy():
    """The products of MLX are to the last bit those of numpy, which the reference BLAS has only nearly."""
    command = [sys.executable, "-c", FROM_NUMPY, blas.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "openblas" in done.stdout


@linux
def test_advice_where_there_is_none(monkeypatch):
    monkeypatch.setattr(blas, "loaded", None)
    monkeypatch.setattr(blas, "_LIBRARIES", ("libnosuch.so",))
    monkeypatch.setattr(blas, "_NAMES_IN_NUMPY", ())
    assert blas.preload() is None
    if not blas._has_gpu():
        assert "libopenblas0-pthread" in blas.advice()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(blas, "loaded", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.preload() is None
    assert blas.advice() is None
