"""The rules of MLX's Metal backend, row by row of its dispatch functions, as the predictor has them."""

import pytest
from metal import rules
from metal.rules import Conv, Winograd, attention_route, conv_route

# (what, N, size, C, O, kernel, other arguments) -> kernel. Rows of `dispatch_conv_2D_gpu` in their order;
# each is followed by the nearest convolution that the row does not take.
CONV2D = [
    ("groups, dilated input", 1, (32, 32), 32, 32, 3, dict(groups=2, input_dilation=2), rules.UNFOLD),
    ("depthwise", 1, (32, 32), 32, 32, 3, dict(groups=32, stride=2), rules.DEPTHWISE),
    ("depthwise of 7", 1, (32, 32), 32, 32, 7, dict(groups=32), rules.DEPTHWISE),
    ("depthwise of 8", 1, (32, 32), 32, 32, 8, dict(groups=32), rules.IMPLICIT),
    ("depthwise, stride 3", 1, (32, 32), 32, 32, 3, dict(groups=32, stride=3), rules.IMPLICIT),
    ("depthwise, dilated", 1, (32, 32), 32, 32, 3, dict(groups=32, kernel_dilation=2), rules.IMPLICIT),
    ("depthwise, 24 channels", 1, (32, 32), 24, 24, 3, dict(groups=24), rules.IMPLICIT),
    ("depthwise, two outputs each", 1, (32, 32), 32, 64, 3, dict(groups=32), rules.IMPLICIT),
    ("groups of 16", 1, (32, 32), 32, 32, 3, dict(groups=2), rules.IMPLICIT),
    ("groups of 5", 1, (32, 32), 10, 10, 3, dict(groups=2), rules.UNFOLD),
    ("groups to 17", 1, (32, 32), 32, 34, 3, dict(groups=2), rules.UNFOLD),
    ("Winograd", 4, (32, 32), 128, 128, 3, dict(padding=1), rules.WINOGRAD),
    ("flipped", 4, (32, 32), 128, 128, 3, dict(padding=1, flip=True), rules.IMPLICIT),
    ("stride 2", 4, (32, 32), 128, 128, 3, dict(padding=1, stride=2), rules.IMPLICIT),
    ("dilated kernel", 4, (32, 32), 128, 128, 3, dict(padding=1, kernel_dilation=2), rules.IMPLICIT),
    ("dilated input", 4, (32, 32), 128, 128, 3, dict(padding=1, input_dilation=2), rules.IMPLICIT_GENERAL),
    ("kernel of 5", 4, (32, 32), 128, 128, 5, dict(padding=2), rules.IMPLICIT),
    ("over frames", 4, (32, 32), 128, 128, (3, 1), dict(padding=(1, 0)), rules.IMPLICIT),
    ("4080 pixels", 4, (30, 34), 128, 128, 3, dict(padding=1), rules.IMPLICIT),
    ("240 channels", 4, (32, 32), 112, 128, 3, dict(padding=1), rules.IMPLICIT),
    ("224 channels", 4, (32, 32), 96, 128, 3, dict(padding=1), rules.IMPLICIT),
    ("from 256 channels in all", 4, (32, 32), 96, 160, 3, dict(padding=1), rules.WINOGRAD),
    ("channels padded", 1, (16, 16), 9, 32, 3, dict(padding=1), rules.IMPLICIT_PADDED),
    ("255 pixels", 1, (15, 17), 9, 32, 3, dict(padding=1), rules.UNFOLD),
    ("kernel of 8 taps", 1, (32, 32), 9, 32, (2, 4), {}, rules.IMPLICIT_GENERAL),
    ("padded, stride 2", 1, (64, 64), 9, 32, 3, dict(padding=1, stride=2), rules.IMPLICIT_GENERAL),
    ("padded to 17", 1, (32, 32), 9, 17, 3, dict(padding=1), rules.IMPLICIT_GENERAL),
    ("four channels in", 1, (8, 8), 4, 320, 3, dict(padding=1), rules.IMPLICIT),
    ("five channels in", 1, (8, 8), 5, 320, 3, dict(padding=1), rules.UNFOLD),
    ("four channels out", 1, (8, 8), 320, 4, 3, dict(padding=1), rules.IMPLICIT),
    ("17 channels out", 1, (8, 8), 320, 17, 3, dict(padding=1), rules.UNFOLD),
    ("17 channels out, large", 1, (16, 16), 320, 17, 3, dict(padding=1), rules.IMPLICIT_GENERAL),
    ("transposed", 1, (8, 8), 32, 32, 3, dict(padding=1, input_dilation=2), rules.IMPLICIT_GENERAL),
    ("transposed, 5 channels, small", 1, (4, 4), 5, 32, 3, dict(input_dilation=2, padding=1), rules.UNFOLD),
]


@pytest.mark.parametrize(("what", "n", "size", "c", "o", "kernel", "rest", "expected"), CONV2D)
def test_conv2d(what, n, size, c, o, kernel, rest, expected):
    assert conv_route(Conv.simple(n, size, c, o, kernel, **rest)) == expected


CONV3D = [
    ("odd channels", 2, (4, 8, 8), 9, 32, 3, dict(padding=1), rules.IMPLICIT_3D_PADDED),
    ("17 channels out", 2, (4, 8, 8), 32, 17, 3, dict(padding=1), rules.IMPLICIT_3D_PADDED),
    ("one sample, no padding in depth", 1, (4, 8, 8), 32, 32, 3, dict(padding=(0, 1, 1)), rules.BY_PLANES),
    ("padding in depth", 1, (4, 8, 8), 32, 32, 3, dict(padding=1), rules.IMPLICIT_3D),
    ("two samples", 2, (4, 8, 8), 32, 32, 3, dict(padding=(0, 1, 1)), rules.IMPLICIT_3D),
    ("depth of 8", 1, (9, 8, 8), 32, 32, (8, 3, 3), {}, rules.IMPLICIT_3D),
    ("stride in depth", 1, (4, 8, 8), 32, 32, 3, dict(stride=(2, 1, 1)), rules.IMPLICIT_3D),
    ("dilated input", 2, (4, 8, 8), 32, 32, 3, dict(input_dilation=2), rules.UNFOLD),
    ("groups of 5", 2, (4, 8, 8), 10, 10, 3, dict(groups=2), rules.UNFOLD),
]


@pytest.mark.parametrize(("what", "n", "size", "c", "o", "kernel", "rest", "expected"), CONV3D)
def test_conv3d(what, n, size, c, o, kernel, rest, expected):
    assert conv_route(Conv.simple(n, size, c, o, kernel, **rest)) == expected


CONV1D = [
    ("depthwise", 1, (64,), 40, 40, 3, dict(groups=40), rules.DEPTHWISE),
    ("depthwise, padded", 1, (64,), 32, 32, 3, dict(groups=32, padding=1), rules.DEPTHWISE),
    ("as a conv2d", 1, (64,), 32, 32, 3, dict(padding=1), rules.IMPLICIT),
    ("odd channels", 1, (64,), 9, 32, 3, dict(padding=1), rules.UNFOLD),
]


@pytest.mark.parametrize(("what", "n", "size", "c", "o", "kernel", "rest", "expected"), CONV1D)
def test_conv1d(what, n, size, c, o, kernel, rest, expected):
    assert conv_route(Conv.simple(n, size, c, o, kernel, **rest)) == expected


def test_four_axes_are_refused():
    with pytest.raises(ValueError, match="4 axes"):
        conv_route(Conv.simple(1, (2, 2, 2, 2), 16, 16, 1))


# Frames with guidance and latent pixels of four levels -> which of their 3x3 convolutions take Winograd.
@pytest.mark.parametrize(
    ("n", "height", "width", "expected"),
    [
        (32, 32, 32, [True, True, False, False]),  # ModelScope, 256x256, 16 frames
        (48, 40, 72, [True, True, True, False]),  # ZeroScope, 576x320, 24 frames
        (32, 64, 64, [True, True, True, False]),  # AnimateDiff, 512x512, 16 frames
        (28, 72, 128, [True, True, True, False]),  # Stable Video Diffusion, 1024x576, 14 frames
        (50, 72, 128, [True, True, True, True]),  # and 25
    ],
)
def test_winograd_levels(n, height, width, expected):
    sizes = [(height // 2**level, width // 2**level) for level in range(4)]
    routes = [conv_route(Conv.simple(n, size, 320, 320, 3, padding=1)) for size in sizes]
    assert [route == rules.WINOGRAD for route in routes] == expected


def test_winograd_scratch():
    conv = Conv.simple(32, (32, 32), 320, 640, 3, padding=1)
    scratch = Winograd.of(conv)
    assert scratch.tiles == 32 * 6 * 6
    assert scratch.padded == 32 * 38 * 38 * 320
    assert scratch.filters == 64 * 320 * 640
    assert (scratch.inputs, scratch.outputs) == (64 * scratch.tiles * 320, 64 * scratch.tiles * 640)
    assert scratch.flops(conv) == 2 * 64 * scratch.tiles * 320 * 640
    assert conv.flops / scratch.flops(conv) == pytest.approx(9 * 32 * 32 / (64 * 36))
    # Without room for a single image MLX takes another kernel.
    one = Winograd.of(conv, n=1).bytes(2)
    assert conv_route(conv, winograd_budget=one) == rules.WINOGRAD
    assert conv_route(conv, winograd_budget=one - 1) == rules.IMPLICIT


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
def test_attention_is_fused(dim):
    assert attention_route(9, 9, dim) == rules.FUSED
    assert attention_route(1024, 77, dim, mask="array") == rules.FUSED


@pytest.mark.parametrize("dim", [8, 16, 32, 40, 48, 112, 160, 192, 256, 512])
def test_attention_is_unfused(dim):
    assert attention_route(1024, 1024, dim) == rules.UNFUSED


ATTENTION = [
    ("values of another size", (1024, 1024, 64, 128), {}, rules.UNFUSED),
    ("causal", (64, 64, 64), dict(mask="causal"), rules.FUSED),
    ("causal, more queries than keys", (64, 63, 64), dict(mask="causal"), rules.UNFUSED),
    ("wide, causal, matrix units", (1024, 1024, 256), dict(mask="causal", matrix_units=True), rules.FUSED),
    ("1023 queries", (1023, 1024, 256), dict(mask="causal", matrix_units=True), rules.UNFUSED),
    ("no matrix units", (1024, 1024, 256), dict(mask="causal"), rules.UNFUSED),
    ("a mask", (1024, 1024, 256), dict(mask="array", matrix_units=True), rules.UNFUSED),
    ("a gradient", (1024, 1024, 64), dict(gradient=True), rules.UNFUSED),
    ("a gradient, forced", (1024, 1024, 64), dict(gradient=True, force_fused=True), rules.FUSED),
    ("wide, forced", (1024, 1024, 192), dict(force_fused=True), rules.FUSED),
    ("eight queries", (8, 16, 64), {}, rules.VECTOR),
    ("eight queries, 96", (8, 16, 96), {}, rules.VECTOR),
    ("eight queries, 256", (8, 16, 256), {}, rules.VECTOR),
    ("eight queries, 80", (8, 16, 80), {}, rules.UNFUSED),
    ("eight queries, 192", (8, 16, 192), {}, rules.UNFUSED),
    ("eight queries, 192 and 128", (8, 16, 192, 128), {}, rules.VECTOR),
    ("more queries than keys", (8, 7, 64), {}, rules.UNFUSED),
    ("many queries of a key's head", (8, 16, 64), dict(query_heads=5), rules.UNFUSED),
    ("few queries of a key's head", (8, 16, 64), dict(query_heads=4), rules.VECTOR),
]


@pytest.mark.parametrize(("what", "shape", "rest", "expected"), ATTENTION)
def test_attention(what, shape, rest, expected):
    assert attention_route(*shape, **rest) == expected


def test_nothing_to_force():
    with pytest.raises(ValueError, match=r"no kernel for 1024 queries, 1024 keys, head dimensions 40 and 40"):
        attention_route(1024, 1024, 40, force_fused=True)
