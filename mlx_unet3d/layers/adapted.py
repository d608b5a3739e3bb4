"""Layers with adapters beside them: low-rank changes (LoRA, arXiv:2106.09685), and changes in full."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..scalars import as_finite
from .convolution import TemporalConv, conv2d, temporal_conv
from .quantized import QuantizedConv2d, QuantizedLayer, QuantizedLinear, QuantizedTemporalConv

ADAPTABLE = (nn.Linear, nn.Conv2d, TemporalConv, QuantizedLayer)
"""Layers that can have low-rank changes beside them."""

CHANGEABLE = (*ADAPTABLE, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
"""Layers whose weight and bias an adapter can replace."""

PROCESSORS = "processors"
"""The name of the adapter that holds the layers of LoRA processors."""

_scale: ContextVar[float] = ContextVar("adapter_scale", default=1.0)


def adapter_scale() -> float:
    """Return the scale of all adapters in the running forward."""
    return _scale.get()


@contextmanager
def scaled_adapters(scale: Any) -> Iterator[None]:
    """Multiply all adapters by `scale` in forwards of this thread inside the block; None changes nothing.

    Modules are not changed. Raises ValueError for anything but a finite number.
    """
    if scale is None:
        yield
        return
    token = _scale.set(as_finite("cross_attention_kwargs: scale", scale))
    try:
        yield
    finally:
        _scale.reset(token)


@dataclass(frozen=True)
class LowRank:
    """A change of a layer: of its weight, `scaling * up @ down` or any change at all, and of its bias.

    Attributes:
        down: (R, I) of a linear layer, (R, h, w, I) of a convolution; without `up`, the full change in the
            weight's own shape; None for a change of the bias alone.
        up: (O, R), or None.
        scaling: alpha over rank.
        bias: (O,), also multiplied by `scaling`; None for none.
    """

    down: mx.array | None
    up: mx.array | None
    scaling: float = 1.0
    bias: mx.array | None = None

    def change(self) -> mx.array:
        """Return the change of the weight (O, ...) in float32; zero for a change of the bias alone."""
        if self.down is None:
            return mx.array(0.0)
        down = self.down.astype(mx.float32)
        if self.up is None:
            return self.scaling * down
        flat = down.reshape(down.shape[0], -1)
        return self.scaling * (self.up.astype(mx.float32) @ flat).reshape(-1, *down.shape[1:])

    def matches(self, shape: tuple[int, ...]) -> bool:
        """Return True if a layer with a weight of this shape can have this change."""
        full = self.up is None and self.down is not None
        return (not full or self.down.shape == shape) and (self.bias is None or self.bias.shape == shape[:1])

    def plus(self, other: "LowRank") -> "LowRank":
        """Return the sum of both changes."""
        biases = [c.scaling * c.bias.astype(mx.float32) for c in (self, other) if c.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        if other.down is None and self.scaling:
            return replace(self, bias=None if bias is None else bias / self.scaling)
        change = self.change() + other.change()
        return LowRank(change if change.ndim else None, None, bias=bias)


class Branch(nn.Module):
    """One adapter's change of one layer, scaled by `amount`."""

    def __init__(self, low_rank: LowRank, amount: float, dtype: mx.Dtype):
        super().__init__()
        for name in ("down", "up", "bias"):
            array = getattr(low_rank, name)
            if array is not None:
                self[name] = array.astype(dtype)
        self.scaling, self.amount = low_rank.scaling, amount

    def low_rank(self) -> LowRank:
        """Return the change of the layer."""
        return LowRank(self.get("down"), self.get("up"), self.scaling, self.get("bias"))

    def beside(self, base: nn.Module, x: mx.array) -> mx.array:
        """Return the term added to the output of a linear layer or convolution for x."""
        if "down" not in self:
            return self.scaling * self.bias
        if isinstance(base, (nn.Linear, QuantizedLinear)):
            h = x @ self.down.T
        elif isinstance(base, (nn.Conv2d, QuantizedConv2d)):
            h = conv2d(x, self.down, None, base.stride, base.padding)
        else:
            h = temporal_conv(x, self.down)
        h = h @ self.up.T if "up" in self else h
        return self.scaling * (h + self.bias if "bias" in self else h)


class AdaptedLayer(nn.Module):
    """A layer and its branches, which can be fused into the weight and taken out again.

    Branches are computed beside a linear layer or convolution; other layers run with changed parameters.
    Attributes of the layer can be read from here, and its parameters with the changes applied.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.branches: dict[str, Any] = {}  # of `Branch` and classes with its methods
        self._originals: dict[str, mx.array] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "convolve" or "base" not in self:
                raise
        if name in ("weight", "bias"):
            return self._changed()[name]
        return getattr(self.base, name)

    def __call__(self, x: mx.array, *args: Any, **keywords: Any) -> mx.array:
        if not isinstance(self.base, ADAPTABLE):
            return self._changed()(x, *args, **keywords)
        y = self.base(x, *args, **keywords)
        if self.fused:
            return y
        for branch in self.branches.values():
            amount = branch.amount * adapter_scale()
            if amount:
                y = y + (amount * branch.beside(self.base, x)).astype(y.dtype)
        return y

    def _changed(self) -> nn.Module:
        """Return the layer with the changes of the branches applied to its parameters."""
        parts = [(b.low_rank(), b.amount * adapter_scale()) for b in self.branches.values()]
        parts = [(change, amount) for change, amount in parts if amount] if not self.fused else []
        if not parts:
            return self.base
        changed = copy.copy(self.base)
        for name, array in _with_changes(self.base, parts).items():
            changed[name] = array
        return changed

    @property
    def fused(self) -> bool:
        """True while the branches are part of the parameters."""
        return self._originals is not None

    def fuse(self, scale: float = 1.0) -> None:
        """Add the branches to the parameters, and keep the original ones.

        Raises ValueError for quantized weights, and for a bias where the layer has none.
        """
        if isinstance(self.base, QuantizedLayer):
            raise ValueError(
                "an adapter cannot be fused into quantized weights, where most of it would be rounded away; "
                "leave it beside them, or fuse it before quantizing"
            )
        parts = [(branch.low_rank(), scale * branch.amount) for branch in self.branches.values()]
        changed = _with_changes(self.base, parts)
        mx.eval(changed)
        self._originals = {name: self.base[name] for name in changed}
        for name, array in changed.items():
            self.base[name] = array

    def unfuse(self) -> None:
        """Restore the original parameters bit for bit."""
        for name, array in (self._originals or {}).items():
            self.base[name] = array
        self._originals = None


def _with_changes(base: nn.Module, parts: list[tuple[LowRank, float]]) -> dict[str, mx.array]:
    """Return the parameters of a layer with changes, each multiplied by its amount."""
    weight = base.weight.astype(mx.float32)
    for change, amount in parts:
        weight = weight + amount * change.change()
    made = {"weight": weight.astype(base.weight.dtype)}
    biases = [(amount * change.scaling) * change.bias for change, amount in parts if change.bias is not None]
    if biases:
        if "bias" not in base:
            raise ValueError(
                "an adapter has a bias for a layer that has none, and cannot be fused; leave it beside"
            )
        made["bias"] = sum((b.astype(mx.float32) for b in biases), base.bias).astype(base.bias.dtype)
    return made


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, quantized or not."""
    return tuple(layer.shape if isinstance(layer, QuantizedLayer) else layer.weight.shape)


def layout_of(layer: nn.Module) -> str:
    """Return the layout of the layer's weight in diffusers' files, see `checkpoints.layouts`."""
    if isinstance(layer, (nn.Conv2d, QuantizedConv2d)):
        return "conv2d"
    if isinstance(layer, (TemporalConv, QuantizedTemporalConv)):
        return "conv3d_temporal"
    return "linear" if isinstance(layer, ADAPTABLE) else "identity"


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
    """Yield (path, module) of all modules, parents first, in order of registration."""
    yield path, module
    for name, child in module.children().items():
        yield from _walk_child(child, f"{path}.{name}" if path else name)


def _walk_child(child: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(child, nn.Module):
        yield from walk(child, path)
    elif isinstance(child, list):
        for i, item in enumerate(child):
            yield from _walk_child(item, f"{path}.{i}")
