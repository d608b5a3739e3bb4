"""Read files of IP-Adapters: a projection of image embeddings, and weights of the attention to images.

A file has `image_proj.*`, and `ip_adapter.N.to_k_ip.weight` and `to_v_ip` with N = 1, 3, 5, ... for the
layers with cross-attention: down, up, mid.
"""

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.adapters import AdapterFile, read_adapter
from ..checkpoints.config import blame
from ..checkpoints.hub import Hub
from ..errors import CheckpointError
from ..layers.attention import Attention
from ..layers.image_projection import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)

IPAdapterSource = str | Path | Mapping[str, Any] | AdapterFile
"""A file, a folder or a hub id; or arrays in torch's layout by key, or in dicts "image_proj" and
"ip_adapter"."""

_PARTS = ("image_proj", "ip_adapter")
_DIM_HEAD = 64  # of the resamplers of all IP-Adapters; cannot be inferred from shapes

_KINDS = (
    ("FaceID Plus", "perceiver_resampler.proj_in.weight"),
    ("plain", "proj.weight"),
    ("full", "proj.3.weight"),
    ("FaceID", "norm.weight"),
)

KeysValues = list[tuple[mx.array, mx.array]]


def find_files(source: Any, subfolder: Any, weight_name: Any, hub: Hub) -> list[AdapterFile]:
    """Read the files of one or several IP-Adapters; see `IPAdapterMixin.load_ip_adapter`."""
    return [_read(*one, hub) for one in _broadcast(source, subfolder, weight_name)]


def projection_kind(names: Container[str]) -> str:
    """Return the kind of an IP-Adapter by the names of its projection's tensors."""
    for kind, sign in _KINDS:
        if sign in names:
            return kind
    return "plus"


def encoder_needed(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int] | None:
    """Return the config key of the image encoder that a projection decides, and its value.

    Args:
        shapes: of the projection's tensors.

    A plain adapter takes embeddings, "plus" and "full" hidden states; None for one of faces, whose embeddings
    no CLIP makes, and for shapes of no projection.
    """
    kind = projection_kind(shapes)
    name = {"plain": "proj.weight", "full": "proj.0.weight", "plus": "proj_in.weight"}.get(kind, "")
    if len(shapes.get(name, ())) != 2:
        return None
    return "projection_dim" if kind == "plain" else "hidden_size", shapes[name][1]


def encoders_needed(files: Sequence[AdapterFile]) -> list[tuple[str, str, int]]:
    """Return the name of each file that needs an image encoder, and its `encoder_needed`."""
    found = []
    for file in files:
        with blame(file.name):
            shapes = {name: tuple(array.shape) for name, array in _parts(file)[0].items()}
        if (needed := encoder_needed(shapes)) is not None:
            found.append((file.name, *needed))
    return found


def parse_file(file: AdapterFile, layers: Sequence[Attention]) -> tuple[nn.Module, KeysValues]:
    """Return the projection of a file, and the key and value weights of each layer.

    Raises CheckpointError unless the file is an IP-Adapter for these layers and nothing else.
    """
    with blame(file.name):
        image_proj, ip_adapter = _parts(file)
        return _projection(file, image_proj, layers), _keys_values(file, ip_adapter, layers)


def _broadcast(source: Any, subfolder: Any, weight_name: Any) -> list[tuple[Any, Any, Any]]:
    """Return a tuple of source, subfolder and file name for each adapter, from one for all or one each."""
    given = {"source": source, "subfolder": subfolder, "weight_name": weight_name}
    lists = {k: list(v) if isinstance(v, list | tuple) else [v] for k, v in given.items()}
    count = max(map(len, lists.values()))
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise ValueError(
                f"load_ip_adapter: {name} has {len(values)} entries, another list {count}; give one for all "
                "or one for each IP-Adapter"
            )
    return list(zip(*(v * count if len(v) == 1 else v for v in lists.values()), strict=True))


def _read(source: IPAdapterSource, subfolder: str | None, weight_name: str | None, hub: Hub) -> AdapterFile:
    if isinstance(source, Mapping):
        flat = {
            f"{part}.{key}": array
            for part in _PARTS
            if isinstance(source.get(part), Mapping)
            for key, array in source[part].items()
        }
        return AdapterFile(None, flat or dict(source), {})
    if not isinstance(source, AdapterFile) and weight_name is None and Path(source).expanduser().is_dir():
        raise ValueError(f"{source} is a folder; give the file in it, or its name by weight_name")
    return read_adapter(source, weight_name=weight_name, names=(), subfolder=subfolder, hub=hub)


def _parts(file: AdapterFile) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Return the arrays of "image_proj" and "ip_adapter"; CheckpointError unless a file has both and nothing
    else."""
    found: dict[str, dict[str, mx.array]] = {part: {} for part in _PARTS}
    others = []
    for key, array in file.tensors.items():
        part, _, name = key.partition(".")
        (found[part].__setitem__(name, array) if part in found else others.append(key))
    if others or not all(found.values()):
        what = f"has {others[0][:200]!r}" if others else "lacks a part"
        raise CheckpointError(
            f"{file.name} is no IP-Adapter: it {what}; one has image_proj.* and ip_adapter.* and nothing else"
        )
    return found["image_proj"], found["ip_adapter"]


_LAYER = re.compile(r"(\d+)\.to_([kv])_ip\.weight")


def _keys_values(
    file: AdapterFile, arrays: Mapping[str, mx.array], layers: Sequence[Attention]
) -> list[tuple[mx.array, mx.array]]:
    """Return the key and value weights of each layer; CheckpointError where they do not match the layers."""
    lora = next((key for key in arrays if "_lora." in key), None)
    if lora is not None:
        raise CheckpointError(
            f"{file.name} is a FaceID with a LoRA inside (ip_adapter.{lora[:200]}), which this package does "
            "not read; take an IP-Adapter without"
        )
    wanted = {
        f"{2 * i + 1}.to_{letter}_ip.weight": (attn.heads * attn.dim_head, attn.cross_attention_dim)
        for i, attn in enumerate(layers)
        for letter in "kv"
    }
    differing = sorted(wanted.keys() ^ arrays.keys()) or [
        key for key, shape in wanted.items() if tuple(arrays[key].shape) != shape
    ]
    if differing:
        first = differing[0]
        has, needs = (tuple(arrays[first].shape) if first in arrays else "none"), wanted.get(first, "none")
        raise CheckpointError(
            f"{file.name}: {len(differing)} tensors of ip_adapter do not fit the {len(layers)} layers with "
            f"cross-attention of this network, the first is {first[:200]!r}: the file has {has}, the network "
            f"needs {needs}. It is for another base model"
        )
    return [
        (arrays[f"{2 * i + 1}.to_k_ip.weight"], arrays[f"{2 * i + 1}.to_v_ip.weight"])
        for i in range(len(layers))
    ]


def _projection(file: AdapterFile, arrays: Mapping[str, mx.array], layers: Sequence[Attention]) -> nn.Module:
    """Return the projection with these weights; CheckpointError for unknown ones, and for another width of
    text."""

    def shape(key: str, axes: int = 2) -> tuple[int, ...]:
        if key not in arrays or arrays[key].ndim != axes:
            raise CheckpointError(
                f"{file.name}: image_proj.{key} is missing or does not have {axes} axes; the "
                "file has no image projection of a known kind"
            )
        return tuple(arrays[key].shape)

    kind = projection_kind(arrays)
    if kind == "FaceID Plus":
        raise CheckpointError(
            f"{file.name} is a FaceID Plus, which this package does not read; take a plain, plus or full "
            "IP-Adapter"
        )
    names: dict[str, mx.array] = dict(arrays)
    if kind == "plain":
        (width,), (out, dim) = shape("norm.weight", 1), shape("proj.weight")
        layer: nn.Module = ImageProjection(dim, width, max(out // width, 1))
        names = {key.replace("proj.", "image_embeds."): a for key, a in arrays.items()}
    elif kind == "full":
        (width,), (_, dim) = shape("proj.3.weight", 1), shape("proj.0.weight")
        layer = IPAdapterFullImageProjection(dim, width)
        names = _renamed(arrays, _FULL)
    elif kind == "FaceID":
        (width,), (inner, dim), (out, _) = (
            shape("norm.weight", 1),
            shape("proj.0.weight"),
            shape("proj.2.weight"),
        )
        layer = IPAdapterFaceIDImageProjection(dim, width, max(inner // dim, 1), max(out // width, 1))
        names = _renamed(arrays, _FULL)
    else:
        (_, queries, hidden), (_, dim) = shape("latents", 3), shape("proj_in.weight")
        (width, _), names = shape("proj_out.weight"), _resampler_names(arrays)
        depth = len({key.split(".")[1] for key in names if key.startswith("layers.")})
        heads = names["layers.0.attn.to_q.weight"].shape[0] // _DIM_HEAD if depth else 1
        inner = names["layers.0.ff.1.net.0.proj.weight"].shape[0] if depth else hidden
        layer = IPAdapterPlusImageProjection(
            dim, width, hidden, depth, heads=heads, num_queries=queries, ffn_ratio=inner / hidden
        )
    wanted = {key: tuple(array.shape) for key, array in tree_flatten(layer.parameters())}
    has = {key: tuple(array.shape) for key, array in names.items()}
    if wanted != has:
        first = sorted(key for key in wanted.keys() | has.keys() if wanted.get(key) != has.get(key))[0]
        raise CheckpointError(
            f"{file.name}: the tensors of image_proj do not make up a {type(layer).__name__}, the first that "
            f"differs is {first[:200]!r}: {has.get(first, 'none')} instead of {wanted.get(first, 'none')}"
        )
    text = layers[0].cross_attention_dim
    if width != text:
        raise CheckpointError(
            f"{file.name} makes tokens of {width} channels, the text of this network has {text}; it is for "
            "another base model"
        )
    layer.load_weights(list(names.items()))
    return layer


_FULL = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"}
_RESAMPLER = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}


def _renamed(arrays: Mapping[str, mx.array], names: Mapping[str, str]) -> dict[str, mx.array]:
    """Return the arrays with modules renamed by `names`."""
    made = {}
    for key, array in arrays.items():
        module, _, parameter = key.rpartition(".")
        made[f"{names.get(module, module)}.{parameter}"] = array
    return made


def _resampler_names(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the arrays of a resampler under the names of `IPAdapterPlusImageProjection`."""
    made = {}
    for key, array in arrays.items():
        match = re.fullmatch(r"(layers\.\d+)\.(\d\.\w+)\.(\w+)", key)
        if match is None:
            made[key] = array
        elif match[2] == "0.to_kv" and array.ndim == 2 and array.shape[0] % 2 == 0:
            for name, half in zip(("to_k", "to_v"), mx.split(array, 2), strict=True):
                made[f"{match[1]}.attn.{name}.{match[3]}"] = half
        else:
            made[f"{match[1]}.{_RESAMPLER.get(match[2], match[2])}.{match[3]}"] = array
    return made
