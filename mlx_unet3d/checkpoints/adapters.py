"""Files of LoRA adapters in the spellings of their trainers -> the layers that they change.

| spelling                        | a key                                                          |
|---------------------------------|----------------------------------------------------------------|
| diffusers 0.23, processors      | `[unet.]...attn1.processor.to_q_lora.down.weight`              |
| diffusers 0.23, layers          | `[unet.]...attn1.to_q.lora_layer.down.weight`, `.lora.down.`   |
| PEFT, diffusers since 0.26      | `[unet.]...attn1.to_q.lora_A.weight`, `base_model.model....`   |
| kohya                           | `lora_unet_..._attn1_to_q.lora_down.weight`, `.alpha`          |
| Text-To-Video-Finetuning        | `...attn1.to_q.lora_A` ("stable_lora"; alpha is the rank)      |
| the same, "cloneofsimo" (`.pt`) | none: a list of up, down, up, down, ... over all layers        |

Text encoders: the prefix `text_encoder.` or `lora_te_`. diffusers' keys may have a network alpha beside.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from .config import naming, read_json
from .headers import read_header, read_tensor
from .pickles import is_pickle, read_pickle
from .source import find_folder

LORA_NAMES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CUSTOM_DIFFUSION_NAMES = (
    "pytorch_custom_diffusion_weights.safetensors",
    "pytorch_custom_diffusion_weights.bin",
)
TEXTUAL_INVERSION_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
_PREFIXES = (  # longest first
    ("base_model.model.unet.", "unet"),
    ("base_model.model.text_encoder.", "text_encoder"),
    ("base_model.model.", None),
    ("unet.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
)
_ROLES = (
    (re.compile(r"^(.*)\.processor\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight$"), None),
    (re.compile(r"^(.*)\.(?:lora_layer|lora_linear_layer|lora)\.(down|up)\.weight$"), None),
    (re.compile(r"^(.*)\.lora_(A|B)(?:\.[^.]+)?\.weight$"), None),
    (re.compile(r"^(.*)\.lora_(down|up)\.weight$"), None),
    (re.compile(r"^(.*)\.lora_(A|B)$"), "stable"),
    (re.compile(r"^(.*)\.(alpha|network_alpha)$"), "alpha"),
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
    """What a file holds for one layer: arrays as torch lays them out, and the names of their keys."""

    down: mx.array | None = None
    up: mx.array | None = None
    alpha: float | None = None
    stable: bool = False
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file of adapters.

    Attributes:
        path: of the file; None for arrays in memory.
        tensors: its arrays by key, in torch's layout.
        settings: `r`, `lora_alpha` and so on, of PEFT's config or diffusers' metadata.
    """

    path: Path | None
    tensors: dict[str, mx.array]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return "the adapter" if self.path is None else str(self.path)


def read_adapter(
    source: "str | Path | Mapping[str, mx.array] | AdapterFile",
    *,
    weight_name: str | None = None,
    names: Collection[str] = (*LORA_NAMES, *CUSTOM_DIFFUSION_NAMES),
    **hub: Any,
) -> AdapterFile:
    """Read a file of adapters: safetensors, or a torch pickle as data.

    Args:
        source: the file, a folder or hub id that holds it, or the arrays themselves.
        weight_name: the file's name in the folder; None for the first of `names`.
        hub: `revision`, `subfolder`, `local_files_only`, `token`, `cache_dir`, see `find_folder`.

    Raises:
        FileNotFoundError: there is none; CheckpointError: it is damaged.
    """
    if isinstance(source, AdapterFile):
        return source
    if isinstance(source, Mapping):
        return AdapterFile(None, dict(source), {})
    path = Path(source).expanduser()
    if not path.is_file():
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            raise FileNotFoundError(f"{path} does not exist; give an existing file, a folder or a hub id")
        wanted = [weight_name] if weight_name is not None else list(names)
        folder = find_folder(source, files=(*wanted, "adapter_config.json"), **hub)
        path = next((folder / name for name in wanted if (folder / name).is_file()), None)
        if path is None:
            there = ", ".join(sorted(f.name for f in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{folder} has none of {', '.join(wanted)}; it has {there}. Give the file itself, or its "
                "name by weight_name"
            )
    header = read_pickle(path, lists=True) if is_pickle(path) else read_header(path)
    nbytes = sum(info.nbytes for info in header.tensors.values())
    if nbytes > path.stat().st_size:  # many names for the same data
        raise CheckpointError(
            f"{path}: its tensors take {nbytes} bytes, more than the file; save it again, each tensor once"
        )
    tensors = {key: read_tensor(path, info) for key, info in header.tensors.items()}
    return AdapterFile(path, tensors, _settings(path, header.metadata))


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "lora_adapter_metadata" in metadata:
        with naming(f"{path}: lora_adapter_metadata"):
            settings = json.loads(metadata["lora_adapter_metadata"])
    elif path.name.startswith("adapter_model") and path.with_name("adapter_config.json").is_file():
        settings = read_json(path.with_name("adapter_config.json"))
    else:
        return {}
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: its settings must be an object, not {type(settings).__name__}; download it again"
        )
    return settings


def components_of(file: AdapterFile) -> set[str]:
    """The networks that the file is for; keys without a prefix are the UNet's."""
    return {_owner(key)[0] or "unet" for key in file.tensors}


def learned_token(file: AdapterFile, token: str | None) -> tuple[str, mx.array]:
    """The name and the embeddings (T, E) of a textual inversion (arXiv:2208.01618).

    diffusers' files have the name as their key; files of the web UI have "emb_params" and need `token`.
    Raises CheckpointError for a file that is none, ValueError where `token` is missing.
    """
    if len(file.tensors) != 1:
        keys = ", ".join(key[:200] for key in list(file.tensors)[:4])
        raise CheckpointError(
            f"{file.name} has {len(file.tensors)} tensors ({keys}); a textual inversion has one, under its "
            "token or as emb_params"
        )
    [(key, embeddings)] = file.tensors.items()
    if key == "emb_params" and token is None:
        raise ValueError(f"{file.name} does not say what its token is called; pass token=")
    usable = embeddings.ndim in (1, 2) and embeddings.size and mx.issubdtype(embeddings.dtype, mx.floating)
    if not usable:
        raise CheckpointError(
            f"{file.name}: {key[:200]!r} is {embeddings.dtype} {tuple(embeddings.shape)}, which is no "
            "embedding"
        )
    if len(key) > 200 or not _is_text(key):
        raise CheckpointError(f"{file.name}: {key[:200]!r} is no name of a token; pass another file")
    return token or key, embeddings.reshape(-1, embeddings.shape[-1])


def _is_text(key: str) -> bool:
    """Whether it is valid Unicode; pickles can hold half a character."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_custom_diffusion(file: AdapterFile) -> bool:
    """Whether it is a file of Custom Diffusion."""
    return any("custom_diffusion" in key for key in file.tensors)


def parse_lora(file: AdapterFile, component: str, layers: Collection[str]) -> dict[str, LayerLoRA]:
    """What the file holds for the layers of one network.

    Args:
        component: "unet" or "text_encoder"; keys that name another are passed over.
        layers: paths of the layers that adapters can be put beside, in the order of diffusers.

    Raises CheckpointError for a key that is of no known kind, or names a layer that there is not.
    """
    if file.tensors and all(key.isdecimal() for key in file.tensors):
        return _parse_list(file, layers)
    flattened = {path.replace(".", "_"): path for path in layers}
    found: dict[str, LayerLoRA] = {}
    unmatched = []
    for key, array in file.tensors.items():
        owner, rest = _owner(key)
        if owner not in (None, component):
            continue
        target, role, stable = _role(rest)
        path = target if target in layers else flattened.get(target.replace(".", "_"))
        if role is None or path is None:
            unmatched.append(key)
            continue
        entry = found.setdefault(path, LayerLoRA(stable=stable))
        entry.keys.append(key)
        if role == "alpha":
            if array.size != 1:
                raise CheckpointError(f"{file.name}: {key!r} is {tuple(array.shape)}, which must be a number")
            entry.alpha = float(array.item())
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
        if entry.down is None or entry.up is None:
            raise CheckpointError(
                f"{file.name}: {path} has one half of a LoRA only ({', '.join(entry.keys)}); the file is "
                "incomplete"
            )
    return found


def _parse_list(file: AdapterFile, layers: Collection[str]) -> dict[str, LayerLoRA]:
    if len(file.tensors) != 2 * len(layers):
        raise CheckpointError(
            f"{file.name} is a list of {len(file.tensors)} tensors without names, which must be an up and a "
            f"down of each layer, here {len(layers)}; it is for another network, or for some layers only"
        )
    arrays = iter(file.tensors.values())
    return {path: LayerLoRA(up=next(arrays), down=next(arrays)) for path in layers}


def _owner(key: str) -> tuple[str | None, str]:
    for prefix, component in _PREFIXES:
        if key.startswith(prefix):
            return component, key[len(prefix) :]
    return None, key


def _role(key: str) -> tuple[str, str | None, bool]:
    """The layer, "down", "up" or "alpha", and whether it is of stable_lora."""
    for pattern, kind in _ROLES:
        match = pattern.match(key)
        if match is None:
            continue
        *target, role = match.groups()
        if len(target) == 2:  # a processor's: attention layer, projection
            target = [f"{target[0]}.{target[1]}" + (".0" if target[1] == "to_out" else "")]
        name = target[0]
        if kind == "alpha":
            for end in (".processor", ".lora_layer", ".lora"):
                name = name.removesuffix(end)
            name = re.sub(r"\.processor\.(to_[qkv])_lora$", r".\1", name)
            name = re.sub(r"\.processor\.to_out_lora$", ".to_out.0", name)
            return name, "alpha", False
        return name, {"A": "down", "B": "up"}.get(role, role), kind == "stable"
    return key, None, False


def scaling_of(file: AdapterFile, component: str, path: str, entry: LayerLoRA, rank: int) -> float:
    """Alpha over rank (over its root for rank-stabilised LoRA), by the key, the settings, or one.

    Raises CheckpointError for settings that this package does not know how to use.
    """
    settings = file.settings

    def setting(name: str, default: Any = None) -> Any:
        return settings.get(f"{component}.{name}", settings.get(name, default))

    if setting("use_dora"):
        raise CheckpointError(f"{file.name} is a DoRA, which this package does not read")
    alpha = entry.alpha
    if alpha is None:
        patterns = setting("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file.name}: its alpha_pattern must be an object; download it again")
        expression = next((p for p in patterns if not re.fullmatch(r"[\w.-]*", p)), None)
        if expression is not None:
            raise CheckpointError(
                f"{file.name}: {expression[:200]!r} in its alpha_pattern is a regular expression, which this "
                "package does not read; give each layer's alpha under its name"
            )
        own = next((a for p, a in patterns.items() if path == p or path.endswith(f".{p}")), None)
        alpha = own if own is not None else setting("lora_alpha", rank)
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"{file.name}: alpha of {path} is {alpha!r}, which must be a number")
    return alpha / (math.sqrt(rank) if setting("use_rslora") else rank)
