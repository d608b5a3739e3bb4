"""Files of trainers of cloneofsimo's LoRA: lists of up, down, up, down, ... without names.

Such a trainer changes the layers of some kinds inside all modules of some classes, in the order of torch's
`named_modules`, the order of registration here. No file records the classes: the number and the shapes of the
arrays decide. Sources: `lora_diffusion` of cloneofsimo/lora; `utils/lora.py` of Text-To-Video-Finetuning and
of MotionDirector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations

import mlx.core as mx
import mlx.nn as nn

from ..layers.adapted import AdaptedLayer, layout_of, walk
from ..layers.quantized import QuantizedLinear

# Classes that the trainers' settings name together; any class of a network may be named alone.
_TOGETHER = (
    ("ResnetBlock2D", "TemporalConvLayer", "Transformer2DModel", "TransformerTemporalModel"),
    ("ResnetBlock2D", "TemporalConvLayer", "Attention", "GEGLU"),
)
# MotionDirector leaves out the projections around a transformer, and cross-attention in spatial ones.
_PARTS_OF = {
    "Transformer2DModel": ("attn1", "ff"),
    "TransformerTemporalModel": ("attn1", "attn2", "ff"),
}
# Kinds of layers that a trainer looks for. The first three are those of the trainers.
_KINDS = {
    "": {"linear", "conv2d", "conv3d"},
    "linear layers": {"linear"},
    "linear layers and 2D convolutions": {"linear", "conv2d"},
    "convolutions": {"conv2d", "conv3d"},
    "2D convolutions": {"conv2d"},
    "temporal convolutions": {"conv3d"},
    "linear layers and temporal convolutions": {"linear", "conv3d"},
}
_TRAINED_KINDS = ("", "linear layers", "linear layers and 2D convolutions")


def layers_of_list(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    arrays: Sequence[mx.array],
    matches: Callable[[mx.array, mx.array, nn.Module], bool],
) -> dict[tuple[str, ...], str]:
    """Find the lists of layers that the arrays of a file can be for, and the classes of each.

    Classes that a trainer's settings name come first; any others count only where none of those fits.

    Args:
        layers: the layers that can have adapters, by path, in the order of registration.
        arrays: up, down, up, down, ...
        matches: returns True for a down and an up that are a change of a layer.
    """
    if len(arrays) % 2:
        return {}
    pairs = list(zip(arrays[1::2], arrays[::2], strict=True))
    choices = _Choices(model, layers)
    for candidates in (choices.of_trainers(), choices.of_any_classes(len(pairs))):
        found: dict[int, str] = {}
        for chosen, name in candidates:
            if chosen in found or chosen.bit_count() != len(pairs):
                continue
            paths = choices.paths(chosen)
            if all(matches(*pair, layers[path]) for pair, path in zip(pairs, paths, strict=True)):
                found[chosen] = name
        if found:
            return {choices.paths(chosen): name for chosen, name in found.items()}
    return {}


class _Choices:
    """Sets of the layers of a network, each an integer with a bit a layer, in the order of registration."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        self.layers = list(layers)
        bits = {path: 1 << i for i, path in enumerate(self.layers)}
        self.kinds = {
            name: sum(bits[path] for path, layer in layers.items() if _kind(path, layer) in kinds)
            for name, kinds in _KINDS.items()
        }
        self.classes: dict[str, int] = {}
        self.parts: dict[str, int] = {}
        for root, module in walk(model):
            inside = [path for path in self.layers if not root or path.startswith(f"{root}.")]
            if inside:
                name = type(module).__name__
                self.classes[name] = self.classes.get(name, 0) | sum(bits[path] for path in inside)
                parts = {*_PARTS_OF.get(name, ())}
                own = sum(bits[path] for path in inside if not parts.isdisjoint(path.split(".")))
                self.parts[name] = self.parts.get(name, 0) | own

    def paths(self, chosen: int) -> tuple[str, ...]:
        return tuple(path for i, path in enumerate(self.layers) if chosen >> i & 1)

    def of_trainers(self) -> Iterator[tuple[int, str]]:
        """Sets that the trainers' settings can choose, and their names."""
        together = chain.from_iterable(
            combinations(names, count) for names in _TOGETHER for count in range(2, len(names) + 1)
        )
        for classes in (*((name,) for name in self.classes), *together):
            if self.classes.keys() >= {*classes}:
                union = _union(self.classes[name] for name in classes)
                for kind in _TRAINED_KINDS:
                    yield union & self.kinds[kind], _named(classes, kind)
        for name, parts in _PARTS_OF.items():
            if name in self.classes:
                yield self.parts[name] & self.kinds["linear layers"], f"{', '.join(parts)} of {name}"

    def of_any_classes(self, count: int) -> Iterator[tuple[int, str]]:
        """Sets of `count` layers of one kind or several inside modules of any classes."""
        for kind, layers in self.kinds.items():
            unions: dict[int, tuple[str, ...]] = {0: ()}
            for name, inside in self.classes.items():
                for union, classes in list(unions.items()):
                    larger = union | inside & layers
                    if larger.bit_count() <= count:
                        unions.setdefault(larger, (*classes, name))
            yield from ((union, _named(classes, kind)) for union, classes in unions.items())


def _union(sets: Iterator[int]) -> int:
    union = 0
    for one in sets:
        union |= one
    return union


def _named(classes: Sequence[str], kind: str) -> str:
    return " and ".join(classes) + (f" ({kind})" if kind else "")


def _kind(path: str, layer: nn.Module) -> str:
    """Return the kind of a layer in torch, where a shortcut is a convolution."""
    base = layer.base if isinstance(layer, AdaptedLayer) else layer
    if isinstance(base, (nn.Linear, QuantizedLinear)) and not path.endswith("conv_shortcut"):
        return "linear"
    return "conv3d" if layout_of(base) == "conv3d_temporal" else "conv2d"
