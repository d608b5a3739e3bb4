"""The emulation of Metal's Winograd: exact in float32, and rounded as is known of it in half precision."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_unet3d import UNet3DConditionModel
from mlx_unet3d.layers.convolution import Conv2d

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "winograd.py"


@pytest.fixture(scope="module")
def emulation():
    spec = importlib.util.spec_from_file_location("winograd", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_error_by_stored_dtype(emulation):
    """0.7 % and 6 % rms in float16 and bfloat16, as simulated of MLX's kernels for white noise."""
    x = mx.random.normal((2, 20, 15, 64), key=mx.random.key(0))
    weight = mx.random.normal((32, 3, 3, 64), key=mx.random.key(1))
    exact = mx.conv2d(x, weight, padding=1)

    def error(dtype):
        difference = emulation.winograd(x, weight, dtype) - exact
        return mx.sqrt(mx.square(difference).mean() / mx.square(exact).mean()).item()

    assert error(mx.float32) < 1e-5
    assert 4e-3 < error(mx.float16) < 1.2e-2
    assert 3e-2 < error(mx.bfloat16) < 1e-1


def test_emulated_layers(emulation):
    layer = Conv2d(128, 128, 3, padding=1)
    x = mx.random.normal((1, 64, 64, 128))
    exact = layer(x)
    with emulation.emulated(mx.float16, emulation.METAL) as count:
        assert 0 < mx.abs(layer(x) - exact).max().item() < 0.1
        layer(x[:, :63])  # too few pixels
        Conv2d(128, 128, 3, stride=2, padding=1)(x)
    assert count == [64 * 64]
    assert mx.array_equal(layer(x), exact)


def test_signal_to_noise(emulation, tmp_path):
    UNet3DConditionModel(**{**tiny.UNET, "block_out_channels": (32, 64)}).save_pretrained(tmp_path)
    lines = list(emulation.signal_to_noise(tmp_path, (1, 2, 8, 8), "float16", 1))
    counts = [int(line.split(", ")[2].split()[0]) for line in lines if line.endswith(" dB")]
    assert counts[0] == sum(counts[1:]) > 0
    assert [line.split(", ")[1].split(":")[0] for line in lines] == [
        "all",
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]


def test_verdicts(emulation):
    lines = list(emulation.demo(1, ["bfloat16"], 2))
    kinds = [line.split(" | ")[0] for line in lines]
    assert kinds[2:] == ["| exact", "| UNet in bfloat16", "| UNet and VAE in bfloat16"]
    assert all(line.endswith(" dB |") for line in lines[3:])
