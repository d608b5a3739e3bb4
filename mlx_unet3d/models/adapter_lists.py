"""Files of trainers of cloneofsimo's LoRA: lists of up, down, up, down, ... without names.

Such a trainer adapts the layers inside all modules of some classes, in the order of torch's `named_modules`,
which is the order of registration here. The files do not name the classes; the number and shapes of the
arrays identify them. Sources: `lora_diffusion` of cloneofsimo/lora; `utils/lora.py` of
Text-To-Video-Finetuning and of MotionDirector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations

import mlx.core as mx
import mlx.nn as nn

from ..layers.adapted import AdaptedLayer, walk
from ..layers.quantized import QuantizedLinear

# Classes in the trainers' settings: one of these, or several that do not contain each other.
_ALONE = (
    "UNet3DConditionModel",
    "BasicTransformerBlock",
    "CrossAttnDownBlock3D",
    "DownBlock3D",
    "UNetMidBlock3DCrossAttn",
    "CrossAttnUpBlock3D",
    "UpBlock3D",
    "CLIPTextModel",
    "CLIPEncoderLayer",
    "CLIPAttention",
    "CLIPMLP",
)
_TOGETHER = (
    ("ResnetBlock2D", "TemporalConvLayer", "Transformer2DModel", "TransformerTemporalModel"),
    ("ResnetBlock2D", "TemporalConvLayer", "Attention", "GEGLU"),
)
# MotionDirector leaves out the projections around a transformer, and cross-attention in spatial ones.
_PARTS_OF = {
    "Transformer2DModel": ("attn1", "ff"),
    "TransformerTemporalModel": ("attn1", "attn2", "ff"),
}


def layers_of_list(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    arrays: Sequence[mx.array],
    matches: Callable[[mx.array, mx.array, nn.Module], bool],
) -> dict[tuple[str, ...], str]:
    """Return the lists of layers that match the arrays of a file, each with the names of its classes.

    Args:
        layers: the layers that can have adapters, by path, in the order of registration.
        arrays: up, down, up, down, ...
        matches: returns True if a down and an up have the shapes of a change of a layer.
    """
    pairs = list(zip(arrays[1::2], arrays[::2], strict=False))
    found: dict[tuple[str, ...], str] = {}
    if len(arrays) % 2:
        return found
    for name, paths in _candidates(model, layers):
        if len(paths) != len(pairs) or paths in found:
            continue
        if all(matches(*pair, layers[path]) for pair, path in zip(pairs, paths, strict=True)):
            found[paths] = name
    return found


def _candidates(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the choices of classes that a trainer offers, each with the paths of the layers that it
    adapts."""
    modules = [(path, type(module).__name__) for path, module in walk(model)]
    there = {name for _, name in modules}
    together = chain.from_iterable(
        combinations(names, count) for names in _TOGETHER for count in range(1, len(names) + 1)
    )
    linear = [path for path, layer in layers.items() if _is_linear(path, layer)]
    for classes in dict.fromkeys((*((name,) for name in _ALONE), *together)):
        if not there.issuperset(classes):
            continue
        roots = [path for path, name in modules if name in classes]
        for kind, paths in ("", list(layers)), (" (linear layers)", linear):
            inside = tuple(
                path for root in roots for path in paths if not root or path.startswith(f"{root}.")
            )
            yield " and ".join(classes) + kind, tuple(dict.fromkeys(inside))
    for name, parts in _PARTS_OF.items():
        roots = [path for path, kind in modules if kind == name]
        inside = (path for root in roots for path in linear if path.startswith(f"{root}."))
        chosen = (path for path in inside if not {*parts}.isdisjoint(path.split(".")))
        yield f"{', '.join(parts)} of {name}", tuple(chosen)


def _is_linear(path: str, layer: nn.Module) -> bool:
    """Return True if torch has a linear layer at this path; there, shortcuts are convolutions."""
    base = layer.base if isinstance(layer, AdaptedLayer) else layer
    return isinstance(base, (nn.Linear, QuantizedLinear)) and not path.endswith("conv_shortcut")
