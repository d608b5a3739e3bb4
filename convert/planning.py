"""Finding out what a conversion would do: which files are read, and how. Reads headers only."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_unet3d
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
from mlx_unet3d.checkpoints.prefixes import unwrapped
from mlx_unet3d.checkpoints.quantization import choose, to_config
from mlx_unet3d.checkpoints.source import choose_variants, has_weights, pinned_revision
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.models.pretrained import PretrainedModel
from mlx_unet3d.schedulers import scheduler_of_pipeline

from .inference import Shapes, infer_config
from .modelscope import INDEX, PUBLISHED_FILES, find_tokenizer, padded_as_trained, scheduler_config
from .plan import CheckpointPlan, ComponentPlan, TensorPlan
from .recognition import COMPONENTS, Recognized, is_image_model, recognize, weight_files_in

CLASSES: dict[str, type[PretrainedModel]] = {
    name: cls for cls in COMPONENTS for name in (cls.class_names or (cls.__name__,))
}
"""The networks that can be converted, by their names in `config.json` and `model_index.json`."""

LAYOUTS = ("mlx", "diffusers")
SCHEDULER_CONFIG = "scheduler_config.json"


@dataclass(frozen=True)
class _Ways:
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
        if isinstance(model, mlx_unet3d.AutoencoderKL):
            if alone:
                raise ValueError(
                    "a VAE is not quantized, as it is small and its errors are seen at once; leave out -q"
                )
            return {}
        if isinstance(model, mlx_unet3d.CLIPTextModel) and not alone:
            return choose(model, Quantization(bits=8), "linear")
        chosen = choose(model, self.quantization, self.recipe)
        if not chosen:
            raise ValueError(
                f"no layer of {type(model).__name__} divides into groups of "
                f"{self.quantization.group_size}; choose smaller groups"
            )
        return chosen


def plan_checkpoint(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: mx.Dtype | None = None,
    layout: str = "mlx",
    variant: str | None = None,
    quantization: Quantization | None = None,
    recipe: str = "mixed",
    **hub: Any,
) -> CheckpointPlan:
    """Find out what a conversion would do; no tensor is read.

    Args:
        source: folder or hub id of a diffusers pipeline or of one network, in safetensors or torch pickles;
            or original files, which are told by their tensors: the folder of ModelScope's model, or one file
            of its UNet, of a latent diffusion autoencoder or of OpenCLIP, or a checkpoint of latent diffusion
            that holds all three. A single file may have diffusers' names, too.
        tokenizer: folder or hub id of a CLIP tokenizer, or of a pipeline that has one, in place of the
            source's; original files come without.
        dtype: of all floating tensors; None for that of most bytes of each network.
        layout: "mlx" or "diffusers", of the result.
        variant: weight files such as "fp16", of a diffusers folder.
        quantization, recipe: how the UNet is quantized, see `PretrainedModel.quantize`; None for not at
            all. The linear layers of a pipeline's text encoder then have 8 bits; one that is converted alone
            is quantized as asked for. The VAE, which is small and whose errors are seen at once, keeps its
            floating point.
        hub: `revision`, `local_files_only`, `token`, `cache_dir`, as in `find_folder`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `find_folder`.
        ValueError: settings that do not go with each other or with the source, such as original files of a
            pipeline without `tokenizer`.
        CheckpointError: the files are damaged, are of no known kind, or do not fit their config.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be 'mlx' or 'diffusers'")
    if quantization is not None and layout == "diffusers":
        raise ValueError("diffusers does not read MLX's quantized weights; quantize with the layout 'mlx'")
    ways = _Ways(dtype, layout, variant, quantization, recipe)
    file = Path(source).expanduser()
    if file.is_file():
        if hub.get("revision") is not None:
            raise ValueError(
                f"revision={hub['revision']!r} is for hub ids, but {file} is a file; leave it out"
            )
        return _plan_originals(source, file, [file], tokenizer, ways, hub)
    folder = find_folder(source, files=("model_index.json", "config.json", "README.md"), **hub)
    hub = {**hub, "revision": pinned_revision(source, folder, hub.get("revision"))}
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").exists():
            folder = find_folder(source, files=PUBLISHED_FILES, **hub)
            if folder.is_dir() and weight_files_in(folder):  # nothing downloaded, no folder
                return _plan_originals(source, folder, weight_files_in(folder), tokenizer, ways, hub)
        config = read_json(folder / "config.json")
        component = _plan_component(source, "", _class_of(config, folder), ways, hub)
        return _with_tokenizer(CheckpointPlan(str(source), folder, None, [component], hub), tokenizer)
    return _plan_pipeline(source, folder, tokenizer, ways, hub)


def _plan_pipeline(
    source: str | Path,
    folder: Path,
    tokenizer: str | Path | None,
    ways: _Ways,
    hub: dict[str, Any],
) -> CheckpointPlan:
    """A folder with a `model_index.json`."""
    path = folder / "model_index.json"
    index = read_json(path)
    networks: dict[str, type[PretrainedModel]] = {}
    for name, entry in index.items():
        cls = _known(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None
        if cls is None:
            if name in COMPONENTS.values() and entry != [None, None]:  # a pipeline is of no use without
                raise CheckpointError(
                    f"{path} has for {name} {repr(entry)[:200]}; this converter knows "
                    f"{', '.join(CLASSES)}: convert a pipeline of these"
                )
            continue
        if not re.fullmatch(r"[A-Za-z]\w*", name):  # it becomes the name of a folder
            raise CheckpointError(
                f"{path} lists a network by the name {name[:200]!r}, which must be plain, such as 'unet'; "
                "correct it or download it again"
            )
        networks[name] = cls
    stems = {name: cls.weights_stem for name, cls in networks.items()}
    variants = choose_variants(source, stems, ways.variant, pickles=True, **hub)
    components = [
        _plan_component(source, name, cls, replace(ways, variant=variants[name]), hub)
        for name, cls in networks.items()
    ]
    if not components:
        raise CheckpointError(f"{path} lists none of {', '.join(CLASSES)}; there is nothing to convert")
    words = scheduler = None
    if tokenizer is None and "tokenizer" in index:
        words = mlx_unet3d.CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **hub)
    if "scheduler" in index:
        where = find_folder(source, subfolder="scheduler", files=(SCHEDULER_CONFIG,), **hub)
        scheduler = read_json(where / SCHEDULER_CONFIG)
        with naming(where / SCHEDULER_CONFIG):
            made = scheduler_of_pipeline(scheduler, index["scheduler"])
        # The class that model_index.json asks for, in a config that says so.
        scheduler |= {"_class_name": type(made).__name__}
    known = {"tokenizer", "scheduler", *(component.name for component in components)}
    notes = [
        f"{name}: left out, as this converter does not know {str(entry[-1])[:200]}"
        for name, entry in index.items()
        if isinstance(entry, list) and any(entry) and name not in known and not name.startswith("_")
    ]
    notes += [
        f"{name}: no files of the variant {ways.variant!r}; taking {', '.join(f.name for f in part.files)}"
        for name, part in zip(networks, components, strict=True)
        if variants[name] != ways.variant
    ]
    plan = CheckpointPlan(str(source), folder, index, components, hub, words, scheduler, notes)
    return _with_tokenizer(plan, tokenizer)


def _with_tokenizer(plan: CheckpointPlan, tokenizer: str | Path | None) -> CheckpointPlan:
    """The plan with another tokenizer, where one was given."""
    if tokenizer is None:
        return plan
    if plan.index is None or "tokenizer" not in plan.index:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} is for pipelines; {plan.source} has none to replace: leave it out"
        )
    return replace(plan, tokenizer=find_tokenizer(tokenizer, plan.components, plan.hub))


def _plan_originals(
    source: str | Path,
    where: Path,
    files: list[Path],
    tokenizer: str | Path | None,
    ways: _Ways,
    hub: dict[str, Any],
) -> CheckpointPlan:
    """Weight files without any config, or one: a network, or the three of a pipeline."""
    found, notes = _choose([recognize(path) for path in files], where)
    if len(found) == 1:
        (network,) = found.values()
        component = _plan_recognized(network, "", ways)
        plan = CheckpointPlan(str(source), where, None, [component], hub, notes=notes)
        return _with_tokenizer(plan, tokenizer)
    missing = " and ".join(name for name in COMPONENTS.values() if name not in found)
    if missing and where.is_file():
        raise CheckpointError(
            f"{where} holds the {' and the '.join(found)}, and no {missing}, which a pipeline needs; put the "
            f"file of the {missing} beside it in a folder of their own, and give that folder"
        )
    if missing:
        there = ", ".join(f"the {name} ({network.path.name})" for name, network in found.items())
        raise CheckpointError(
            f"{where} has {there}, and no file of the {missing}, which a pipeline needs; put it there, or "
            "give the file of one network to convert that alone"
        )
    if tokenizer is None:
        raise ValueError(
            f"{where} is a pipeline in original files, which come without a tokenizer; pass --tokenizer "
            "with a folder that has vocab.json and merges.txt, or a pipeline or hub id that has them, such "
            "as the same model in diffusers' form"
        )
    components = [_plan_recognized(found[name], name, ways) for name in COMPONENTS.values()]
    words, said = padded_as_trained(find_tokenizer(tokenizer, components, hub))
    notes += said
    return CheckpointPlan(str(source), where, dict(INDEX), components, hub, words, scheduler_config(), notes)


def _choose(files: list[list[Recognized]], where: Path) -> tuple[dict[str, Recognized], list[str]]:
    """The network to take for each name among those of each file, and what to say of the others.

    A file of one network goes before one that holds others, too: the autoencoder of ModelScope comes in a
    whole checkpoint of an image model. Of such a checkpoint alone the autoencoder is taken.

    Raises CheckpointError where two files are equally good.
    """
    found: dict[str, Recognized] = {}
    shared = {networks[0].path for networks in files if len(networks) > 1}
    notes = []
    for networks in sorted(files, key=lambda networks: len(networks) > 1):
        for network in networks:
            name = COMPONENTS[network.family.cls]
            other = found.setdefault(name, network)
            if other is network:
                continue
            if (network.path in shared) == (other.path in shared):
                raise CheckpointError(
                    f"{where} has two files of the {name}, {other.path.name} and {network.path.name}; leave "
                    "one there, or give one of them alone"
                )
            notes.append(
                f"{name}: that in {network.path.name} is left out, as {other.path.name} holds nothing else"
            )
    if len(files) == 1 and {"vae", "text_encoder"} == found.keys() and is_image_model(files[0]):
        path = found.pop("text_encoder").path
        notes.append(f"text_encoder: left out, as {path.name} is the checkpoint of an image model")
    return _without_the_needed(found), notes


def _without_the_needed(found: dict[str, Recognized]) -> dict[str, Recognized]:
    """The networks with what none of the same file needs as dropped, at the first of them."""
    made, seen = {}, set()
    for name, network in found.items():
        beside = [set(other.dropped) for other in found.values() if other.path == network.path]
        unused = set() if network.path in seen else set.intersection(*beside)
        made[name] = replace(network, dropped=[key for key in network.dropped if key in unused])
        seen.add(network.path)
    return made


def _class_name(config: dict[str, Any]) -> Any:
    listed = config.get("architectures")
    return config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)


def _class_of(config: dict[str, Any], folder: Path) -> type[PretrainedModel]:
    name = _class_name(config)
    cls = _known(name)
    if cls is None:
        raise CheckpointError(
            f"{folder / 'config.json'} is of the class {str(name)[:200]}; this converter knows "
            f"{', '.join(CLASSES)}: give the folder of one of these"
        )
    return cls


def _known(name: Any) -> type[PretrainedModel] | None:
    return CLASSES.get(name) if isinstance(name, str) else None


def _plan_component(
    source: str | Path,
    name: str,
    cls: type[PretrainedModel],
    ways: _Ways,
    hub: dict[str, Any],
) -> ComponentPlan:
    """A network of a diffusers folder."""
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


def _plan_recognized(network: Recognized, name: str, ways: _Ways) -> ComponentPlan:
    """A network in a single file, with the `config.json` beside it if that is of its class."""
    path, cls = network.path, network.family.cls
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
        config, assumed = infer_config(cls, Shapes(str(path), shapes, file_format(headers)))
        config |= assumed
    with naming(f"{path} does not describe a {cls.__name__}" if assumed else path.parent / "config.json"):
        model = cls.from_config(config)
    names = {unwrapped(key)[1]: parameter for key, parameter in network.names.items()}
    tensors, _ = _plan_tensors(str(path), model, headers, lambda key, _: names[key], ways, alone=not name)
    return ComponentPlan(
        name, cls, _config(model, tensors), [path], reason, tensors, network.dropped, assumed
    )


def _config_beside(network: Recognized) -> dict[str, Any] | None:
    path = network.path.parent / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    return config if _class_name(config) == network.family.cls.__name__ else None


def _plan_tensors(
    where: str,
    model: PretrainedModel,
    headers: dict[Path, Header],
    rename: Callable[[str, Collection[str]], str | None],
    ways: _Ways,
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
    if has_weights(folder, cls.weights_stem, variant):
        return folder, weight_files(folder, cls.weights_stem, variant), "safetensors"
    folder = find_folder(source, pickles=True, **where)
    if not has_weights(folder, cls.weights_stem, variant, pickles=True) and any(
        path.suffix == ".safetensors" for path in folder.iterdir()
    ):
        weight_files(folder, cls.weights_stem, variant)  # raises, and says what there is
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
    return folder, files, "torch pickles, read without running them: there is no .safetensors of it"


def _tensors(headers: dict[Path, Header]) -> Iterator[tuple[Path, str, TensorInfo]]:
    for path, header in headers.items():
        for key, info in header.tensors.items():
            yield path, key, info
