"""Describe a checkpoint folder from its configs and headers alone."""

import fnmatch
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..recommended import Recommended
from .config import read_json
from .headers import Header, TensorInfo, read_header
from .matching import file_format
from .pickles import read_pickle
from .quantization import from_config
from .remote import Repository
from .source import SUFFIXES
from .weight_files import variant_of, weight_files, weight_patterns

# Stems of weight files: diffusers' and transformers'.
_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = tuple(suffix for suffix in SUFFIXES if suffix != ".safetensors")
_FACTS = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "motion_layers_per_block",
    "cross_attention_dim",
    "num_attention_heads",
    "attention_head_dim",
    "motion_num_attention_heads",
    "motion_max_seq_length",
    "use_motion_mid_block",
    "conv_in_channels",
    "addition_embed_type",
    "sample_size",
    "num_frames",
    "latent_channels",
    "scaling_factor",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "projection_dim",
    "image_size",
    "patch_size",
)


def label(name: str) -> str:
    """Return the beginning of a line about what has a name; the empty name goes on with the line before."""
    return f"{name:<18}"


@dataclass(frozen=True)
class Component:
    """Facts about a network from its files.

    Attributes:
        config: the content of its `config.json`.
        line: its class, size, dtype and files.
        parameters: their number.
        nbytes: bytes of its tensors.
        pickled: whether its weights are torch pickles.
    """

    config: dict[str, Any]
    line: str
    parameters: int = 0
    nbytes: int = 0
    pickled: bool = False


def describe(
    folder: str | Path, *, variant: str | None = None, repository: Repository | None = None
) -> Iterator[str]:
    """Lines about a pipeline folder or the folder of one component; no tensor is read.

    Args:
        folder: with configs, and with weights where `repository` is None.
        variant: of the weight files, such as "fp16".
        repository: of the hub, at that folder, whose weight files are looked at in place of the folder's.

    Raises FileNotFoundError, and CheckpointError for a folder that is neither.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = (
            "is a file; `mlx-unet3d convert --dry-run` tells what it holds"
            if folder.exists()
            else "is missing"
        )
        raise FileNotFoundError(f"{folder} {what}; give the folder of a pipeline or of a component")
    if (folder / "model_index.json").is_file():
        yield from _describe_pipeline(folder, variant, repository)
    elif (folder / "config.json").is_file():
        component = describe_component(folder, variant, repository)
        yield component.line
        yield from config_lines(component.config)
    else:
        raise CheckpointError(
            f"{folder} has neither model_index.json (a pipeline) nor config.json (a component)"
        )


def config_lines(config: Mapping[str, Any], assumed: Collection[str] = ()) -> Iterator[str]:
    """Yield a line of what a config says of its network's kind and size, if there is something."""
    known = [f"{k}={_shown(config[k])}" for k in _FACTS if config.get(k) is not None and k not in assumed]
    more = [f"{k}={_shown(config[k])}" for k in _FACTS if config.get(k) is not None and k in assumed]
    if known or more:
        yield label("") + ", ".join(known) + (f"; assumed {', '.join(more)}" if more else "")


def _shown(value: Any) -> str:
    text = "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _describe_pipeline(folder: Path, variant: str | None, repository: Repository | None) -> Iterator[str]:
    index = read_json(folder / "model_index.json")
    version = index.get("_diffusers_version", "unknown")
    yield f"{label('pipeline')}{index.get('_class_name')}, written by diffusers {version}"
    parameters = nbytes = 0
    for name, source in index.items():
        part = folder / name
        if name.startswith("_") or not isinstance(source, list) or None in source:
            continue
        config: dict[str, Any] = {}
        if (part / "config.json").is_file():
            own = describe_component(part, variant, None if repository is None else repository.below(name))
            parameters += own.parameters
            nbytes += own.nbytes
            line, config = own.line, own.config
        elif (part / "scheduler_config.json").is_file():
            scheduler = read_json(part / "scheduler_config.json")
            facts = [str(scheduler[key]) for key in ("prediction_type", "beta_schedule") if key in scheduler]
            line = ", ".join([str(source[-1]), *facts])
            own_class = scheduler.get("_class_name", source[-1])
            if own_class != source[-1]:
                line += f" (scheduler_config.json says {own_class}; model_index.json decides)"
        elif part.is_dir() and repository is None:
            line = f"{source[-1]}, {', '.join(sorted(f.name for f in part.iterdir()))}"
        elif repository is not None and repository.below(name).sizes:
            line = f"{source[-1]}, {', '.join(sorted(repository.below(name).sizes))}"
        else:
            line = f"{source[-1]}, MISSING: there is no folder {part}"
        yield f"{label(name)}{line}"
        yield from config_lines(config)
    said = Recommended.of_index(index, folder / "model_index.json").to_dict()
    if said:
        yield label("recommended") + f"{', '.join(f'{key}={_shown(value)}' for key, value in said.items())}"
    yield f"{label('total')}{parameters:,} parameters, {size(nbytes)}"


def describe_component(folder: Path, variant: str | None, repository: Repository | None = None) -> Component:
    """Return what the config and the headers in the folder of a network tell; arguments as `describe`."""
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or ", ".join(config.get("architectures") or ["a component"])
    if repository is not None:
        headers, pickles = _remote_headers(repository, variant)
    elif _is_of_hub(folder) and not any(file.suffix in SUFFIXES for file in folder.iterdir()):
        return Component(config, f"{kind}, its weights are not in the cache")
    else:
        headers, pickles = _headers(folder, variant)
    if not headers:
        return Component(config, f"{kind}, without weights")
    layout = f"{file_format(headers)} layout"
    if pickles:
        layout = "torch pickle (to be converted to safetensors first)"
    tensors = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
    bits = _quantized_bits(config, tensors, str(folder / "config.json"))
    parameters = sum(_parameters(name, tensors, bits) for name in tensors)
    nbytes = sum(t.nbytes for t in tensors.values())
    dtypes = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    quantized = "".join(
        f", {count} layers in {n} bits" for n, count in sorted(Counter(bits.values()).items())
    )
    line = (
        f"{kind}, {parameters:,} parameters in {len(tensors)} tensors, "
        f"{'/'.join(dtype for dtype, _ in dtypes.most_common())}{quantized}, {size(nbytes)}, "
        f"{layout}, {', '.join(file.name for file in headers)}"
    )
    return Component(config, line, parameters, nbytes, pickles)


def _headers(folder: Path, variant: str | None) -> tuple[dict[Path, Header], bool]:
    """The headers of a folder's weight files, and whether they are torch pickles."""
    names = [file.name for file in folder.iterdir()]
    pickles = _only_pickles(folder, variant)
    files = pickles or weight_files(folder, _stem(names), variant)
    return {file: read_pickle(file) if pickles else read_header(file) for file in files}, bool(pickles)


def _remote_headers(repository: Repository, variant: str | None) -> tuple[dict[Path, Header], bool]:
    """As `_headers`: of the variant, else the plain files, else the first variant; empty without any."""
    names = sorted(name for name in repository.sizes if "/" not in name)
    there = [found for name in names if name.endswith(SUFFIXES) and (found := variant_of(name))]
    for chosen in dict.fromkeys([variant, None, *there]):
        for pickles in (False, True):
            patterns = weight_patterns(_stem(names), chosen, pickles)
            for pattern in (pattern for pattern in patterns if not pattern.endswith(".json")):
                if files := fnmatch.filter(names, pattern):
                    return {Path(name): repository.read(name)[0] for name in files}, pickles
    return {}, False


def _stem(names: Collection[str]) -> str:
    """The stem of the weight files among names."""
    starts = {s: (f"{s}.", f"{s}-", *(("pytorch_model",) if s == "model" else ())) for s in _STEMS}
    return next((s for s, start in starts.items() if any(n.startswith(start) for n in names)), _STEMS[0])


def _is_of_hub(folder: Path) -> bool:
    """Return True if a folder lies in the hub's cache, which may have its config alone."""
    return any(part.startswith("models--") for part in folder.parts)


def parameters_line(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the number of parameters, the dtypes and the size of tensors."""
    infos = tensors.values()
    parameters, nbytes = sum(math.prod(info.shape) for info in infos), sum(info.nbytes for info in infos)
    dtypes = "/".join(sorted({info.dtype for info in infos}))
    return f"{parameters:,} parameters in {len(infos)} tensors, {dtypes}, {size(nbytes)}"


def size(nbytes: int) -> str:
    """Bytes in 10^9, or where they are few in 10^6."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _quantized_bits(config: dict[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> dict[str, int]:
    """The bits of each quantized layer, by path."""
    if "quantization" not in config:
        return {}
    common, own = from_config(config["quantization"], where)
    layers = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    return {layer: own.get(layer, common).bits for layer in layers}


def _parameters(name: str, tensors: Mapping[str, TensorInfo], bits: Mapping[str, int]) -> int:
    """The parameters in a tensor: those packed in a quantized weight one by one, and none in its scales."""
    layer, _, kind = name.rpartition(".")
    count = math.prod(tensors[name].shape)
    if layer not in bits or kind == "bias":
        return count
    return count * 32 // bits[layer] if kind == "weight" else 0


def _only_pickles(folder: Path, variant: str | None) -> list[Path]:
    """The torch files of a component that has no safetensors: those of the variant, or of the first, the
    plain one before others, where None is asked for."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
    if not files or any(file.suffix == ".safetensors" for file in folder.iterdir()):
        return []
    variants = {file: variant_of(file.name) or "" for file in files}
    wanted = min(variants.values()) if variant is None else variant
    return [file for file in files if variants[file] == wanted]
