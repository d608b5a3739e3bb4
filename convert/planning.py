"""Finding out what a conversion would do: which files are read, and how. Reads headers only."""

import re
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d.checkpoints import find_folder, read_json
from mlx_unet3d.checkpoints.config import naming
from mlx_unet3d.checkpoints.source import pinned_revision
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.schedulers import scheduler_of_pipeline

from .kinds import BY_NAME, COMPONENTS, Kind
from .networks import Ways, class_name, plan_component
from .original_files import plan_originals
from .plan import CheckpointPlan
from .recognition import weight_files_in
from .tokenizers import with_tokenizer

LAYOUTS = ("mlx", "diffusers")
SCHEDULER_CONFIG = "scheduler_config.json"
PUBLISHED_FILES = (
    "text2video_pytorch_model.pth",
    "open_clip_pytorch_model.bin",
    "VQGAN_autoencoder.pth",
    "README.md",
)
"""What to download of a repository on the hub that has no config; folders are read whatever the names."""


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
    ways = Ways(dtype, layout, variant, quantization, recipe)
    file = Path(source).expanduser()
    if file.is_file():
        if hub.get("revision") is not None:
            raise ValueError(
                f"revision={hub['revision']!r} is for hub ids, but {file} is a file; leave it out"
            )
        return plan_originals(source, file, [file], tokenizer, ways, hub)
    folder = find_folder(source, files=("model_index.json", "config.json", "README.md"), **hub)
    hub = {**hub, "revision": pinned_revision(source, folder, hub.get("revision"))}
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").exists():
            folder = find_folder(source, files=PUBLISHED_FILES, **hub)
            if folder.is_dir() and weight_files_in(folder):  # nothing downloaded, no folder
                return plan_originals(source, folder, weight_files_in(folder), tokenizer, ways, hub)
        config = read_json(folder / "config.json")
        component = plan_component(source, "", _kind_of(config, folder), ways, hub)
        return with_tokenizer(CheckpointPlan(str(source), folder, None, [component], hub), tokenizer)
    return _plan_pipeline(source, folder, tokenizer, ways, hub)


def _plan_pipeline(
    source: str | Path,
    folder: Path,
    tokenizer: str | Path | None,
    ways: Ways,
    hub: dict[str, Any],
) -> CheckpointPlan:
    """A folder with a `model_index.json`."""
    path = folder / "model_index.json"
    index = read_json(path)
    components = []
    for name, entry in index.items():
        kind = _known(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None
        if kind is None:
            if name in COMPONENTS and entry != [None, None]:  # a pipeline is of no use without
                raise CheckpointError(
                    f"{path} has for {name} {repr(entry)[:200]}; this converter knows "
                    f"{', '.join(BY_NAME)}: convert a pipeline of these"
                )
            continue
        if not re.fullmatch(r"[A-Za-z]\w*", name):  # it becomes the name of a folder
            raise CheckpointError(
                f"{path} lists a network by the name {name[:200]!r}, which must be plain, such as 'unet'; "
                "correct it or download it again"
            )
        components.append(plan_component(source, name, kind, ways, hub))
    if not components:
        raise CheckpointError(f"{path} lists none of {', '.join(BY_NAME)}; there is nothing to convert")
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
    plan = CheckpointPlan(str(source), folder, index, components, hub, words, scheduler, notes)
    return with_tokenizer(plan, tokenizer)


def _kind_of(config: dict[str, Any], folder: Path) -> Kind:
    name = class_name(config)
    kind = _known(name)
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'} is of the class {str(name)[:200]}; this converter knows "
            f"{', '.join(BY_NAME)}: give the folder of one of these"
        )
    return kind


def _known(name: Any) -> Kind | None:
    return BY_NAME.get(name) if isinstance(name, str) else None
