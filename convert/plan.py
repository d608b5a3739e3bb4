"""What a conversion would do: which files are read, and what becomes of each tensor. Reads headers only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d.checkpoints import (
    Deferred,
    Header,
    PretrainedModel,
    TensorInfo,
    file_shapes,
    find_folder,
    pickle_files,
    read_header,
    read_json,
    read_pickle,
    read_tensor,
    to_diffusers,
    to_mlx,
    weight_files,
)
from mlx_unet3d.checkpoints.matching import file_format, majority_dtype, match
from mlx_unet3d.checkpoints.pickles import is_pickle
from mlx_unet3d.checkpoints.quantization import choose, to_config
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization

CLASSES: dict[str, type[PretrainedModel]] = {
    "UNet3DConditionModel": mlx_unet3d.UNet3DConditionModel,
    "AutoencoderKL": mlx_unet3d.AutoencoderKL,
    "CLIPTextModel": mlx_unet3d.CLIPTextModel,
}
"""The networks that can be converted, by their names in `config.json` and `model_index.json`."""

LAYOUTS = ("mlx", "diffusers")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the source on its way.

    Attributes:
        key: its name in the source.
        name: the parameter that it becomes.
        path, info: where it lies.
        layout: how its axes are turned, see `mlx_unet3d.checkpoints.layouts`.
        shape, dtype: of the result, before it is quantized.
        source_layout, target_layout: "mlx" or "diffusers".
        quantization: how it is quantized; None for not at all.
    """

    key: str
    name: str
    path: Path
    info: TensorInfo
    layout: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    source_layout: str
    target_layout: str
    quantization: Quantization | None = None

    def make(self) -> mx.array:
        """The result before it is quantized, read and computed anew."""
        array = read_tensor(self.path, self.info)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(self.dtype)
        if self.source_layout == "diffusers":
            array = to_mlx(self.layout, array)
        return to_diffusers(self.layout, array) if self.target_layout == "diffusers" else array

    def results(self) -> dict[str, Deferred]:
        """The tensors to write, by name, to be made when they are written, in the order of the names."""
        if self.quantization is None:
            return {self.name: Deferred(self.shape, self.dtype, self.make)}
        module = self.name.removesuffix("weight")
        parts = self.quantization.quantize(mx.zeros(self.shape, self.dtype))  # lazy: shapes and dtypes only
        made: dict[str, mx.array] = {}

        def make(part: str) -> mx.array:
            if part not in made:  # all parts at once; each is dropped when it is taken
                made.update(self.quantization.quantize(self.make()))
                mx.eval(made)
            return made.pop(part)

        return {
            module + part: Deferred(tuple(array.shape), array.dtype, partial(make, part))
            for part, array in sorted(parts.items())
        }

    def restored(self, result: mx.array) -> mx.array:
        """A result turned back to the shape of the source, for comparison."""
        if self.target_layout == "diffusers":
            result = to_mlx(self.layout, result)
        if self.source_layout == "diffusers":
            result = to_diffusers(self.layout, result)
        return result.reshape(self.info.shape)


@dataclass(frozen=True)
class ComponentPlan:
    """One network on its way.

    Attributes:
        name: "unet", "vae", "text_encoder"; empty where the source is a single network.
        cls: its class.
        config: the keys of the `config.json` to write.
        files: the files read.
        reason: why these files.
        tensors: what becomes of each tensor.
        dropped: tensors of the source that the network does not have, by documented rules.
    """

    name: str
    cls: type[PretrainedModel]
    config: dict[str, Any]
    files: list[Path]
    reason: str
    tensors: list[TensorPlan]
    dropped: list[str]

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or self.cls.__name__

    @property
    def nbytes(self) -> int:
        """Bytes of the results."""
        return sum(result.nbytes for tensor in self.tensors for result in tensor.results().values())

    @property
    def quantization(self) -> dict[str, Quantization]:
        """How its layers are quantized, by path."""
        named = {tensor.name: tensor.quantization for tensor in self.tensors}
        return {name.removesuffix(".weight"): own for name, own in named.items() if own is not None}


@dataclass(frozen=True)
class CheckpointPlan:
    """All of a checkpoint.

    Attributes:
        source: folder or hub id as given.
        folder: where its files are.
        index: its `model_index.json`; None for a single network.
        components: its networks.
        hub: keywords of `find_folder` that say where to look.
    """

    source: str
    folder: Path
    index: dict[str, Any] | None
    components: list[ComponentPlan]
    hub: dict[str, Any] = field(default_factory=dict)


def plan_checkpoint(
    source: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    layout: str = "mlx",
    variant: str | None = None,
    quantization: Quantization | None = None,
    recipe: str = "mixed",
    **hub: Any,
) -> CheckpointPlan:
    """Find out what a conversion would do; no tensor is read.

    Args:
        source: folder or hub id of a diffusers pipeline or of one network, in safetensors or torch pickles.
        dtype: of all floating tensors; None for that of most bytes of each network.
        layout: "mlx" or "diffusers", of the result.
        variant: weight files such as "fp16".
        quantization, recipe: how the UNet is quantized, see `PretrainedModel.quantize`; None for not at
            all. The linear layers of the text encoder then have 8 bits, and the VAE, which is small and whose
            errors are seen at once, keeps its floating point.
        hub: `revision`, `local_files_only`, `token`, `cache_dir`, as in `find_folder`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `find_folder`.
        CheckpointError: the files are damaged, or do not fit their config.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be 'mlx' or 'diffusers'")
    if quantization is not None and layout == "diffusers":
        raise ValueError("diffusers does not read MLX's quantized weights; quantize with the layout 'mlx'")
    ways = _Ways(dtype, layout, variant, quantization, recipe)
    folder = find_folder(source, files=("model_index.json", "config.json", "README.md"), **hub)
    if not (folder / "model_index.json").is_file():
        config = read_json(folder / "config.json")
        component = _plan_component(source, "", _class_of(config, folder), ways, hub)
        return CheckpointPlan(str(source), folder, None, [component], hub)
    index = read_json(folder / "model_index.json")
    components = []
    for name, entry in index.items():
        known = isinstance(entry, list) and len(entry) == 2 and entry[1] in CLASSES
        if known:
            components.append(_plan_component(source, name, CLASSES[entry[1]], ways, hub))
    if not components:
        raise CheckpointError(
            f"{folder / 'model_index.json'} lists none of {', '.join(CLASSES)}; there is nothing to convert"
        )
    return CheckpointPlan(str(source), folder, index, components, hub)


@dataclass(frozen=True)
class _Ways:
    """What is asked for, of every network."""

    dtype: mx.Dtype | None
    layout: str
    variant: str | None
    quantization: Quantization | None
    recipe: str

    def quantize(self, model: PretrainedModel) -> dict[str, Quantization]:
        if self.quantization is None or isinstance(model, mlx_unet3d.AutoencoderKL):
            return {}
        if isinstance(model, mlx_unet3d.CLIPTextModel):
            return choose(model, Quantization(bits=8), "linear")
        chosen = choose(model, self.quantization, self.recipe)
        if not chosen:
            raise ValueError(
                f"no layer of {type(model).__name__} divides into groups of "
                f"{self.quantization.group_size}; choose smaller groups"
            )
        return chosen


def _class_of(config: dict[str, Any], folder: Path) -> type[PretrainedModel]:
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if name not in CLASSES:
        raise CheckpointError(
            f"{folder / 'config.json'} is of the class {name}; this converter knows {', '.join(CLASSES)}"
        )
    return CLASSES[name]


def _plan_component(
    source: str | Path,
    name: str,
    cls: type[PretrainedModel],
    ways: "_Ways",
    hub: dict[str, Any],
) -> ComponentPlan:
    folder, files, reason = _find_weights(source, name, cls, ways.variant, hub)
    config = read_json(folder / "config.json")
    cls.check_class_name(config, str(folder / "config.json"))
    if "quantization" in config:
        raise CheckpointError(f"{folder} is quantized already; convert the checkpoint that it was made of")
    headers = {path: read_pickle(path) if is_pickle(path) else read_header(path) for path in files}
    model = cls.from_config(config)
    expected = model.expected_tensors()
    source_layout = file_format(headers)
    names = match(f"{folder} does not fit {cls.__name__}", expected, headers, source_layout, cls.rename_key)
    dtype = ways.dtype or majority_dtype(headers)[0] or mx.float32
    quantized = ways.quantize(model)
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
    dropped = [key for _, key, _ in _tensors(headers) if key not in names]
    config = model.config_to_save()
    if quantized:
        config["quantization"] = to_config(quantized)
    return ComponentPlan(name, cls, config, files, reason, tensors, dropped)


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
    except FileNotFoundError:
        # Neither: the message of the other kind says what there is instead.
        return folder, weight_files(folder, cls.weights_stem, variant), "safetensors"
    return folder, files, "torch pickles, read without running them: there is no .safetensors"


def _tensors(headers: dict[Path, Header]) -> Iterator[tuple[Path, str, TensorInfo]]:
    for path, header in headers.items():
        for key, info in header.tensors.items():
            yield path, key, info
