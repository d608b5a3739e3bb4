"""Say what a weight file or a folder is and how it is used, without converting it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_unet3d.checkpoints import Header
from mlx_unet3d.checkpoints.describe import config_lines, label, parameters_line
from mlx_unet3d.errors import CheckpointError

from .kinds import BY_NAME, Kind, Pipeline
from .kinds.unet_motion import base_model, check_base
from .networks import Source, class_name, source_in_file
from .original_files import about_training, training_of_adapter
from .recognition import Other, Recognized, identify

_ADAPTER = BY_NAME["MotionAdapter"]


def describe_file(path: Path, header: Header, pickled: bool, name: str) -> Iterator[str]:
    """Yield lines about a weight file: its networks, or what else it holds, and what it can be used with.

    Args:
        path: of the file, which may lie on the hub.
        header, pickled: see `recognition.read_any`.
        name: by which commands find it.

    Raises CheckpointError for a file that is neither.
    """
    found = identify(path, header, pickled)
    if isinstance(found, Other):
        kind = f"{found.title}, {parameters_line(header.tensors)}"
        yield f"{label('file')}{kind}{', a torch pickle, read without running it' if pickled else ''}"
        for fact in found.facts({key: info.shape for key, info in header.tensors.items()}):
            yield label("") + fact
        yield _use(found.use.format(file=name) if found.use else f"none here: {found.cure}")
        return
    configs: dict[str, dict[str, Any]] = {}
    for network in found:
        yield network.line()
        try:
            source = source_in_file(network, None)
        except CheckpointError as error:
            yield f"{label('')}its config is not told by its tensors: {error}"
            continue
        configs[network.kind.component] = source.config
        yield from config_lines(source.config, source.assumed)
        yield from _about(source)
    for use in _uses(found, configs, name):
        yield _use(use)


def describe_use(config: dict[str, Any], pickled: bool, name: str) -> Iterator[str]:
    """Yield what else there is to say of the folder of a network; arguments as `describe_file`."""
    called = class_name(config)
    kind = BY_NAME.get(called) if isinstance(called, str) else None
    if kind is None:
        yield _use("none here: this package has no such network")
    elif kind is _ADAPTER:
        yield from _base(config)
        yield _use(_use_of_adapter(pickled, name))
    else:
        python = "" if pickled or kind.called else f", or in Python {kind.cls.__name__}.from_pretrained"
        yield _use(f"a part of a pipeline; alone convert --hf-path {name}{python}")


def _use(words: str) -> str:
    return label("use") + words


def _base(config: dict[str, Any]) -> Iterator[str]:
    """Yield the base model of a motion adapter."""
    if isinstance(widths := config.get("block_out_channels"), list | tuple):
        yield f"{label('')}for {base_model(tuple(widths))}"


def _about(source: Source) -> Iterator[str]:
    """Yield what a motion adapter was trained for."""
    if source.kind is _ADAPTER:
        yield from _base(source.config)
        for line in about_training(training_of_adapter(source)):
            yield label("") + line


def _use_of_adapter(pickled: bool, name: str) -> str:
    if pickled:
        made = "--mlx-path FOLDER, then generate PROMPT --model FOLDER"
        return f"convert --hf-path STABLE_DIFFUSION --motion-adapter {name} {made}"
    return f"generate PROMPT --model STABLE_DIFFUSION --motion-adapter {name}"


def _uses(networks: list[Recognized], configs: dict[str, dict[str, Any]], name: str) -> Iterator[str]:
    """Yield what the networks of a file can be used with, by their configs."""
    there = {network.kind.component for network in networks}
    for network in networks:
        config = configs.get(network.kind.component)
        pipeline = None if config is None else network.kind.pipeline(config)
        if network.kind is _ADAPTER:
            yield _use_of_adapter(network.pickled, name)
        elif pipeline is not None:
            yield _use_of_unet(network.kind, pipeline, config, there, name)
        elif "unet" not in there:
            yield f"a part of a pipeline: put it beside the UNet, or convert --hf-path {name}"


def _use_of_unet(kind: Kind, pipeline: Pipeline, config: dict[str, Any], there: set[str], name: str) -> str:
    """Return how a file with a UNet and the networks `there` becomes a pipeline."""
    words = ["convert --hf-path", name, "--mlx-path FOLDER"]
    if kind.combine is not None:
        try:
            check_base(config, name)
        except CheckpointError as error:
            return f"none here: {error}"
        words.append("--motion-adapter ADAPTER")
    if pipeline.tokenizers:
        words.append("--tokenizer PIPELINE")
    missing = [part for part in pipeline.networks if part not in there]
    if missing:
        words[1] = f"A_FOLDER_WITH_IT_AND_THE_{'_'.join(missing).upper()}"
    words.append(f"then generate{' PROMPT' if pipeline.tokenizers else ''} --model FOLDER")
    return f"{' '.join(words[:-1])}, {words[-1]}{' --image PICTURE' if kind.from_image else ''}"
