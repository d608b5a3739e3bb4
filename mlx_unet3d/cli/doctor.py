"""mlx-unet3d doctor: the machine, the libraries, the encoders, and a numeric self-test."""

import argparse
import os
import platform
import sys
import time

import mlx.core as mx

from .. import __version__, blas, media
from ..selftest import run_self_test


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="report the machine and test its arithmetic",
        description="Print what a bug report needs, and test the arithmetic of this machine in a second.",
        usage="",
        examples=("mlx-unet3d doctor",),
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name, value in facts().items():
        print(f"{name + ':':<16}{value}")
    print("self-test:")
    checks = run_self_test()
    for check in checks:
        verdict = "ok" if check.passed else "WRONG"
        print(f"  {verdict:<6}{check.name + ', ' + check.dtype:<46}error {check.error:.1e}")
    if all(check.passed for check in checks):
        return 0
    print(
        "the arithmetic of this machine is off: update MLX, or report this at "
        "https://github.com/ml-explore/mlx/issues",
        file=sys.stderr,
    )
    return 1


def facts() -> dict[str, str]:
    """Return facts by name, ready to paste into an issue."""
    device = mx.device_info()
    memory = device.get("memory_size") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    found = {
        "mlx-unet3d": __version__,
        "MLX": f"{mx.__version__} on {mx.default_device()}",
        "chip": str(device.get("device_name") or platform.processor() or platform.machine()),
        "memory": f"{memory / 2**30:.1f} GiB",
        "system": system,
        "Python": platform.python_version(),
    }
    working_set = device.get("max_recommended_working_set_size")
    if working_set:
        found["GPU working set"] = f"{working_set / 2**30:.1f} GiB recommended"
        found["largest buffer"] = f"{device['max_buffer_length'] / 2**30:.1f} GiB"
    if sys.platform.startswith("linux"):
        found["BLAS"] = blas.loaded or blas.advice() or "not needed"
    found["fp32 matmul"] = f"{matmul_rate(mx.float32):.0f} GFLOP/s"
    if mx.default_device() == mx.gpu:
        found["fp16 matmul"] = f"{matmul_rate(mx.float16):.0f} GFLOP/s"
    for name, value in media.encoders().items():
        found[name] = value or "nothing here writes it"
    return found


def matmul_rate(dtype: mx.Dtype, size: int = 1024) -> float:
    """Return the GFLOP/s of a square matrix product."""
    a = mx.random.normal((size, size)).astype(dtype)
    mx.eval(a, a @ a)
    repeats, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1:
        mx.eval(a @ a)
        repeats += 1
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e9
