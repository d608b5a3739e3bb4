"""Keys of LoRA files -> the layers that they change, and how much.

A key is what may stand in front (see `_FRONT`, in any nesting), the name of a layer in one of the spellings
that its network knows, and a role (see `_ROLES`). Names are compared with "_" for every ".", as kohya writes
them. The network is told by the layer, else by what stands in front, else it is the one that is asked.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from .adapters import AdapterFile
from .patterns import first_match
from .prefixes import without_wrappers

# Longest first, and the network that each names.
_FRONT = (
    ("cond_stage_model_model_", "text_encoder"),
    ("cond_stage_model_", "text_encoder"),
    ("model_diffusion_model_", "unet"),
    ("base_model_model_", None),
    ("text_encoder_2_", "text_encoder_2"),
    ("diffusion_model_", "unet"),
    ("text_encoder_", "text_encoder"),
    ("base_model_", None),
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("model_", None),
    ("unet_", "unet"),
)
_LAYERS = (
    (
        "text_encoder",
        re.compile(
            r"(?:text_model_)?(?:(?:encoder_layers|(?:transformer_)?resblocks)_\d|embeddings_|final_layer_)"
        ),
    ),
    (
        "unet",
        re.compile(
            r"(?:down_blocks|up_blocks|input_blocks|middle_block|output_blocks|out)_\d|mid_block_|time_embed"
            r"|transformer_in_|conv_in$|conv_out$|conv_norm_out$"
        ),
    ),
)
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
_CHANGES = {"diff": "change", "diff_b": "change_bias", "w_norm": "change", "b_norm": "change_bias"}
_ROLES = (
    ("half", re.compile(r"(.*?)\.(?:processor\.)?(\w+)_lora\.(down|up)\.(weight|bias)")),
    ("half", re.compile(r"(.*)()\.(?:lora_layer|lora_linear_layer|lora)\.(down|up)\.(weight|bias)")),
    ("half", re.compile(r"(.*)()\.lora_(A|B)(?:\.[^.]+)?\.(weight|bias)")),
    ("half", re.compile(r"(.*)()\.lora_(down|up)\.(weight|bias)")),
    ("stable", re.compile(r"(.*)\.lora_(A|B)")),
    ("alpha", re.compile(r"(.*?)(?:\.processor)?(?:\.lora_layer|\.lora|_lora)?\.(?:alpha|network_alpha)")),
    ("change", re.compile(r"(.*)\.(diff|diff_b|w_norm|b_norm)")),
    ("saved", re.compile(r"(.*?)(?:\.modules_to_save\.[^.]+|\.base_layer)?\.(weight|bias)")),
)
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lora_mid": "LoCon with a middle (Tucker) matrix",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "lora_embedding_": "LoRA of an embedding",
}


@dataclass
class LayerLoRA:
    """The entries of a file for one layer: arrays as torch lays them out, and the names of their keys.

    Attributes:
        down, up, alpha, up_bias: of a low-rank change; `stable` for loralib's layout.
        change, change_bias: what is added to the weight and the bias.
        weight, bias: what takes their place (PEFT's modules_to_save).
    """

    down: mx.array | None = None
    up: mx.array | None = None
    alpha: float | None = None
    up_bias: mx.array | None = None
    stable: bool = False
    change: mx.array | None = None
    change_bias: mx.array | None = None
    weight: mx.array | None = None
    bias: mx.array | None = None
    keys: list[str] = field(default_factory=list)

    def shown(self) -> str:
        """Its keys, for a message."""
        return ", ".join(key[:200] for key in self.keys)


def flat(name: str) -> str:
    """The name of a layer as it is compared."""
    return name.replace(".", "_")


def is_list(file: AdapterFile) -> bool:
    """Return True for a list of tensors without names."""
    return bool(file.tensors) and all(key.isdecimal() for key in file.tensors)


def components_of(file: AdapterFile) -> set[str]:
    """The networks that the keys of a file are for, "unet" where nothing tells."""
    return {_named(_role(key)[1])[0] or "unet" for key in file.tensors}


def entry_of(file: AdapterFile, layer: str) -> dict[str, mx.array]:
    """Return the arrays that a file has for one layer, by their fields of `LayerLoRA`."""
    roles = {key: _role(key) for key in file.tensors}
    return {
        role: file.tensors[key]
        for key, (kind, stem, role) in roles.items()
        if kind is not None and _named(stem)[1] == flat(layer)
    }


def parse_lora(file: AdapterFile, component: str, names: Mapping[str, str]) -> dict[str, LayerLoRA]:
    """Read the entries of a file for the layers of one network.

    Args:
        component: "unet" or "text_encoder"; keys for another are passed over.
        names: the path of each layer by all its names, `flat`.

    Raises CheckpointError for a key that is of no known kind, or names a layer that there is not.
    """
    found: dict[str, LayerLoRA] = {}
    unmatched, roles = [], {key: _role(key) for key in file.tensors}
    saves = any(kind == "half" for kind, _, _ in roles.values()) or bool(file.settings.get("modules_to_save"))
    for key, array in file.tensors.items():
        kind, stem, role = roles[key]
        if ".original_module." in key:  # beside the one of modules_to_save that took its place
            continue
        owner, bare = _named(stem)
        if owner not in (None, component):
            continue
        path = names.get(bare)
        if path is None or kind is None or (kind == "saved" and not (saves or ".modules_to_save." in key)):
            unmatched.append(key)
            continue
        entry = found.setdefault(path, LayerLoRA())
        entry.keys.append(key)
        entry.stable = entry.stable or kind == "stable"
        if kind == "alpha":
            if array.size != 1:
                raise CheckpointError(f"{file.name}: {key!r} is {tuple(array.shape)}, which must be a number")
            entry.alpha = float(array.item())
        elif getattr(entry, role) is not None:
            raise CheckpointError(f"{file.name}: {entry.shown()} are for the same layer; leave one of them")
        else:
            setattr(entry, role, array)
    if unmatched:
        kinds = {name for part, name in _OTHER_KINDS.items() for key in unmatched if part in key}
        kind = f" ({' and '.join(sorted(kinds))}, which this package does not read)" if kinds else ""
        raise CheckpointError(
            f"{file.name}: {len(unmatched)} of {len(file.tensors)} tensors fit no layer of the {component}"
            f"{kind}, the first is {unmatched[0][:200]!r}; it is for another network, or of another kind"
        )
    for path, entry in found.items():
        halves = entry.down is not None, entry.up is not None
        alone = not any(halves) and (entry.up_bias is not None or entry.alpha is not None)
        if any(halves) != all(halves) or alone:
            raise CheckpointError(
                f"{file.name}: {path} has one half of a LoRA only ({entry.shown()}); the file is incomplete"
            )
    return found


def _role(key: str) -> tuple[str | None, str, str]:
    """The kind of `_ROLES`, the name of the layer with what stands in front, and the field of `LayerLoRA`."""
    key = without_wrappers(key)
    for kind, pattern in _ROLES:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        stem, *rest = match.groups()
        if kind == "half":
            projection, half, name = rest
            role = _HALVES[half] if name == "weight" else "up_bias"
            if name == "bias" and _HALVES[half] != "up":
                continue
            return kind, f"{stem}.{projection}" if projection else stem, role
        if kind == "stable":
            return kind, stem, _HALVES[rest[0]]
        if kind == "change":
            return kind, stem, _CHANGES[rest[0]]
        return kind, stem, rest[0] if rest else ""
    return None, key, ""


def _named(stem: str) -> tuple[str | None, str]:
    """The network that a layer belongs to, None where nothing tells, and the layer's name, `flat`."""
    name, named = flat(stem), None
    while True:
        owner = next((network for network, pattern in _LAYERS if pattern.match(name)), None)
        front = next((entry for entry in _FRONT if name.startswith(entry[0])), None)
        if owner is not None or front is None:
            second = owner is not None and named is not None and named.startswith(owner)
            return named if second else owner or named, name  # both text encoders have the same layers
        name, named = name[len(front[0]) :], front[1] or named


def scaling_of(file: AdapterFile, component: str, path: str, alpha: float | None, rank: int) -> float:
    """Alpha over rank (over its root for rank-stabilised LoRA), by the key, the settings, or one.

    Raises CheckpointError for settings that this package does not know how to use.
    """
    settings = file.settings

    def setting(name: str, default: Any = None) -> Any:
        return settings.get(f"{component}.{name}", settings.get(name, default))

    if setting("use_dora"):
        raise CheckpointError(f"{file.name} is a DoRA, which this package does not read")
    if alpha is None:
        patterns = setting("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file.name}: its alpha_pattern must be an object; download it again")
        try:
            pattern = first_match(patterns, path)
        except ValueError as error:
            raise CheckpointError(f"{file.name}: alpha_pattern: {error}") from error
        alpha = setting("lora_alpha", rank) if pattern is None else patterns[pattern]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"{file.name}: alpha of {path} is {alpha!r}, which must be a number")
    return alpha / (math.sqrt(rank) if setting("use_rslora") else rank)
