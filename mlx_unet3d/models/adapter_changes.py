"""Arrays of an adapter's file -> the change of a layer."""

from dataclasses import replace
from functools import reduce

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.adapter_keys import LayerLoRA, scaling_of
from ..checkpoints.adapters import AdapterFile
from ..checkpoints.layouts import to_mlx
from ..errors import CheckpointError
from ..layers.adapted import ADAPTABLE, AdaptedLayer, LowRank, layout_of, weight_shape
from ..layers.quantized import QuantizedLayer


def change_of(
    file: AdapterFile, component: str, path: str, entry: LayerLoRA, layer: nn.Module
) -> LowRank | None:
    """Return what a file adds to a layer, in MLX's layout; None where it changes nothing.

    Of a module that was saved in full, the change is the difference. CheckpointError for shapes that do not
    fit the layer.
    """
    base = layer.base if isinstance(layer, AdaptedLayer) else layer
    made: list[LowRank | None] = []
    if entry.down is not None:
        low_rank = _low_rank(base, entry.down, entry.up, entry.stable)
        if low_rank is not None and not entry.stable:
            scaling = scaling_of(file, component, path, entry.alpha, low_rank.down.shape[0])
            low_rank = replace(low_rank, scaling=scaling, bias=entry.up_bias)
        made.append(low_rank)
    if entry.change is not None or entry.change_bias is not None:
        weight = None if entry.change is None else _in_shape(base, entry.change)
        made.append(LowRank(weight, None, bias=entry.change_bias))
    if entry.weight is not None or entry.bias is not None:
        made.append(_difference(base, entry))
    shape = weight_shape(base)
    if not all(low_rank is not None and low_rank.matches(shape) for low_rank in made):
        has = {name: value.shape for name, value in vars(entry).items() if isinstance(value, mx.array)}
        there = " and ".join(f"{name} {tuple(size)}" for name, size in has.items())
        raise CheckpointError(
            f"{file.name}: {path} is {shape} here; {there} do not fit it. The adapter is for another network"
        )
    changed = reduce(LowRank.plus, made)
    if entry.weight is None or changed.up is not None:
        return changed
    differs = [mx.any(array).item() for array in (changed.change(), changed.bias) if array is not None]
    return changed if any(differs) else None


def _in_shape(base: nn.Module, weight: mx.array) -> mx.array:
    """Return a weight of a file in MLX's layout; as it is where it does not fit."""
    try:
        return to_mlx(layout_of(base), weight).reshape(weight_shape(base))
    except ValueError:
        return weight


def _difference(base: nn.Module, entry: LayerLoRA) -> LowRank:
    """Return the parameters of a file less those of the layer, of which a missing one counts as zero."""
    weight = bias = None
    if entry.weight is not None:
        dense = base.dense_weight(mx.float32) if isinstance(base, QuantizedLayer) else base.weight
        weight = _in_shape(base, entry.weight).astype(mx.float32)
        weight = weight - dense.astype(mx.float32) if weight.shape == dense.shape else weight
    if entry.bias is not None:
        bias = entry.bias.astype(mx.float32)
        has = base.bias.astype(mx.float32) if "bias" in base else mx.array(0.0)
        bias = bias - has if has.shape in ((), bias.shape) else bias
    return LowRank(weight, None, bias=bias)


def is_change_of(down: mx.array, up: mx.array, layer: nn.Module) -> bool:
    """Return True for a down and an up that fit a layer."""
    base = layer.base if isinstance(layer, AdaptedLayer) else layer
    return _low_rank(base, down, up) is not None


def _low_rank(base: nn.Module, down: mx.array, up: mx.array, stable: bool = False) -> LowRank | None:
    """Combine a down and an up of a file to a change of a layer; None where they do not fit it."""
    shape, layout = weight_shape(base), layout_of(base)
    if not isinstance(base, ADAPTABLE):
        return None
    if stable:
        return _stable_lora(down, up, shape, layout)
    if down.ndim < 2 or up.ndim < 2:
        return None
    rank = down.shape[0]
    try:
        down = to_mlx(layout, _without_ones(down, layout)) if down.ndim > 2 else down
        up = up.reshape(up.shape[0], -1)  # (O, R, 1, 1): a 1x1 convolution
    except ValueError:
        return None
    fits = (rank, *shape[1:]) == down.shape and up.shape == (shape[0], rank) and rank > 0
    return LowRank(down, up) if fits else None


def _without_ones(array: mx.array, layout: str) -> mx.array:
    """Remove the axes of one that a convolution of size 1 has; other arrays stay as they are."""
    if layout == "linear" and array.ndim > 2 and set(array.shape[2:]) == {1}:
        return array.reshape(array.shape[:2])
    return array


def _stable_lora(down: mx.array, up: mx.array, shape: tuple[int, ...], layout: str) -> LowRank | None:
    """Read loralib's layout; None where it does not fit.

    For a convolution with kernel k: (R k, I k) and (O k, R k), whose product is read in the memory order of
    the weight; over frames, the average over a second k.
    """
    down, up = (_without_ones(array, "linear") for array in (down, up))
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        return None
    if layout == "linear":
        return LowRank(down, up) if (up.shape[0], down.shape[1]) == shape else None
    out, height, width, channels = shape
    if (up.shape[0], down.shape[1]) != (out * height, channels * height):
        return None
    product = up.astype(mx.float32) @ down.astype(mx.float32)
    change = product.reshape(out, channels, height, height)
    if layout == "conv3d_temporal":
        change = change.mean(axis=-1, keepdims=True)
    elif height != width:
        return None
    return LowRank(mx.contiguous(change.transpose(0, 2, 3, 1)), None)
