"""Plan a conversion: choose the files and how to read them. Reads only headers."""

import re
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d import image_processor
from mlx_unet3d.checkpoints import find_folder, read_component_config, read_json
from mlx_unet3d.checkpoints.config import blame
from mlx_unet3d.checkpoints.hub import Hub, takes_hub
from mlx_unet3d.checkpoints.source import choose_variants, find_file, pinned
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.image_processor import CLIPImageProcessorConfig
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.pipelines.motion_training import ANIMATE_LCM
from mlx_unet3d.schedulers import scheduler_of_pipeline

from .kinds import BY_NAME, COMPONENTS, Kind, Pipeline
from .kinds.pipeline import FEATURE_EXTRACTOR, TOKENIZERS
from .loras import Loras, with_loras
from .networks import Source, Ways, class_name, plan_combined, plan_network, source_in_folder
from .original_files import (
    MOTION_ADAPTER,
    about_training,
    find_adapter,
    plan_originals,
    training_of_adapter,
)
from .pipelines import finish, lists, with_recommendation
from .plan import CheckpointPlan
from .recognition import weight_files_in
from .tokenizers import with_tokenizer

LAYOUTS = ("mlx", "diffusers")
SCHEDULER_CONFIG = "scheduler_config.json"
PREPROCESSOR_CONFIG = image_processor.CONFIG_NAME
_IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
_SETTINGS = ("force_zeros_for_empty_prompt",)  # of pipelines of images, which those of videos have as well
PUBLISHED_FILES = (
    "text2video_pytorch_model.pth",
    "open_clip_pytorch_model.bin",
    "VQGAN_autoencoder.pth",
    "README.md",
)
"""Files to download from a repository on the hub without a config; in folders, names do not matter."""


@takes_hub
def plan_checkpoint(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    motion_adapter: str | Path | None = None,
    loras: Loras = (),
    dtype: mx.Dtype | None = None,
    layout: str = "mlx",
    variant: str | None = None,
    quantization: Quantization | None = None,
    recipe: str = "mixed",
    hub: Hub,
) -> CheckpointPlan:
    """Plan a conversion without reading tensors of the source.

    Args:
        source: folder or hub id of a diffusers pipeline or of one network, in safetensors or torch pickles;
            or original files, identified by their tensors: a file of one of `kinds`, a checkpoint with
            several networks, or a folder of such files. A single file may also have diffusers' names, and be
            on the hub, OWNER/NAME[/FOLDER]/FILE.
        tokenizer: folder or hub id of a CLIP tokenizer, or of a pipeline with one, in place of the source's;
            original files have none.
        motion_adapter: folder, hub id or file of AnimateDiff's motion modules, to be inserted into the
            source's Stable Diffusion UNet.
        loras: files, folders or hub ids, and weights, to add to the weights; those of few steps bring their
            sampler, steps and guidance, see `few_steps`.
        dtype: of all floating-point tensors; None for the dtype of most bytes of each network.
        layout: "mlx" or "diffusers", of the result.
        variant: weight files such as "fp16", of a diffusers folder.
        quantization, recipe: how the UNet is quantized, see `PretrainedModel.quantize`; None for no
            quantization. The linear layers of a pipeline's text encoder then have 8 bits; a text encoder
            converted alone is quantized as requested. The VAE, which is small and whose errors are visible,
            is not quantized.
        hub: how the hub is reached: `revision`, `local_files_only`, `token`, `cache_dir`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `find_folder`.
        ValueError: settings that contradict each other or the source, such as original files of a pipeline
            without `tokenizer`.
        CheckpointError: the files are damaged, of an unknown kind, or do not match their config.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be 'mlx' or 'diffusers'")
    if quantization is not None and layout == "diffusers":
        raise ValueError("diffusers does not read MLX's quantized weights; quantize with the layout 'mlx'")
    ways = Ways(dtype, layout, variant, quantization, recipe)
    adapter = None if motion_adapter is None else find_adapter(motion_adapter, hub)
    return with_loras(_plan(source, tokenizer, adapter, ways, hub), loras, hub)


def _plan(
    source: str | Path,
    tokenizer: str | Path | None,
    adapter: Source | None,
    ways: Ways,
    hub: Hub,
) -> CheckpointPlan:
    """Plan a source of any kind, without LoRAs."""
    if hub.revision is not None and Path(source).expanduser().is_file():
        raise ValueError(f"revision={hub.revision!r} is for hub ids, but {source} is a file; leave it out")
    if (file := find_file(source, hub=hub)) is not None:
        return plan_originals(source, file, [file], tokenizer, adapter, ways, hub)
    folder = find_folder(source, files=("model_index.json", "config.json", "README.md"), hub=hub)
    hub = pinned(hub, source, folder)
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").exists():
            folder = find_folder(source, files=PUBLISHED_FILES, hub=hub)
            if folder.is_dir() and weight_files_in(folder):  # nothing downloaded, no folder
                files = weight_files_in(folder)
                return plan_originals(source, folder, files, tokenizer, adapter, ways, hub)
        config = read_json(folder / "config.json")
        own = source_in_folder(source, "", _kind_of(config, folder), ways.variant, hub)
        component = plan_network(own, "", ways) if adapter is None else plan_combined(own, adapter, "", ways)
        return with_tokenizer(CheckpointPlan(str(source), folder, None, [component], hub), tokenizer)
    return _plan_pipeline(source, folder, tokenizer, adapter, ways, hub)


def _plan_pipeline(
    source: str | Path,
    folder: Path,
    tokenizer: str | Path | None,
    adapter: Source | None,
    ways: Ways,
    hub: Hub,
) -> CheckpointPlan:
    """Plan a folder with a `model_index.json`."""
    path = folder / "model_index.json"
    index = read_json(path)
    notes, scheduler, training = [], None, None
    unet = index.get("unet")
    if unet in (None, [None, None]):
        other = f"a {str(index['transformer'][-1])[:200]} and " if lists(index, "transformer") else ""
        raise CheckpointError(
            f"{path} has {other}no UNet, and a pipeline of videos needs one here; to convert one of its "
            "networks, give the folder of that"
        )
    base = _known(unet[-1]) if isinstance(unet, list) and unet else None
    if adapter is not None and (base is None or base.combine is None):
        raise CheckpointError(
            f"{path} has no UNet of Stable Diffusion, into which the motion adapter {adapter.where} could "
            "go; give the base model, or leave out --motion-adapter"
        )
    config = {} if base is None else read_component_config(source, "config.json", subfolder="unet", hub=hub)
    pipeline = None if base is None else base.pipeline(config)
    if base is not None and base.combine is not None:
        videos = index.get("_class_name") == pipeline.name
        if adapter is not None:
            base.combine(config, adapter.config, str(folder / "unet"), adapter.where)  # before anything else
            training = training_of_adapter(adapter)
        elif lists(index, MOTION_ADAPTER):
            adapter = source_in_folder(source, MOTION_ADAPTER, BY_NAME["MotionAdapter"], None, hub)
            training = None if videos else training_of_adapter(adapter)
        if not videos:
            index, notes = _of_videos(index, pipeline)
        index["unet"] = pipeline.index()["unet"]
    within = {} if base is None else BY_NAME[base.cls.__name__].parts
    needed = COMPONENTS if pipeline is None else pipeline.networks
    kinds: dict[str, Kind] = {}
    for name, entry in index.items():
        if name in within:
            continue
        kind = _known(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None
        if name == "unet" and base is not None:
            kind = base
        if kind is None:
            if name in needed and entry != [None, None]:  # a pipeline is of no use without
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
        kinds[name] = kind
    stems = {name: kind.cls.weights_stem for name, kind in kinds.items()}
    variants = choose_variants(source, stems, ways.variant, pickles=True, hub=hub)
    components = []
    for name, kind in kinds.items():
        own = source_in_folder(source, name, kind, variants[name], hub)
        if adapter is not None and name == "unet":
            components.append(plan_combined(own, adapter, name, ways))
        else:
            components.append(plan_network(own, name, ways))
    words = {}
    for name in TOKENIZERS if tokenizer is None else ():
        if lists(index, name):
            words[name] = mlx_unet3d.CLIPTokenizer.from_pretrained(source, subfolder=name, hub=hub)
    if "scheduler" in index:
        where = find_folder(source, subfolder="scheduler", files=(SCHEDULER_CONFIG,), hub=hub)
        scheduler = read_json(where / SCHEDULER_CONFIG)
        if training is not None:
            with blame(where / SCHEDULER_CONFIG):
                scheduler = training.scheduler_config(scheduler)
            index["scheduler"] = ["diffusers", training.scheduler]
            notes += about_training(training)
        with blame(where / SCHEDULER_CONFIG):
            made = scheduler_of_pipeline(scheduler, index["scheduler"])
        # model_index.json decides the class; the config may lack it.
        scheduler |= {"_class_name": type(made).__name__}
    processor = None
    if _is_image_processor(index.get(FEATURE_EXTRACTOR)):
        processor = read_component_config(source, PREPROCESSOR_CONFIG, subfolder=FEATURE_EXTRACTOR, hub=hub)
        with blame(folder / FEATURE_EXTRACTOR / PREPROCESSOR_CONFIG):
            CLIPImageProcessorConfig.from_dict(processor)
    recommended: dict[str, Any] = {}
    if pipeline is not None:
        recommended = pipeline.recommend(config, f"{source} {config.get('_name_or_path', '')}")
        if training is not None:
            recommended |= training.recommended
        elif within and scheduler is not None and scheduler["_class_name"] == ANIMATE_LCM.scheduler:
            recommended |= ANIMATE_LCM.recommended
    index = with_recommendation(index, recommended, path)
    known = {*TOKENIZERS, "scheduler", *within, *(component.name for component in components)}
    known |= set() if processor is None else {FEATURE_EXTRACTOR}
    notes += [
        f"{name}: left out, as this converter does not know {str(entry[-1])[:200]}"
        for name, entry in index.items()
        if isinstance(entry, list) and any(entry) and name not in known and not name.startswith("_")
    ]
    notes += [
        f"{name}: no files of the variant {ways.variant!r}; taking {', '.join(f.name for f in part.files)}"
        for name, part in zip(kinds, components, strict=True)
        if variants[name] != ways.variant
    ]
    plan = CheckpointPlan(str(source), folder, index, components, hub, words, scheduler, processor, notes)
    return finish(with_tokenizer(plan, tokenizer), ways)


def _of_videos(index: dict[str, Any], pipeline: Pipeline) -> tuple[dict[str, Any], list[str]]:
    """Return the index of an image pipeline as one of videos, and a note about it."""
    own = pipeline.index()
    kept = (*TOKENIZERS, "scheduler")
    made = {k: index.get(k, v) if k in kept else v for k, v in own.items()}
    settings = {k: v for k, v in index.items() if not isinstance(v, list) and not k.startswith("_")}
    left = [k for k, v in index.items() if k not in made and isinstance(v, list) and any(v)]
    notes = [f"{name}: left out, as {pipeline.name} does without" for name in left if name != MOTION_ADAPTER]
    return {**made, **{k: v for k, v in settings.items() if k in _SETTINGS}}, notes


def _is_image_processor(entry: Any) -> bool:
    """Return True for an entry of `model_index.json` of CLIP's image processor, under any of its names."""
    return isinstance(entry, list) and len(entry) == 2 and str(entry[1]).startswith(_IMAGE_PROCESSORS)


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
