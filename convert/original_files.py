"""Weight files without any config, told by their tensors: a network, or those of a pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_unet3d.errors import CheckpointError

from .networks import Ways, plan_recognized
from .plan import CheckpointPlan
from .recognition import Recognized, is_image_model, recognize
from .tokenizers import find_tokenizer, padded_as_trained, with_tokenizer


def plan_originals(
    source: str | Path,
    where: Path,
    files: list[Path],
    tokenizer: str | Path | None,
    ways: Ways,
    hub: dict[str, Any],
) -> CheckpointPlan:
    """Weight files without any config, or one: a network, or those of a pipeline."""
    found, notes = _choose([recognize(path) for path in files], where)
    if len(found) == 1:
        (network,) = found.values()
        component = plan_recognized(network, "", ways)
        plan = CheckpointPlan(str(source), where, None, [component], hub, notes=notes)
        return with_tokenizer(plan, tokenizer)
    pipeline = next((n.kind.pipeline for n in found.values() if n.kind.pipeline is not None), None)
    needed = ("unet", *found) if pipeline is None else tuple(pipeline.networks)
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
    if pipeline.tokenizer and tokenizer is None:
        raise ValueError(
            f"{where} is a pipeline in original files, which come without a tokenizer; pass --tokenizer "
            "with a folder that has vocab.json and merges.txt, or a pipeline or hub id that has them, such "
            "as the same model in diffusers' form"
        )
    components = [plan_recognized(found[name], name, ways) for name in needed]
    words = None
    if pipeline.tokenizer:
        words = find_tokenizer(tokenizer, components, hub)
        if pipeline.pads_with_zero:
            words, said = padded_as_trained(words)
            notes += said
    scheduler = dict(pipeline.scheduler)
    return CheckpointPlan(str(source), where, pipeline.index(), components, hub, words, scheduler, notes)


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
