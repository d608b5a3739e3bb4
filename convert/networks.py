"""What becomes of each tensor of one network."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_unet3d.checkpoints import (
    Header,
    TensorInfo,
    file_shapes,
    find_folder,
    pickle_files,
    read_header,
    read_json,
    read_pickle,
    weight_files,
)
from mlx_unet3d.checkpoints.config import naming
from mlx_unet3d.checkpoints.matching import file_format, majority_dtype, match
from mlx_unet3d.checkpoints.pickles import is_pickle
from mlx_unet3d.checkpoints.quantization import to_config
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.models.pretrained import PretrainedModel

from .kinds import Kind, kind_of
from .plan import ComponentPlan, TensorPlan
from .recognition import Recognized, weight_files_in


@dataclass(frozen=True)
class Ways:
    """What is asked for, of every network."""

    dtype: mx.Dtype | None
    layout: str
    variant: str | None
    quantization: Quantization | None
    recipe: str

    def quantize(self, model: PretrainedModel, alone: bool) -> dict[str, Quantization]:
        """How the layers of a network, of a pipeline or alone, are quantized."""
        if self.quantization is None:
            return {}
        return kind_of(type(model)).quantize(model, self.quantization, self.recipe, alone)


def plan_component(
    source: str | Path,
    name: str,
    kind: Kind,
    ways: Ways,
    hub: dict[str, Any],
) -> ComponentPlan:
    """A network of a diffusers folder."""
    cls = kind.cls
    folder, files, reason = _find_weights(source, name, cls, ways.variant, hub)
    config = read_json(folder / "config.json")
    cls.check_class_name(config, str(folder / "config.json"))
    if "quantization" in config:
        raise CheckpointError(f"{folder} is quantized already; convert the checkpoint that it was made of")
    headers = {path: read_pickle(path) if is_pickle(path) else read_header(path) for path in files}
    with naming(folder / "config.json"):
        model = cls.from_config(config)
    tensors, names = _plan_tensors(str(folder), model, headers, cls.rename_key, ways, alone=not name)
    dropped = [key for _, key, _ in _tensors(headers) if key not in names]
    return ComponentPlan(name, cls, _config(model, tensors), files, reason, tensors, dropped)


def plan_recognized(network: Recognized, name: str, ways: Ways) -> ComponentPlan:
    """A network in a single file, with the `config.json` beside it if that is of its class."""
    path, cls = network.path, network.kind.cls
    if ways.variant is not None:
        raise ValueError(
            f"variant={ways.variant!r} chooses among the files of a diffusers folder, but {path} is taken as "
            "it is; leave it out"
        )
    headers = {path: network.header}
    config, reason, assumed = _config_beside(network), network.reason, {}
    if config is not None:
        reason += "; with the config.json beside it"
        if "quantization" in config:
            raise CheckpointError(f"{path} is quantized already; convert the checkpoint that it was made of")
    else:
        shapes = {network.names[key]: info.shape for key, info in network.header.tensors.items()}
        config, assumed = network.kind.infer(Shapes(str(path), shapes, file_format(headers)))
        assumed |= network.family.assumed
        config |= assumed
    with naming(f"{path} does not describe a {cls.__name__}" if assumed else path.parent / "config.json"):
        model = cls.from_config(config)
    tensors, _ = _plan_tensors(
        str(path), model, headers, lambda key, _: network.names[key], ways, alone=not name
    )
    return ComponentPlan(
        name, cls, _config(model, tensors), [path], reason, tensors, network.dropped, assumed
    )


def _config_beside(network: Recognized) -> dict[str, Any] | None:
    path = network.path.parent / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    return config if class_name(config) == network.kind.cls.__name__ else None


def _plan_tensors(
    where: str,
    model: PretrainedModel,
    headers: dict[Path, Header],
    rename: Callable[[str, Collection[str]], str | None],
    ways: Ways,
    alone: bool,
) -> tuple[list[TensorPlan], dict[str, str]]:
    """What becomes of each tensor, and the parameter of each key."""
    expected = model.expected_tensors()
    source_layout = file_format(headers)
    names = match(f"{where} does not fit {type(model).__name__}", expected, headers, source_layout, rename)
    dtype = ways.dtype or majority_dtype(headers)[0] or mx.float32
    quantized = ways.quantize(model, alone)
    tensors = []
    for path, key, info in _tensors(headers):
        if key not in names:
            continue
        want = expected[names[key]]
        shape = file_shapes(want.layout, want.shape)[0] if ways.layout == "diffusers" else want.shape
        result = dtype if mx.issubdtype(want.dtype, mx.floating) else want.dtype
        layer, _, kind = names[key].rpartition(".")
        tensors.append(
            TensorPlan(
                key,
                names[key],
                path,
                info,
                want.layout,
                shape,
                result,
                source_layout,
                ways.layout,
                quantized.get(layer) if kind == "weight" else None,
            )
        )
    return tensors, names


def _config(model: PretrainedModel, tensors: list[TensorPlan]) -> dict[str, Any]:
    """The `config.json` to write."""
    quantized = {
        tensor.name.removesuffix(".weight"): tensor.quantization
        for tensor in tensors
        if tensor.quantization is not None
    }
    return model.config_to_save() | ({"quantization": to_config(quantized)} if quantized else {})


def _find_weights(
    source: str | Path, name: str, cls: type[PretrainedModel], variant: str | None, hub: dict[str, Any]
) -> tuple[Path, list[Path], str]:
    where = dict(subfolder=name or None, variant=variant, stem=cls.weights_stem, **hub)
    folder = find_folder(source, **where)
    if any(path.suffix == ".safetensors" for path in folder.iterdir()):
        return folder, weight_files(folder, cls.weights_stem, variant), "safetensors"
    folder = find_folder(source, pickles=True, **where)
    try:
        files = pickle_files(folder, cls.weights_stem, variant)
    except FileNotFoundError as error:
        there = [path.name for path in weight_files_in(folder)]
        if there:
            raise FileNotFoundError(
                f"{error}; it has {', '.join(there[:4])}: choose a variant with --variant, or give "
                "one file itself"
            ) from error
        # Neither: the message of the other kind says what there is instead.
        return folder, weight_files(folder, cls.weights_stem, variant), "safetensors"
    return folder, files, "torch pickles, read without running them: there is no .safetensors"


def _tensors(headers: dict[Path, Header]) -> Iterator[tuple[Path, str, TensorInfo]]:
    for path, header in headers.items():
        for key, info in header.tensors.items():
            yield path, key, info


def class_name(config: dict[str, Any]) -> Any:
    listed = config.get("architectures")
    return config.get("class_name") or (listed[0] if isinstance(listed, list) and listed else None)
