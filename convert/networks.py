"""Plan the conversion of each tensor of one network."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
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
from mlx_unet3d.checkpoints.config import blame
from mlx_unet3d.checkpoints.hub import Hub
from mlx_unet3d.checkpoints.matching import Expected, file_format, majority_dtype, match
from mlx_unet3d.checkpoints.pickles import is_pickle
from mlx_unet3d.checkpoints.prefixes import unwrapped
from mlx_unet3d.checkpoints.quantization import to_config
from mlx_unet3d.checkpoints.weight_files import has_weights
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.models.pretrained import PretrainedModel

from .kinds import Kind, kind_of
from .plan import ComponentPlan, TensorPlan
from .recognition import Recognized, weight_files_in


@dataclass(frozen=True)
class Ways:
    """The requested settings for every network."""

    dtype: mx.Dtype | None
    layout: str
    variant: str | None
    quantization: Quantization | None
    recipe: str

    def quantize(self, model: PretrainedModel, alone: bool) -> dict[str, Quantization]:
        """Return the quantization of a network's layers, in a pipeline or alone."""
        if self.quantization is None:
            return {}
        return kind_of(type(model)).quantize(model, self.quantization, self.recipe, alone)


@dataclass(frozen=True)
class Source:
    """The files and config of a network.

    Attributes:
        where: its folder or file, for messages.
        kind: of the network.
        config: the content of its `config.json`, or the known keys without one.
        headers: of its files.
        reason: why these files were chosen.
        rename: the parameter of a key; None for unneeded keys.
        dropped: tensors of the files that are not in the headers.
        assumed: what of the config is neither in a `config.json` nor in the shapes.
        folder: where the reference class finds it; None where it does not.
        called: the names that it goes by, of files and repositories and in their metadata.
    """

    where: str
    kind: Kind
    config: dict[str, Any]
    headers: dict[Path, Header]
    reason: str
    rename: Callable[[str, Collection[str]], str | None]
    dropped: list[str] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    called: str = ""

    def model(self) -> PretrainedModel:
        """Return the network without computing its weights."""
        at = f"{self.where} does not describe a {self.kind.cls.__name__}"
        with blame(at if self.assumed else Path(self.where) / "config.json"):
            return self.kind.cls.from_config(self.config)


def source_in_folder(source: str | Path, name: str, kind: Kind, variant: str | None, hub: Hub) -> Source:
    """Return a network of a diffusers folder."""
    folder, files, reason = _find_weights(source, name, kind.cls, variant, hub)
    config = read_json(folder / "config.json")
    kind.check_class_name(config, str(folder / "config.json"))
    _refuse_quantized(config, folder)
    headers = {path: read_pickle(path) if is_pickle(path) else read_header(path) for path in files}
    rename = kind.cls.rename_key
    at = Path(source).expanduser()
    given = at.resolve().name if at.is_dir() else str(source)
    called = " ".join((given, str(config.get("_name_or_path", ""))))
    return Source(str(folder), kind, config, headers, reason, rename, folder=folder, called=called)


def source_in_file(network: Recognized, variant: str | None) -> Source:
    """Return a network in a single file, with the `config.json` beside it if that is of its class."""
    path, kind = network.path, network.kind
    if variant is not None:
        raise ValueError(
            f"variant={variant!r} chooses among the files of a diffusers folder, but {path} is taken as "
            "it is; leave it out"
        )
    config, reason, assumed, folder = _config_beside(network), network.reason, {}, None
    where = str(path)
    if config is not None:
        reason += "; with the config.json beside it"
        _refuse_quantized(config, path)
        folder, where = path.parent, str(path.parent)
    else:
        config, assumed = kind.infer(network.shapes)
        assumed |= network.family.assumed
        config |= assumed
    names = {unwrapped(key)[1]: parameter for key, parameter in network.names.items()}
    headers = {path: network.header}
    called = " ".join((path.name, network.header.metadata.get("modelspec.title", "")))
    return Source(
        where,
        kind,
        config,
        headers,
        reason,
        lambda key, _: names[key],
        network.dropped,
        assumed,
        folder,
        called,
    )


def plan_network(source: Source, name: str, ways: Ways) -> ComponentPlan:
    """Plan a network: of a pipeline, under its name, or alone."""
    if source.kind.combine is not None:
        raise CheckpointError(
            f"{source.where} is {source.kind.name}, which makes no video by itself; pass "
            "--motion-adapter with the motion module to put into it"
        )
    model = source.model()
    tensors, names = _plan_tensors(source, model, model.expected_tensors(), ways, not name)
    dropped = source.dropped + [key for _, key, _ in _tensors(source.headers) if key not in names]
    return ComponentPlan(
        name,
        source.kind.cls,
        _config(model, tensors),
        list(source.headers),
        source.reason,
        tensors,
        dropped,
        source.assumed,
        _constants(model, tensors, ways),
        source.folder,
    )


def plan_combined(base: Source, other: Source, name: str, ways: Ways) -> ComponentPlan:
    """Plan a network of two sources: the first supplies the parameters that the second lacks."""
    if base.kind.combine is None:
        raise CheckpointError(
            f"{base.where} is a {base.kind.name}, into which no motion adapter goes; leave out "
            "--motion-adapter, or give a UNet of Stable Diffusion"
        )
    config = base.kind.combine(base.config, other.config, base.where, other.where)
    with blame(f"{base.where} and {other.where}"):
        model = base.kind.cls(**config)
        of_other = other.model().expected_tensors().keys()
    expected = model.expected_tensors()
    tensors, dropped = [], []
    for source, its in (
        (base, {n: e for n, e in expected.items() if n not in of_other}),
        (other, {n: e for n, e in expected.items() if n in of_other}),
    ):
        own, names = _plan_tensors(source, model, its, ways, not name)
        tensors += own
        dropped += source.dropped + [key for _, key, _ in _tensors(source.headers) if key not in names]
    dtypes = ways.dtype or majority_dtype(base.headers)[0] or mx.float32
    tensors = [replace(t, dtype=dtypes) if mx.issubdtype(t.dtype, mx.floating) else t for t in tensors]
    return ComponentPlan(
        name,
        base.kind.cls,
        _config(model, tensors),
        [*base.headers, *other.headers],
        f"{base.reason}; with {other.kind.name} from {', '.join(path.name for path in other.headers)}, "
        f"{other.reason}",
        tensors,
        dropped,
        base.assumed | other.assumed,
        _constants(model, tensors, ways),
    )


def part_of(component: ComponentPlan, kind: Kind, config: dict[str, Any], name: str) -> ComponentPlan:
    """Return the plan of a network within another one, which has all its parameters under the same names."""
    model = kind.cls.from_config(config)
    own = model.expected_tensors().keys()
    return replace(
        component,
        name=name,
        cls=kind.cls,
        config=model.config_to_save(),
        reason=f"those of the {component.title}",
        tensors=[tensor for tensor in component.tensors if tensor.name in own],
        dropped=[],
        assumed={},
        constants={k: v for k, v in component.constants.items() if k in own},
        folder=None,
    )


def _refuse_quantized(config: dict[str, Any], where: Path) -> None:
    if "quantization" in config:
        raise CheckpointError(f"{where} is quantized already; convert the checkpoint that it was made of")


def _constants(model: PretrainedModel, tensors: list[TensorPlan], ways: Ways) -> dict[str, mx.array]:
    """Return arrays made by a formula that the source lacks, for diffusers' files, where they are
    required."""
    if ways.layout == "mlx":
        return {}
    there = {tensor.name for tensor in tensors}
    dtype = next(tensor.dtype for tensor in tensors if mx.issubdtype(tensor.dtype, mx.floating))
    optional = [name for name, want in model.expected_tensors().items() if want.optional]
    arrays = dict(tree_flatten(model.parameters()))
    return {name: arrays[name].astype(dtype) for name in optional if name not in there}


def _config_beside(network: Recognized) -> dict[str, Any] | None:
    path = network.path.parent / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    return config if class_name(config) in network.kind.names else None


def _plan_tensors(
    source: Source,
    model: PretrainedModel,
    expected: Mapping[str, Expected],
    ways: Ways,
    alone: bool,
) -> tuple[list[TensorPlan], dict[str, str]]:
    """Return the plan of each tensor, and the parameter of each key."""
    headers, layout = source.headers, file_format(source.headers)
    what = f"{source.where} does not fit {type(model).__name__}"
    names = match(what, expected, headers, layout, source.rename)
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
                layout,
                ways.layout,
                quantized.get(layer) if kind == "weight" else None,
            )
        )
    return tensors, names


def _config(model: PretrainedModel, tensors: list[TensorPlan]) -> dict[str, Any]:
    """Return the `config.json` to write."""
    quantized = {
        tensor.name.removesuffix(".weight"): tensor.quantization
        for tensor in tensors
        if tensor.quantization is not None
    }
    return model.config_to_save() | ({"quantization": to_config(quantized)} if quantized else {})


def _find_weights(
    source: str | Path, name: str, cls: type[PretrainedModel], variant: str | None, hub: Hub
) -> tuple[Path, list[Path], str]:
    where = dict(subfolder=name or None, variant=variant, stem=cls.weights_stem, hub=hub)
    folder = find_folder(source, **where)
    if has_weights(folder, cls.weights_stem, variant):
        return folder, weight_files(folder, cls.weights_stem, variant), "safetensors"
    folder = find_folder(source, pickles=True, **where)
    if not has_weights(folder, cls.weights_stem, variant, pickles=True) and any(
        path.suffix == ".safetensors" for path in folder.iterdir()
    ):
        weight_files(folder, cls.weights_stem, variant)  # raises, and lists the available files
    try:
        files = pickle_files(folder, cls.weights_stem, variant)
    except FileNotFoundError as error:
        there = [path.name for path in weight_files_in(folder)]
        if there:
            raise FileNotFoundError(
                f"{error}; it has {', '.join(there[:4])}: choose a variant with --variant, or give "
                "one file itself"
            ) from error
        # Neither: the error for the other kind lists the files that exist.
        return folder, weight_files(folder, cls.weights_stem, variant), "safetensors"
    return folder, files, "torch pickles, read without running them: there is no .safetensors of it"


def _tensors(headers: dict[Path, Header]) -> Iterator[tuple[Path, str, TensorInfo]]:
    for path, header in headers.items():
        for key, info in header.tensors.items():
            yield path, key, info


def class_name(config: dict[str, Any]) -> Any:
    listed = config.get("architectures")
    return config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
