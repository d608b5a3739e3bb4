"""Which layers of a network are quantized, and how: recipes, and what the config says of them."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from ..errors import CheckpointError
from ..layers.adapted import replace_module
from ..layers.quantized import Quantization, QuantizedLayer, can_quantize, quantized

RECIPES = ("mixed", "uniform", "linear")
"""Names of recipes: "uniform", all linear layers and convolutions alike; "mixed", the same, with the first,
last and time layers, shortcuts, and what leads into and out of a transformer in 8 bits; "linear", linear
layers and 1x1 convolutions alone."""

# Few weights, and every frame of every step passes through them.
_SENSITIVE = re.compile(
    r"(^|\.)(conv_in|conv_out|time_embedding|time_emb_proj|transformer_in|conv_shortcut|proj_in|proj_out)(\.|$)"
)


def choose(model: nn.Module, quantization: Quantization, recipe: str = "mixed") -> dict[str, Quantization]:
    """How each layer is quantized, by its path; layers that are left out, or whose rows do not divide into
    groups, are not in it.

    Raises ValueError for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not known; use {', '.join(RECIPES)}")
    fine = Quantization(8, 64 if quantization.mode == "nvfp4" else quantization.group_size)
    if quantization.mode.startswith("mx"):
        fine = Quantization(mode="mxfp8")
    if quantization.bits == 8:
        fine = quantization
    chosen = {}
    for path, layer in model.named_modules():
        if not can_quantize(layer) or (recipe == "linear" and not isinstance(layer, nn.Linear)):
            continue
        own = fine if recipe == "mixed" and _SENSITIVE.search(path) else quantization
        if own.applies_to(tuple(layer.weight.shape)):
            chosen[path] = own
    return chosen


def quantize_layers(model: nn.Module, chosen: Mapping[str, Quantization]) -> None:
    """Give layers their quantized form, in place."""
    layers = dict(model.named_modules())
    for path, quantization in chosen.items():
        replace_module(model, path, quantized(layers[path], quantization))


def to_config(chosen: Mapping[str, Quantization]) -> dict[str, Any]:
    """The entry "quantization" of `config.json`, as MLX's other libraries have it: the most common settings,
    and under the paths of the layers that differ their own."""
    counts: dict[Quantization, int] = {}
    for quantization in chosen.values():
        counts[quantization] = counts.get(quantization, 0) + 1
    common = max(counts, key=counts.__getitem__)
    others = {path: own.to_dict() for path, own in sorted(chosen.items()) if own != common}
    return common.to_dict() | others


def from_config(entry: Any, where: str) -> tuple[Quantization, dict[str, Quantization]]:
    """The common settings and those of single layers that `to_config` wrote.

    Raises CheckpointError for anything else.
    """
    try:
        own = {key: value for key, value in entry.items() if isinstance(value, dict)}
        common = {key: value for key, value in entry.items() if key not in own}
        return Quantization(**common), {path: Quantization(**value) for path, value in own.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: quantization={entry!r} must hold group_size, bits and mode ({error}); convert the "
            "checkpoint again"
        ) from error


def choose_as(model: nn.Module, entry: Any, keys: frozenset[str], where: str) -> dict[str, Quantization]:
    """How the layers whose scales are among the `keys` of a checkpoint are quantized.

    Raises CheckpointError where the settings are malformed or cannot be those of a layer.
    """
    common, own = from_config(entry, where)
    chosen = {}
    for path, layer in model.named_modules():
        if f"{path}.scales" not in keys or not can_quantize(layer):
            continue
        chosen[path] = own.get(path, common)
        if not chosen[path].applies_to(tuple(layer.weight.shape)):
            raise CheckpointError(
                f"{where}: {path} is {tuple(layer.weight.shape)}, which does not divide into groups of "
                f"{chosen[path].group_size}; config.json and the weights do not belong together"
            )
    return chosen


def quantizations(model: nn.Module) -> dict[str, Quantization]:
    """How each quantized layer is quantized, by path; those of `mlx.nn.quantize` as well.

    Raises ValueError for quantized embeddings, which no checkpoint of this package holds.
    """
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            found[path] = layer.quantization
        elif isinstance(layer, nn.QuantizedLinear):
            found[path] = Quantization(layer.bits, layer.group_size, layer.mode)
        elif isinstance(layer, nn.QuantizedEmbedding):
            raise ValueError(f"{path} is a quantized embedding, which cannot be saved; use model.quantize()")
    return found
