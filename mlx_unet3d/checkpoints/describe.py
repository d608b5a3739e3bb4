"""What a checkpoint folder is, told from its configs and headers alone."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from .config import read_json
from .headers import read_header
from .matching import file_format
from .pickles import read_pickle
from .source import weight_files

# Stems of weight files: diffusers' and transformers'.
_STEMS = ("diffusion_pytorch_model", "model")


def describe(folder: str | Path, *, variant: str | None = None) -> Iterator[str]:
    """Lines about a pipeline folder or the folder of one component; no tensor is read.

    Raises FileNotFoundError, and CheckpointError for a folder that is neither.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give that of a pipeline or of a component")
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
            line = ", ".join([str(config.get("_class_name")), *facts])
        elif part.is_dir():
            line = f"{source[-1]}, {', '.join(sorted(f.name for f in part.iterdir()))}"
        else:
            line = f"{source[-1]}, MISSING: there is no folder {part}"
        yield f"{name:<14}{line}"
    yield f"{'total':<14}{parameters:,} parameters, {nbytes / 1e9:.2f} GB"


def _describe_component(folder: Path, variant: str | None) -> tuple[str, int, int]:
    """A line, the number of parameters, and the bytes of their files."""
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or ", ".join(config.get("architectures") or ["a component"])
    names = [file.name for file in folder.iterdir()]
    stem = next(
        (s for s in _STEMS if any(n.startswith(f"{s}.") or n.startswith(f"{s}-") for n in names)), None
    )
    pickles = _only_pickles(folder)
    files = pickles or weight_files(folder, stem or _STEMS[0], variant)
    headers = {file: read_pickle(file) if pickles else read_header(file) for file in files}
    layout = f"{file_format(headers)} layout"
    if pickles:
        layout = "torch pickle (to be converted to safetensors first)"
    tensors = [tensor for header in headers.values() for tensor in header.tensors.values()]
    parameters = sum(math.prod(t.shape) for t in tensors)
    nbytes = sum(t.nbytes for t in tensors)
    dtypes = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.nbytes
    line = (
        f"{kind}, {parameters:,} parameters in {len(tensors)} tensors, "
        f"{'/'.join(dtype for dtype, _ in dtypes.most_common())}, {nbytes / 1e9:.2f} GB, "
        f"{layout}, {', '.join(file.name for file in files)}"
    )
    return line, parameters, nbytes


def _only_pickles(folder: Path) -> list[Path]:
    """The torch files of a component that has no safetensors: those of one variant, the plain one first."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    if not files or any(file.suffix == ".safetensors" for file in folder.iterdir()):
        return []
    # pytorch_model-00001-of-00002.fp16.bin and pytorch_model.fp16.bin have the variant "fp16".
    variants = {file: ".".join(file.name.split(".")[1:-1]) for file in files}
    first = min(variants.values())
    return [file for file in files if variants[file] == first]
