"""The forms for MLX's CPU backend: against float64, against MLX's own operations, and their memory."""

import math

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import AutoencoderKL, UNet3DConditionModel, cpu
from mlx.utils import tree_flatten
from mlx_unet3d.layers import activations, convolution
from mlx_unet3d.layers.convolution import Conv2d, TemporalConv
from mlx_unet3d.layers.feed_forward import FeedForward
from mlx_unet3d.layers.normalization import group_norm
from mlx_unet3d.layers.quantized import Quantization, quantized


def both(fn, *arrays):
    """Largest difference between the two routes, relative to the largest value."""
    results = []
    for use in (True, False):
        with cpu.routes(use):
            results.append(np.array(fn(*arrays)))
    ours, plain = results
    assert ours.shape == plain.shape
    return np.abs(ours - plain).max() / np.abs(plain).max()


def peak(use, fn, *arrays):
    """Bytes beside the arguments, with one operation at a time."""
    mx.eval(*arrays)
    mx.synchronize()
    mx.clear_cache()
    limit = mx.set_memory_limit(1)
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with cpu.routes(use):
            mx.eval(fn(*arrays))
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_on_the_cpu_float32_takes_these_forms():
    assert cpu.active(mx.zeros(1)) == (mx.default_device() == mx.Device(mx.cpu))
    assert not cpu.active(mx.zeros(1, mx.float16))
    with cpu.routes(False):
        assert not cpu.active(mx.zeros(1))
        with cpu.routes(True):
            assert cpu.active(mx.zeros(1))
        assert not cpu.active(mx.zeros(1))


@pytest.mark.parametrize(
    ("fn", "exact"),
    [
        (cpu.silu, lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0),
        (cpu.gelu, lambda x: x * math.erfc(-x / math.sqrt(2)) / 2),
    ],
)
def test_activations(fn, exact):
    x = np.concatenate([np.linspace(-30, 30, 20_001), [-1e4, 1e4, 0]]).astype(np.float32)
    expected = np.array([exact(float(v)) for v in x])
    assert (np.abs(np.array(fn(mx.array(x))) - expected) / np.maximum(np.abs(x), 1)).max() < 5e-7
    extremes = np.array(fn(mx.array([math.nan, math.inf])))
    assert np.isnan(extremes[0])
    assert extremes[1] == math.inf
    view = mx.array(x[:20_000].reshape(-1, 2))[:, 1]
    np.testing.assert_array_equal(np.array(fn(view)), np.array(fn(view * 1.0)))


def test_names_of_activations_follow_the_route():
    for name in ("silu", "gelu"):
        assert 0 < both(activations.get_activation(name), normal(512)) < 1e-6


def test_exp2():
    x = np.linspace(-125, 0, 50_001, dtype=np.float32)
    got = np.array(cpu.exp2(mx.array(x)))
    assert np.abs(got / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    assert float(cpu.exp2(mx.array(-math.inf))) < 1e-37


# (B, H, S, D), L: by samples, by heads, by queries, and a row alone above a piece
@pytest.mark.parametrize(
    ("shape", "length"),
    [((64, 2, 16, 8), 16), ((3, 2, 40, 8), 37), ((1, 3, 50, 8), 50), ((1, 1, 3, 4), 3000)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(shape, length, masked, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 2**11)
    monkeypatch.setattr(cpu, "_SMALL", 0)
    batch, heads, _, dim = shape
    keys = (batch, heads, length, dim)
    query, key, value = (3 * normal(*s, seed=i) for i, s in enumerate((shape, keys, keys)))
    mask = mx.where(mx.arange(length) < length // 2, 0.0, -1e4).reshape(1, 1, 1, -1) if masked else None
    expected = mx.fast.scaled_dot_product_attention(query, key, value, scale=0.3, mask=mask)
    got = cpu.attention(query, key, value, 0.3, mask)
    assert float(mx.abs(got - expected).max() / mx.abs(expected).max()) < 2e-6


def test_attention_holds_a_piece_of_the_scores():
    query = normal(32, 2, 512, 16)
    scores = 32 * 2 * 512 * 512 * 4

    assert peak(True, lambda q: cpu.attention(q, q, q, 0.25), query) < 0.5 * scores
    assert peak(False, lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=0.25), query) > scores


@pytest.mark.parametrize("shape", [(3, 8, 8, 32), (2, 5, 63, 32), (1, 1, 1, 32), (2, 4096, 32)])
def test_group_norm(shape):
    """Against float64; with means far from zero, as the squares must not cancel."""
    norm = group_norm(8, 32)
    norm.weight, norm.bias = normal(32, seed=1), normal(32, seed=2)
    x = normal(*shape) + 30 * normal(32, seed=3)
    groups = np.array(x, np.float64).reshape(shape[0], -1, 8, 4)
    variance = groups.var(axis=(1, 3), keepdims=True)
    y = (groups - groups.mean(axis=(1, 3), keepdims=True)) / np.sqrt(variance + 1e-5)
    expected = y.reshape(shape) * np.array(norm.weight, np.float64) + np.array(norm.bias, np.float64)
    with cpu.routes(True):
        assert np.abs(np.array(norm(x)) - expected).max() / np.abs(expected).max() < 2e-6


@pytest.mark.parametrize(
    "shape",
    [(16, 8, 8, 64), (1, 31, 33, 64), (5, 11, 12, 80), (2, 64, 64, 64), (1, 1, 600, 64), (700, 1, 1, 64)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_winograd(shape, bias):
    """Whole and odd tiles; the larger run in several bands or chunks of frames."""
    layer = Conv2d(shape[-1], 96, 3, padding=1, bias=bias)
    assert 0 < both(layer, normal(*shape)) < 2e-6  # zero: the same route twice


def test_winograd_of_some_output_channels_at_a_time(monkeypatch):
    monkeypatch.setattr(convolution, "_WEIGHTS", 2**16)
    assert 0 < both(Conv2d(64, 160, 3, padding=1), normal(8, 8, 8, 64)) < 2e-6


@pytest.mark.parametrize(
    ("channels", "options"),
    [(8, {}), (64, {"stride": 2}), (64, {"dilation": 2}), (64, {"groups": 2}), (64, {"padding": 0})],
)
def test_other_convolutions_are_mlx_own(channels, options, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 2**13)  # frame by frame
    layer = Conv2d(channels, 64, 3, **{"padding": 1, **options})
    assert both(layer, normal(3, 16, 16, channels)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 16, 64, 64), (3, 7, 50, 64), (2, 2, 300, 80), (1, 1, 1024, 64)])
def test_temporal_winograd(shape):
    error = both(TemporalConv(shape[-1], 96), normal(*shape))
    assert error < 2e-6
    assert error > 0 or shape[1] == 1


def test_convolutions_hold_a_piece_of_the_unfolded_input():
    x, layer = normal(8, 32, 32, 128), Conv2d(128, 128, 3, padding=1)
    mx.eval(layer.parameters())
    assert peak(True, layer, x) < 0.5 * peak(False, layer, x)


def test_feed_forward_in_rows():
    layer, x = FeedForward(64), normal(4, 2048, 64)
    mx.eval(layer.parameters())
    assert both(layer, x) < 2e-6
    wide = 4 * 2048 * 8 * 64 * 4
    assert peak(True, layer, x) < 0.9 * peak(False, layer, x)
    assert peak(False, layer, x) > wide


def test_gradients_pass_through():
    layer, temporal = Conv2d(64, 64, 3, padding=1), TemporalConv(64, 64)

    def loss(x):
        y = activations.silu(layer(x)).reshape(1, 4, 256, 64)
        return mx.square(temporal(y)).sum()

    assert both(mx.grad(loss), normal(4, 16, 16, 64)) < 1e-5


# "precise"


def flips(fn, x):
    """`flip` of each convolution in the graph of `fn`."""
    records = []
    mx.export_function(records.append, fn, x)
    return [r["arguments"][-1] for r in records if r.get("name") == "Convolution"]


@pytest.mark.parametrize("packed", [False, True])
def test_precise_takes_the_flipped_convolution(packed):
    layer = Conv2d(128, 128, 3, padding=1)
    layer = quantized(layer, Quantization(8)) if packed else layer
    x = normal(1, 64, 64, 128)
    mx.eval(x, layer.parameters())
    with cpu.routes(False):
        fast = layer(x)
        assert flips(layer, x) == [False]
        layer.convolution = "precise"
        assert flips(layer, x) == [True]
        assert flips(layer, x[:, :63]) == [False]  # too few pixels for Winograd on Metal
        assert float(mx.abs(layer(x) - fast).max() / mx.abs(fast).max()) < 1e-6
        if not packed:
            layer.weight = -layer.weight  # nothing is kept that could be stale
            negative = 2 * layer.bias - fast
            assert float(mx.abs(layer(x) - negative).max() / mx.abs(fast).max()) < 1e-5


@pytest.mark.parametrize("mode", ["auto", "fast", "precise"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_modes_by_dtype(mode, dtype):
    layer = Conv2d(128, 128, 3, padding=1)
    layer.set_dtype(dtype)
    layer.convolution = mode
    with cpu.routes(False):
        x = mx.zeros((1, 64, 64, 128), dtype)
        assert flips(layer, x) == [mode == "precise" or (mode == "auto" and dtype == mx.bfloat16)]


@pytest.mark.parametrize("network", [UNet3DConditionModel, AutoencoderKL])
def test_set_convolution(network):
    model = network(**(tiny.UNET if network is UNet3DConditionModel else tiny.VAE))

    def modes():
        return {m.convolution for m in model.modules() if hasattr(m, "convolution")}

    names = [name for name, _ in tree_flatten(model.parameters())]
    assert modes() == {"auto"}
    model.set_convolution("precise")
    assert modes() == {"precise"}
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    with pytest.raises(ValueError, match="convolution='exact' is not known"):
        model.set_convolution("exact")


def test_quantizing_keeps_the_mode():
    layer = Conv2d(64, 64, 3)
    layer.convolution = "precise"
    assert quantized(layer, Quantization(8)).convolution == "precise"
