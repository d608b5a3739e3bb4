"""Describe a checkpoint folder from its configs and headers alone."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .config import read_json
from .headers import TensorInfo, read_header
from .matching import file_format
from .pickles import read_pickle
from .quantization import from_config
from .weight_files import variant_of, weight_files

# Stems of weight files: diffusers' and transformers'.
_STEMS = ("diffusion_pytorch_model", "model")


def describe(folder: str | Path, *, variant: str | None = None) -> Iterator[str]:
    """Lines about a pipeline folder or the folder of one component; no tensor is read.

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
        yield from _describe_pipeline(folder, variant)
    elif (folder / "config.json").is_file():
        line, _, _ = _describe_component(folder, variant)
        yield line
    else:
        raise CheckpointError(
            f"{folder} has neither model_index.json (a pipeline) nor config.json (a component)"
        )


def _describe_pipeline(folder: Path, variant: str | None) -> Iterator[str]:
    index = read_json(folder / "model_index.json")
    version = index.get("_diffusers_version", "unknown")
    yield f"pipeline      {index.get('_class_name')}, written by diffusers {version}"
    parameters = nbytes = 0
    for name, source in index.items():
        part = folder / name
        if name.startswith("_") or not isinstance(source, list) or None in source:
            continue
        if (part / "config.json").is_file():
            line, own_parameters, own_bytes = _describe_component(part, variant)
            parameters += own_parameters
            nbytes += own_bytes
        elif (part / "scheduler_config.json").is_file():
            config = read_json(part / "scheduler_config.json")
            facts = [str(config.get(key)) for key in ("prediction_type", "beta_schedule") if key in config]
            line = ", ".join([str(source[-1]), *facts])
            own = config.get("_class_name", source[-1])
            if own != source[-1]:
                line += f" (scheduler_config.json says {own}; model_index.json decides)"
        elif part.is_dir():
            line = f"{source[-1]}, {', '.join(sorted(f.name for f in part.iterdir()))}"
        else:
            line = f"{source[-1]}, MISSING: there is no folder {part}"
        yield f"{name:<14}{line}"
    yield f"{'total':<14}{parameters:,} parameters, {size(nbytes)}"


def _describe_component(folder: Path, variant: str | None) -> tuple[str, int, int]:
    """A line, the number of parameters, and the bytes of their files."""
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or ", ".join(config.get("architectures") or ["a component"])
    names = [file.name for file in folder.iterdir()]
    stem = next(
        (s for s in _STEMS if any(n.startswith(f"{s}.") or n.startswith(f"{s}-") for n in names)), None
    )
    pickles = _only_pickles(folder, variant)
    files = pickles or weight_files(folder, stem or _STEMS[0], variant)
    headers = {file: read_pickle(file) if pickles else read_header(file) for file in files}
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
        f"{layout}, {', '.join(file.name for file in files)}"
    )
    return line, parameters, nbytes


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
    files = sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    if not files or any(file.suffix == ".safetensors" for file in folder.iterdir()):
        return []
    variants = {file: variant_of(file.name) or "" for file in files}
    wanted = min(variants.values()) if variant is None else variant
    return [file for file in files if variants[file] == wanted]
