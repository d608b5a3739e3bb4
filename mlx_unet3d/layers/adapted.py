"""A layer with low-rank adapters beside it (LoRA, arXiv:2106.09685)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .convolution import TemporalConv, conv2d, temporal_conv
from .quantized import QuantizedConv2d, QuantizedLayer, QuantizedLinear, QuantizedTemporalConv

ADAPTABLE = (nn.Linear, nn.Conv2d, TemporalConv, QuantizedLayer)
"""Layers that adapters can be put beside."""


@dataclass(frozen=True)
class LowRank:
    """A change of a weight: `scaling * up @ down`, or any change at all.

    Attributes:
        down: (R, I) of a linear layer, (R, h, w, I) of a convolution; without `up`, the whole change in the
            weight's own shape, (O, ...).
        up: (O, R), or None.
        scaling: alpha over rank.
    """

    down: mx.array
    up: mx.array | None
    scaling: float = 1.0

    def change(self) -> mx.array:
        """The change of the weight (O, ...), in float32."""
        down = self.down.astype(mx.float32)
        if self.up is None:
            return self.scaling * down
        flat = down.reshape(down.shape[0], -1)
        return self.scaling * (self.up.astype(mx.float32) @ flat).reshape(-1, *down.shape[1:])


class Branch(nn.Module):
    """One adapter's part in one layer; `weight` is how much of it is used."""

    def __init__(self, low_rank: LowRank, weight: float, dtype: mx.Dtype):
        super().__init__()
        self.down = low_rank.down.astype(dtype)
        if low_rank.up is not None:
            self.up = low_rank.up.astype(dtype)
        self.scaling, self.amount = low_rank.scaling, weight

    def low_rank(self) -> LowRank:
        return LowRank(self.down, self.up if "up" in self else None, self.scaling)


class AdaptedLayer(nn.Module):
    """`base(x)` and what each branch adds to it; adapters can be fused into the weight and taken out again.

    `factor` scales all branches that are not fused, for the `scale` of a single forward.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.branches: dict[str, Branch] = {}
        self.factor = 1.0
        self._original: mx.array | None = None  # underscore: no parameter

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        if self.fused:
            return y
        for branch in self.branches.values():
            amount = branch.amount * branch.scaling * self.factor
            if amount:
                y = y + (amount * self._apply(x, branch)).astype(y.dtype)
        return y

    def _apply(self, x: mx.array, branch: Branch) -> mx.array:
        down = branch.down
        if isinstance(self.base, (nn.Linear, QuantizedLinear)):
            h = x @ down.T
        elif isinstance(self.base, (nn.Conv2d, QuantizedConv2d)):
            h = conv2d(x, down, None, self.base.stride, self.base.padding)
        else:
            h = temporal_conv(x, down)
        return h @ branch.up.T if "up" in branch else h

    @property
    def fused(self) -> bool:
        """Whether the branches are part of the weight at present."""
        return self._original is not None

    def fuse(self, scale: float = 1.0) -> None:
        """Add the branches to the weight, and keep the original one."""
        if isinstance(self.base, QuantizedLayer):
            raise ValueError(
                "an adapter cannot be fused into quantized weights, where most of it would be rounded away; "
                "leave it beside them, or fuse it before quantizing"
            )
        weight = self.base.weight.astype(mx.float32)
        for branch in self.branches.values():
            weight = weight + scale * branch.amount * branch.low_rank().change()
        self._original = self.base.weight
        self.base.weight = weight.astype(self._original.dtype)
        mx.eval(self.base.weight)

    def unfuse(self) -> None:
        """The original weight, bit for bit."""
        if self._original is not None:
            self.base.weight, self._original = self._original, None


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, quantized or not."""
    return tuple(layer.shape if isinstance(layer, QuantizedLayer) else layer.weight.shape)


def layout_of(layer: nn.Module) -> str:
    """The layout that diffusers' files give its weight, see `checkpoints.layouts`."""
    if isinstance(layer, (nn.Conv2d, QuantizedConv2d)):
        return "conv2d"
    if isinstance(layer, (TemporalConv, QuantizedTemporalConv)):
        return "conv3d_temporal"
    return "linear"


def replace_module(model: nn.Module, path: str, module: Any) -> None:
    """Put `module` at a dotted path of `model`."""
    *parents, name = path.split(".")
    parent: Any = model
    for part in parents:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything below, parents first, in order of registration."""
    yield path, module
    for name, child in module.children().items():
        yield from _walk_child(child, f"{path}.{name}" if path else name)


def _walk_child(child: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(child, nn.Module):
        yield from walk(child, path)
    elif isinstance(child, list):
        for i, item in enumerate(child):
            yield from _walk_child(item, f"{path}.{i}")
