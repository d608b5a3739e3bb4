"""Layers whose weight is stored quantized, in groups along the rows of a matrix.

MLX quantizes only matrices; a kernel (O, h, w, I) becomes one of (O, h * w * I), so that convolutions, which
hold most weights of a 3D UNet, are quantized as well. A layer dequantizes its weight when it is called and
drops it afterwards, which takes little time beside the product with a video's thousands of rows.
"""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .convolution import TemporalConv, conv2d, temporal_conv

_MODES = {  # mode -> bits, group sizes; the first are the defaults
    "affine": ((8, 2, 3, 4, 5, 6), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Quantization:
    """The settings of a quantized weight.

    Attributes:
        bits: of a weight: 2, 3, 4, 5, 6 or 8 for "affine"; 4 for "mxfp4" and "nvfp4", 8 for "mxfp8".
        group_size: weights that share a scale: 32, 64 or 128 for "affine"; else 32, and 16 for "nvfp4".
        mode: "affine" (a scale and an offset a group), or one of the floating-point formats "mxfp4", "mxfp8",
            "nvfp4"; see `mlx.core.quantize`.

    None takes the mode's default: 8 bits and groups of 64 for "affine", or the only choice. (MLX's own
    default of 4 bits is coarse for a diffusion network, see BENCHMARKS.md.) Raises ValueError for
    other values.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode={self.mode!r} is not known; use {', '.join(_MODES)}")
        for name, allowed in zip(("bits", "group_size"), _MODES[self.mode], strict=True):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, allowed[0])
            elif isinstance(value, bool) or value not in allowed:
                choices = ", ".join(map(str, sorted(allowed)))
                raise ValueError(f"{name}={value!r} does not go with mode={self.mode!r}; use {choices}")

    def to_dict(self) -> dict[str, Any]:
        """Return the keywords of `mlx.core.quantize`."""
        return asdict(self)

    def applies_to(self, shape: tuple[int, ...]) -> bool:
        """Return True if a weight of this shape divides into groups."""
        columns = _columns(shape)
        return len(shape) > 1 and columns % self.group_size == 0 and columns * self.bits % 32 == 0

    def quantize(self, weight: mx.array) -> dict[str, mx.array]:
        """Return "weight" (packed), "scales" and, for "affine", "biases" of a weight (O, ...)."""
        parts = mx.quantize(weight.reshape(weight.shape[0], -1), **self.to_dict())
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def dequantize(self, parts: dict[str, mx.array], shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return the weight of `shape` from the `parts` that `quantize` made, up to its rounding."""
        dense = mx.dequantize(
            parts["weight"], parts["scales"], parts.get("biases"), **self.to_dict(), dtype=dtype
        )
        return dense.reshape(shape)


def _columns(shape: tuple[int, ...]) -> int:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


class QuantizedLayer(nn.Module):
    """A layer with a quantized weight: `weight` (packed), `scales`, `biases` (affine), and its `bias`."""

    def __init__(self, layer: nn.Module, quantization: Quantization):
        super().__init__()
        self.quantization = quantization
        self.shape = tuple(layer.weight.shape)
        for name, array in quantization.quantize(layer.weight).items():
            self[name] = array
        if "bias" in layer:
            self.bias = layer.bias

    @property
    def bits(self) -> int:
        return self.quantization.bits

    def dense_weight(self, dtype: mx.Dtype) -> mx.array:
        """Return the dequantized weight in its own shape."""
        return self.quantization.dequantize(self, self.shape, dtype)

    def _extra_repr(self) -> str:
        return f"shape={self.shape}, {self.quantization}"


class QuantizedLinear(QuantizedLayer):
    """A linear layer or 1x1 convolution."""

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.dense_weight(x.dtype)
        return mx.addmm(self.bias, x, weight.T) if "bias" in self else x @ weight.T


class QuantizedConv2d(QuantizedLayer):
    """A 2D convolution."""

    def __init__(self, layer: nn.Conv2d, quantization: Quantization):
        super().__init__(layer, quantization)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups = layer.groups
        self.convolution = getattr(layer, "convolution", "auto")

    def __call__(self, x: mx.array) -> mx.array:
        return self.convolve(x, self.bias if "bias" in self else None)

    def convolve(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """See `Conv2d.convolve`."""
        weight = self.dense_weight(x.dtype)
        options = self.stride, self.padding, self.dilation, self.groups
        return conv2d(x, weight, bias, *options, mode=self.convolution)


class QuantizedTemporalConv(QuantizedLayer):
    """A convolution over frames; see `TemporalConv`."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.convolve(x, self.bias)

    def convolve(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """See `TemporalConv.convolve`."""
        return temporal_conv(x, self.dense_weight(x.dtype), bias)


_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,  # and its subclass PointwiseConv2d
    nn.Conv2d: QuantizedConv2d,
    TemporalConv: QuantizedTemporalConv,
}


def can_quantize(layer: nn.Module) -> bool:
    """Return True if such a layer has a quantized form."""
    return isinstance(layer, tuple(_QUANTIZED))


def quantized(layer: nn.Module, quantization: Quantization) -> QuantizedLayer:
    """Return the quantized form of a layer."""
    return next(form for kind, form in _QUANTIZED.items() if isinstance(layer, kind))(layer, quantization)
