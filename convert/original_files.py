"""Weight files without a config, identified by their tensors: one network, or those of a pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_unet3d.errors import CheckpointError

from .kinds import BY_NAME, Pipeline
from .networks import Source, Ways, plan_combined, plan_network, source_in_file, source_in_folder
from .pipelines import finish
from .plan import CheckpointPlan, ComponentPlan
from .recognition import Recognized, is_image_model, recognize
from .tokenizers import find_tokenizer, padded_as_trained, with_tokenizer

MOTION_ADAPTER = "motion_adapter"


def find_adapter(path_or_id: str | Path, hub: dict[str, Any]) -> Source:
    """Find a motion adapter: a folder or hub id in diffusers' format, or one file.

    Raises FileNotFoundError as `find_folder`, and CheckpointError for anything else.
    """
    kind = BY_NAME["MotionAdapter"]
    file = Path(path_or_id).expanduser()
    if not file.is_file():
        where = {key: value for key, value in hub.items() if key != "revision"}  # the base model's
        return source_in_folder(path_or_id, "", kind, None, where)
    networks = recognize(file)
    if [network.kind for network in networks] != [kind]:
        titles = " and ".join(network.family.title for network in networks)
        raise CheckpointError(
            f"{file} holds {titles}, no motion module; give the file or folder of one to --motion-adapter"
        )
    return source_in_file(networks[0], None)


def plan_originals(
    source: str | Path,
    where: Path,
    files: list[Path],
    tokenizer: str | Path | None,
    adapter: Source | None,
    ways: Ways,
    hub: dict[str, Any],
) -> CheckpointPlan:
    """Plan weight files without a config, or a single file: one network, or those of a pipeline."""
    recognized = [recognize(path) for path in files]
    found, notes = _choose(recognized, where, adapter)
    sources = {}
    for name, network in found.items():
        beside = next(networks for networks in recognized if networks[0].path == network.path)
        sources[name] = _as_others_tell(source_in_file(network, ways.variant), beside)
    unet = found.get("unet")
    if adapter is None and unet is not None and unet.kind.combine is not None and len(sources) > 1:
        adapter = sources.pop(MOTION_ADAPTER, None)  # in the same folder
    if adapter is not None and unet is None:
        raise CheckpointError(
            f"{where} has no UNet of Stable Diffusion, into which the motion adapter {adapter.where} could "
            "go; give the base model, or leave out --motion-adapter"
        )

    def plan(name: str, alone: bool) -> ComponentPlan:
        called = "" if alone else name
        if name == "unet" and adapter is not None:
            return plan_combined(sources[name], adapter, called, ways)
        return plan_network(sources[name], called, ways)

    if len(sources) == 1:
        component = plan(*sources, alone=True)
        made = CheckpointPlan(str(source), where, None, [component], hub, notes=notes)
        return with_tokenizer(made, tokenizer)
    pipeline = None if unet is None else unet.kind.pipeline
    if pipeline is not None and pipeline.only is not None and not pipeline.only(sources["unet"].config):
        others = [name for name in sources if name != "unet"]
        notes.append(
            f"{', '.join(others)}: left out, as this converter makes no pipeline of this UNet; convert "
            "them alone"
        )
        component = plan("unet", alone=True)
        made = CheckpointPlan(str(source), where, None, [component], hub, notes=notes)
        return with_tokenizer(made, tokenizer)
    needed = ("unet", *found) if pipeline is None else _known(pipeline, notes)
    _check_all_there(needed, found, where)
    if pipeline.tokenizer and tokenizer is None:
        raise ValueError(
            f"{where} is a pipeline in original files, which come without a tokenizer; pass --tokenizer "
            "with a folder that has vocab.json and merges.txt, or a pipeline or hub id that has them, such "
            "as the same model in diffusers' form"
        )
    components = [plan(name, alone=False) for name in needed]
    words = None
    if pipeline.tokenizer:
        words = find_tokenizer(tokenizer, components, hub)
        if pipeline.pads_with_zero:
            words, said = padded_as_trained(words)
            notes += said
    made = CheckpointPlan(
        str(source), where, pipeline.index(), components, hub, words, dict(pipeline.scheduler), notes
    )
    return finish(made, ways)


def _as_others_tell(source: Source, networks: list[Recognized]) -> Source:
    """Return the source with config keys that other networks of its file define, if it has no
    `config.json`."""
    for network in networks if source.assumed else ():
        if network.kind.about_others is not None:
            shapes, assumed = network.kind.infer(network.shapes)
            said = network.kind.about_others(shapes | assumed).get(source.kind.component, {})
            source = replace(source, config=source.config | said, assumed=source.assumed | said)
    return source


def _known(pipeline: Pipeline, notes: list[str]) -> tuple[str, ...]:
    """Return the networks of a pipeline, without those unknown to the converter."""
    unknown = {name: cls for name, cls in pipeline.networks.items() if cls not in BY_NAME}
    notes += [f"{name}: left out, as this converter does not know {cls}" for name, cls in unknown.items()]
    return tuple(name for name in pipeline.networks if name not in unknown)


def _check_all_there(needed: tuple[str, ...], found: dict[str, Recognized], where: Path) -> None:
    missing = " and ".join(name for name in needed if name not in found)
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


def _choose(
    files: list[list[Recognized]], where: Path, adapter: Source | None
) -> tuple[dict[str, Recognized], list[str]]:
    """Return the network to use for each name among those of all files, and notes about the others.

    A file with a single network is preferred: the autoencoder of ModelScope comes in a complete checkpoint of
    an image model. From such a checkpoint, only the autoencoder is used.

    Raises CheckpointError where two files are equally good.
    """
    found: dict[str, Recognized] = {}
    shared = {networks[0].path for networks in files if len(networks) > 1}
    notes = []
    for networks in sorted(files, key=lambda networks: len(networks) > 1):
        for network in networks:
            name = network.kind.component
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
    if len(files) == 1 and adapter is None:
        notes += _only_the_autoencoder(found, files[0])
    return _without_the_needed(found), notes


def _only_the_autoencoder(found: dict[str, Recognized], networks: list[Recognized]) -> list[str]:
    """Drop all other networks in the checkpoint of an image model, and return a note about them."""
    unet = found.get("unet")
    base = unet is not None and unet.kind.combine is not None
    if "vae" not in found or not (base or (unet is None and is_image_model(networks))):
        return []
    name = found["vae"].path.name
    cure = "; pass --motion-adapter to make a video model of it" if base else ""
    return [
        f"{other}: left out, as {name} is the checkpoint of an image model{cure}"
        for other in ("unet", "text_encoder")
        if found.pop(other, None) is not None
    ]


def _without_the_needed(found: dict[str, Recognized]) -> dict[str, Recognized]:
    """Return the networks, the first of each file with the tensors that none of the file needs as dropped."""
    made, seen = {}, set()
    for name, network in found.items():
        beside = [set(other.dropped) for other in found.values() if other.path == network.path]
        unused = set() if network.path in seen else set.intersection(*beside)
        made[name] = replace(network, dropped=[key for key in network.dropped if key in unused])
        seen.add(network.path)
    return made
