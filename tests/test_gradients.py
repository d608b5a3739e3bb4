"""Gradients through the forms for the CPU and through the networks, against those of MLX's own operations."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_unet3d import AutoencoderKL, CLIPTextModel, UNet3DConditionModel, cpu
from mlx.utils import tree_flatten, tree_map
from mlx_unet3d.layers import activations, convolution
from mlx_unet3d.layers.attention_processors import SlicedAttnProcessor
from mlx_unet3d.layers.chunking import group_norm_of_parts
from mlx_unet3d.layers.conditions import Conditions
from mlx_unet3d.layers.convolution import Conv2d, TemporalConv
from mlx_unet3d.layers.feed_forward import FeedForward
from mlx_unet3d.layers.normalization import group_norm
from mlx_unet3d.layers.transformers import BasicTransformerBlock


@pytest.fixture
def all_routes(monkeypatch):
    """The forms for the CPU take over at any size, in several pieces."""
    monkeypatch.setattr(cpu, "PIECE", 2**9)
    monkeypatch.setattr(cpu, "_SMALL", 0)
    monkeypatch.setattr(convolution, "_WEIGHTS", 2**12)
    monkeypatch.setattr(convolution, "_winograd_pays", lambda x, weight: True)
    monkeypatch.setattr(convolution, "_temporal_winograd_pays", lambda x, weight: True)


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def gradients(fn, arrays, model=None, compiled=False):
    """Of the sum of `fn(*arrays)` times fixed numbers, by name: of the arrays and the weights of `model`."""

    def loss(inputs, weights):
        if model is not None:
            model.update(weights)
        y = fn(*inputs)
        return (y * normal(*y.shape, seed=99)).sum()

    weights = {} if model is None else model.parameters()
    grad = mx.grad(loss, argnums=(0, 1))
    found = (mx.compile(grad) if compiled else grad)(list(arrays), weights)
    if model is not None:
        model.update(weights)
    mx.eval(found)
    return dict(tree_flatten(found))


def error(found, expected):
    """The largest difference of any gradient, relative to its own largest value. One that is no more than
    rounding, such as that of a bias before a norm, counts by the thousandth part of the largest of all."""
    assert found.keys() == expected.keys()
    least = 1e-3 * max(float(mx.abs(g).max()) for g in expected.values())
    return max(
        float(mx.abs(found[name] - g).max()) / max(float(mx.abs(g).max()), least)
        for name, g in expected.items()
    )


def both(fn, arrays, model=None, **options):
    with cpu.routes(False):
        expected = gradients(fn, arrays, model)
    with cpu.routes(True):
        return error(gradients(fn, arrays, model, **options), expected)


# (function, shapes of its arguments)
FUNCTIONS = {
    "silu": (activations.silu, [(3, 400)]),
    "gelu": (activations.gelu, [(3, 400)]),
    "geglu": (activations.geglu, [(3, 400), (3, 400)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name):
    fn, shapes = FUNCTIONS[name]
    arrays = [3 * normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert both(fn, arrays) < 1e-5


def test_activations_far_from_zero():
    """Beyond the fitted range: the slopes are 0 and 1."""
    x = mx.array([-1e4, -40.0, 40.0, 1e4])
    for fn in (cpu.silu, cpu.gelu):
        np.testing.assert_allclose(np.array(mx.grad(lambda x: fn(x).sum())(x)), [0, 0, 1, 1], atol=1e-5)  # noqa: B023


# (B, H, S, D), L: by samples, by heads, by queries
@pytest.mark.parametrize(
    ("shape", "length"), [((9, 2, 8, 8), 8), ((2, 3, 20, 8), 21), ((1, 2, 40, 8), 40), ((1, 1, 2, 4), 900)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(shape, length, masked, all_routes):
    batch, heads, _, dim = shape
    keys = (batch, heads, length, dim)
    arrays = [normal(*s, seed=i) for i, s in enumerate((shape, keys, keys))]
    if masked:
        arrays.append(normal(batch, 1, 1, length, seed=3))
    ours = gradients(lambda q, k, v, *m: cpu.attention(q, k, v, 0.4, *m), arrays)

    def plain(query, key, value, mask=None):
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=0.4, mask=mask)

    assert 0 < error(ours, gradients(plain, arrays)) < 1e-5


def test_second_gradient_of_attention(all_routes):
    query, key, value = (normal(2, 2, 12, 4, seed=i) for i in range(3))

    def second(attention):
        first = mx.grad(lambda q: mx.square(attention(q)).sum())
        return mx.grad(lambda q: mx.square(first(q)).sum())(query)

    expected = second(lambda q: mx.softmax(0.5 * q @ key.swapaxes(-1, -2), axis=-1) @ value)
    found = second(lambda q: cpu.attention(q, key, value, 0.5))
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5 * float(mx.abs(expected).max()))


LAYERS = {
    "conv2d": (lambda: Conv2d(8, 12, 3, padding=1), (5, 7, 6, 8)),
    "strided conv2d": (lambda: Conv2d(8, 8, 3, stride=2, padding=1), (5, 8, 6, 8)),
    "temporal conv": (lambda: TemporalConv(8, 12), (2, 5, 12, 8)),
    "feed-forward": (lambda: FeedForward(8), (3, 600, 8)),
    "transformer block": (
        lambda: BasicTransformerBlock(16, 2, 8, double_self_attention=True),
        (12, 6, 16),
    ),
}


def calling(layer):
    """`layer` as a function of an array alone."""
    return (lambda x: layer(x, Conditions())) if isinstance(layer, BasicTransformerBlock) else layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, all_routes):
    make, shape = LAYERS[name]
    layer = tiny.randomize(make())
    assert 0 < both(calling(layer), [normal(*shape)], layer) < 1e-5


def test_compiled_gradient(all_routes):
    """Of attention, layer norms, GEGLU and linears."""
    make, shape = LAYERS["transformer block"]
    block = tiny.randomize(make())
    assert 0 < both(calling(block), [normal(*shape)], block, compiled=True) < 1e-5


def test_group_norm():
    norm = group_norm(4, 16)
    norm.weight, norm.bias = 1 + normal(16, seed=1), normal(16, seed=2)
    x = normal(2, 3, 20, 16) + 3
    shift = normal(2, 16, seed=3)
    fn = lambda x, shift: norm(x, shift=shift, act=activations.silu, swap=True)  # noqa: E731
    assert 0 < both(fn, [x, shift], norm) < 1e-4
    parts = gradients(lambda x: mx.concatenate([group_norm_of_parts(norm, x)(p) for p in (x,)]), [x], norm)
    assert error(parts, gradients(norm, [x], norm)) < 1e-5


# Networks.


def run_unet(size=6):
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET))
    arrays = [normal(1, 4, 2, size, size), normal(1, 5, 12, seed=1)]
    return unet, (lambda sample, text: unet(sample, 7, text).sample), arrays


OPTIONS = {
    "plain": lambda unet: None,
    "frames and pixels": lambda unet: (unet.enable_frame_chunking(1), unet.enable_pixel_chunking(20)),
    "feed-forward": lambda unet: unet.enable_forward_chunking(2),
    "slices": lambda unet: unet.set_attn_processor(SlicedAttnProcessor(2)),
    "freeu": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "compiled": lambda unet: unet.compile(),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_unet(name, all_routes):
    unet, fn, arrays = run_unet(4 if name in ("feed-forward", "compiled") else 6)
    if name == "freeu":
        OPTIONS[name](unet)
    with cpu.routes(False):
        expected = gradients(fn, arrays, unet)
    OPTIONS[name](unet)
    with cpu.routes(True):
        assert 0 < error(gradients(fn, arrays, unet), expected) < 1e-4


def test_half_precision():
    unet, fn, arrays = run_unet()
    expected = gradients(fn, arrays, unet)
    unet.set_dtype(mx.float16)
    found = gradients(fn, [a.astype(mx.float16) for a in arrays], unet)
    assert {g.dtype for g in found.values()} == {mx.float16}
    # Of all of it: sums that cancel, such as the gradient of a bias, lose more than that by themselves.
    wrong = sum(float(mx.square(found[name].astype(mx.float32) - g).sum()) for name, g in expected.items())
    assert wrong < 0.1**2 * sum(float(mx.square(g).sum()) for g in expected.values())


@pytest.mark.parametrize("option", ["plain", "tiles", "chunks"])
def test_vae(option, all_routes):
    vae = tiny.randomize(AutoencoderKL(**tiny.VAE))
    if option == "tiles":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 2
    size = 1 if option == "chunks" else None
    batch = 2 if option == "chunks" else 1
    images, latents = (batch, 3, 24, 24), (batch, 4, 3, 1)
    assert 0 < both(lambda x: vae.encode(x, chunk_size=size).mean, [normal(*images)], vae) < 1e-4
    assert 0 < both(lambda z: vae.decode(z, chunk_size=size), [normal(*latents)], vae) < 1e-4


def test_chunks_within_compile():
    """Nothing can be evaluated there; the result is that of all at once."""
    vae = tiny.randomize(AutoencoderKL(**tiny.VAE))
    latents = normal(3, 4, 2, 2)
    found = mx.compile(lambda z: vae.decode(z, chunk_size=1))(latents)
    assert float(mx.abs(found - vae.decode(latents)).max()) < 1e-5


def test_text_encoder(all_routes):
    text = tiny.randomize(CLIPTextModel(vocab_size=30, **tiny.TEXT))
    ids = np.arange(20).reshape(2, 10)
    found = gradients(lambda: text(ids), [], text)
    assert all(float(mx.abs(g).max()) > 0 for g in found.values())


def test_training_step(all_routes):
    """As fine-tuning takes it, with `nn.value_and_grad`."""
    unet, fn, arrays = run_unet()
    unet.train()
    loss = nn.value_and_grad(unet, lambda unet, *args: mx.square(fn(*args)).mean())
    before, gradient = loss(unet, *arrays)
    unet.update(tree_map(lambda p, g: p - 0.01 * g, unet.parameters(), gradient))
    unet.eval()
    assert float(loss(unet, *arrays)[0]) < float(before)
