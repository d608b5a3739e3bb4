"""The convolutions of the networks and their algorithms.

On a GPU, each is MLX's own operation. On the CPU, that operation would unfold its input into 9 copies (3 for
a `TemporalConv`), so Winograd's F(2x2, 3x3) and F(2, 3) (arXiv:1509.09308), which need fewer multiplications,
replace it; in float32 they equal the direct sum to about 1e-6. Shapes: N frames, H W pixels, B batch, F
frames of a sample, L pixels of a frame, I O channels.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import cpu
from ..operations import one_operation

# Most elements of transformed weights in memory at a time, 64 MB.
_WEIGHTS = 2**24

MODES = ("auto", "fast", "precise")
"""The modes of `set_convolution`."""


class Conv2d(nn.Conv2d):
    """A 2D convolution of (N, H, W, I) with a weight (O, h, w, I).

    `convolution` is "auto", "fast" or "precise", see `set_convolution`.
    """

    convolution = "auto"

    def __call__(self, x: mx.array) -> mx.array:
        return self.convolve(x, self.bias if "bias" in self else None)

    def convolve(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """Convolve with this bias in place of the layer's own."""
        options = self.stride, self.padding, self.dilation, self.groups
        return conv2d(x, self.weight, bias, *options, mode=self.convolution)


def set_convolution(layers: Iterable[nn.Module], mode: str) -> None:
    """Compute the 3x3 convolutions among `layers` "fast" or "precise" on a Mac's GPU; "auto" is precise in
    bfloat16, else fast.

    There, MLX computes a 3x3 convolution of many pixels and channels by Winograd's F(6x6, 3x3) and stores
    transformed values in the dtype of the network. The rounding error of such a layer is 0.7 % (rms) in
    float16 and 6 % in bfloat16, and float16 can overflow from activations of about 400. "precise" computes
    the direct sum for these layers, accumulated in float32. On the CPU and on CUDA both modes are direct, or
    exact in float32.
    """
    if mode not in MODES:
        raise ValueError(f"convolution={mode!r} is not known; use {', '.join(map(repr, MODES))}")
    for layer in layers:
        if hasattr(layer, "convolution"):
            layer.convolution = mode


class TemporalConv(nn.Module):
    """A convolution over frames only: diffusers' Conv3d with kernel (3, 1, 1) and padding (1, 0, 0).

    It runs as a conv2d with kernel (3, 1) over (B, F, H*W, C), a view, and needs no conv3d kernel.
    Weight (O, 3, 1, I).
    """

    diffusers_layout = "conv3d_temporal"

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        bound = (3 * in_channels) ** -0.5
        uniform = partial(mx.random.uniform, -bound, bound)
        self.weight = uniform((out_channels, 3, 1, in_channels))
        self.bias = uniform((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, F, L, I) -> (B, F, L, O)."""
        return self.convolve(x, self.bias)

    def convolve(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """Convolve with this bias in place of the layer's own."""
        return temporal_conv(x, self.weight, bias)


def without_bias(layer: nn.Module, x: mx.array) -> tuple[mx.array, mx.array | None]:
    """Return the output of a convolution and the bias still to be added; None where the layer has none, or
    where adding it costs nothing, as on the CPU."""
    if cpu.active(x) or "bias" not in layer or not hasattr(layer, "convolve"):
        return layer(x), None
    return layer.convolve(x, None), layer.bias


def conv2d(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    mode: str = "auto",
) -> mx.array:
    """(N, H, W, I) by (O, h, w, I) -> (N, H', W', O); for `mode` see `set_convolution`, for other arguments
    `mlx.core.conv2d`."""
    precise = mode == "precise" or (mode == "auto" and x.dtype == mx.bfloat16)
    options = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)]
    plain = weight.shape[1:3] == (3, 3) and options[0] == options[2] == (1, 1) and groups == 1
    if cpu.active(x):
        if plain and options[1] == (1, 1) and _winograd_pays(x, weight):
            return _winograd(x, weight, bias)
        y = _in_frames(lambda x: mx.conv2d(x, weight, stride, padding, dilation, groups), x, weight)
    elif precise and plain and _metal_winograd(x, weight):
        # MLX has no switch for Winograd, but never uses it for a flipped convolution, here of the flipped
        # weight. The copy of the weight costs little: it is used for 4096 pixels or more.
        y = mx.conv_general(x, weight[:, ::-1, ::-1], padding=options[1], flip=True)
    else:
        y = mx.conv2d(x, weight, stride, padding, dilation, groups)
    return y if bias is None else y + bias


def _metal_winograd(x: mx.array, weight: mx.array) -> bool:
    """Return True if MLX 0.32 uses Winograd for a plain 3x3 convolution on Metal."""
    n, height, width, channels = x.shape
    widths = channels, weight.shape[0]
    return n * height * width >= 4096 and all(c % 32 == 0 for c in widths) and sum(widths) >= 256


def temporal_conv(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """(B, F, L, I) by (O, 3, 1, I), along F with a frame of zeros at each end -> (B, F, L, O)."""
    if cpu.active(x) and _temporal_winograd_pays(x, weight):
        return _temporal_winograd(x, weight, bias)
    y = mx.conv2d(x, weight, padding=(1, 0))
    return y if bias is None else y + bias


def _in_frames(fn: Callable[[mx.array], mx.array], x: mx.array, weight: mx.array) -> mx.array:
    """Apply `fn` to a few frames at a time, so that MLX never unfolds more than 8 of them at once."""
    n, height, width, channels = x.shape
    unfolded = height * width * channels * weight.shape[1] * weight.shape[2]
    step = max(8 * cpu.PIECE // unfolded, 1)
    return fn(x) if n <= step else cpu.in_turn(lambda chunk, _: fn(chunk), x, (step,))


# Winograd in two dimensions: a tile of 4x4 inputs gives 2x2 outputs by 16 products instead of 36. Each of the
# 16 is a matrix product over the tiles.


def _winograd_pays(x: mx.array, weight: mx.array) -> bool:
    """Return True for enough tiles and channels that the transforms save time, measured with OpenBLAS."""
    n, height, width, channels = x.shape
    return n * height * width >= 512 and min(channels, weight.shape[0]) >= 64


def _filter_rows(a: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, ...]:
    outer, inner = (a + c) * 0.5, b * 0.5
    return a, outer + inner, outer - inner, c


def _input_rows(a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> tuple[mx.array, ...]:
    return a - c, b + c, c - b, b - d


def _output_rows(a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> tuple[mx.array, ...]:
    return a + (b + c), (b - c) - d


@one_operation
@mx.compile
def _filter_tiles(*weight: mx.array) -> list[mx.array]:
    """3x3 matrices (O, I), row by row -> 4x4."""
    columns = [_filter_rows(*weight[i : i + 3]) for i in (0, 3, 6)]
    tiles = [_filter_rows(*(column[j] for column in columns)) for j in range(4)]
    return [tiles[j][i] for i in range(4) for j in range(4)]


@one_operation
@mx.compile
def _output_tiles(*products: mx.array) -> tuple[mx.array, ...]:
    """4x4 matrices (tiles, O), row by row -> 2x2."""
    columns = [_output_rows(*products[j::4]) for j in range(4)]
    return tuple(y for i in range(2) for y in _output_rows(*(column[i] for column in columns)))


def _input_tiles(x: mx.array, rows: int, columns: int) -> list[mx.array]:
    """(n, 2 * rows + 2, 2 * columns + 2, I) -> 4x4 matrices (n * rows * columns, I)."""
    strips = _input_rows(*(x[:, i : i + 2 * rows : 2] for i in range(4)))
    return [
        tile.reshape(-1, x.shape[-1])
        for strip in strips
        for tile in _input_rows(*(strip[:, :, j : j + 2 * columns : 2] for j in range(4)))
    ]


def _winograd(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """Convolve by 3x3 with padding 1, a band of tiles and some output channels at a time."""
    out_channels, in_channels = weight.shape[0], weight.shape[-1]
    step = max(_WEIGHTS // (16 * in_channels), 64)
    parts = []
    for start in range(0, out_channels, step):
        channels = slice(start, start + step)
        # One after the other, see `cpu.in_turn`, and the first only when it is needed.
        part = mx.depends([weight[channels]], [parts[-1] if parts else x])[0]
        matrices = [m.T for m in _filter_tiles(*(part[:, i, j] for i in range(3) for j in range(3)))]
        parts.append(_winograd_products(x, matrices, None if bias is None else bias[channels]))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _winograd_products(x: mx.array, matrices: list[mx.array], bias: mx.array | None) -> mx.array:
    _, height, width, channels = x.shape
    tile_rows, tile_columns = -(-height // 2), -(-width // 2)
    # 10 MB of transformed inputs and products, with enough rows for an efficient matrix product
    tiles = max(256, 160 * 1024 // (channels + matrices[0].shape[1]))
    frames = max(tiles // (tile_rows * tile_columns), 1)
    rows = tile_rows if frames > 1 else min(max(tiles // tile_columns, 1), tile_rows)
    bottom, right = 1 + height % 2, 1 + width % 2

    def band(x: mx.array, _: cpu.Part) -> mx.array:
        inputs = _input_tiles(x, x.shape[1] // 2 - 1, tile_columns)
        return _winograd_band(inputs, matrices, bias, (x.shape[1] // 2 - 1, tile_columns))

    def bands(x: mx.array, _: cpu.Part) -> mx.array:
        padded = mx.pad(x, [(0, 0), (1, bottom), (1, right), (0, 0)])
        if rows == tile_rows:
            return band(padded, ())
        return cpu.in_turn(band, padded, (frames, 2 * rows), overlap=2)

    y = cpu.in_turn(bands, x, (frames,))
    return y[:, :height, :width] if (height % 2 or width % 2) else y


def _winograd_band(
    inputs: list[mx.array], matrices: list[mx.array], bias: mx.array | None, shape: tuple[int, int]
) -> mx.array:
    """-> (n, 2 * rows, 2 * columns, O)."""
    products = [a @ b for a, b in zip(inputs, matrices, strict=True)]
    if bias is not None:
        # The product in row 1 and column 1 contributes to all four outputs with the factor 1
        products[5] = mx.addmm(bias, inputs[5], matrices[5])
    rows, columns = shape
    out_channels = matrices[0].shape[1]
    # (2, 2, n, rows, columns, O) -> (n, rows, 2, columns, 2, O)
    y = mx.stack(_output_tiles(*products)).reshape(2, 2, -1, rows, columns, out_channels)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(-1, 2 * rows, 2 * columns, out_channels)


# The same along frames: 4 inputs give 2 outputs by 4 products instead of 6.


def _temporal_winograd_pays(x: mx.array, weight: mx.array) -> bool:
    batch, frames, pixels, channels = x.shape
    return frames > 1 and batch * frames * pixels >= 1024 and min(channels, weight.shape[0]) >= 64


_compiled_filter_rows, _compiled_output_rows = (
    one_operation(mx.compile(rows)) for rows in (_filter_rows, _output_rows)
)


def _temporal_winograd(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """Convolve over frames with padding 1, some pairs of output frames at a time."""
    _, frames, pixels, channels = x.shape
    out_channels = weight.shape[0]
    weight = mx.depends([weight], [x])[0]  # only when it is needed
    matrices = [m.T for m in _compiled_filter_rows(*(weight[:, i, 0] for i in range(3)))]
    step = max(max(512, 320 * 1024 // channels) // pixels, 1)

    def some(x: mx.array, _: cpu.Part) -> mx.array:
        count = x.shape[0] - 2
        inputs = [a.reshape(-1, channels) for a in _input_rows(*(x[i : i + count : 2] for i in range(4)))]
        products = [a @ b for a, b in zip(inputs, matrices, strict=True)]
        if bias is not None:
            products[1] = mx.addmm(bias, inputs[1], matrices[1])  # contributes to both outputs
        y = [a.reshape(-1, pixels, out_channels) for a in _compiled_output_rows(*products)]
        return mx.stack(y, axis=1).reshape(count, pixels, out_channels)

    def all_frames(sample: mx.array, _: cpu.Part) -> mx.array:
        padded = mx.pad(sample[0], [(1, 1 + frames % 2), (0, 0), (0, 0)])
        return cpu.in_turn(some, padded, (2 * step,), overlap=2)[None, :frames]

    return cpu.in_turn(all_frames, x, (1,))
