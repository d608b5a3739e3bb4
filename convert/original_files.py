"""Weight files without a config, identified by their tensors: one network, or those of a pipeline."""

from dataclasses import replace
from pathlib import Path

from mlx_unet3d.checkpoints.hub import Hub
from mlx_unet3d.checkpoints.source import find_file
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.pipelines.motion_training import Training, training_of

from .kinds import BY_NAME
from .networks import Source, Ways, plan_combined, plan_network, source_in_file, source_in_folder
from .pipelines import finish, with_recommendation
from .plan import CheckpointPlan, ComponentPlan
from .recognition import Recognized, is_image_model, recognize
from .tokenizers import find_tokenizer, padded_as_trained, with_tokenizer

MOTION_ADAPTER = "motion_adapter"


def find_adapter(path_or_id: str | Path, hub: Hub) -> Source:
    """Find a motion adapter: a folder or hub id in diffusers' format, or one file, here or on the hub.

    Raises FileNotFoundError as `find_folder`, and CheckpointError for anything else.
    """
    kind = BY_NAME["MotionAdapter"]
    where = replace(hub, revision=None)  # the base model's
    file = find_file(path_or_id, hub=where)
    if file is None:
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
    hub: Hub,
) -> CheckpointPlan:
    """Plan weight files without a config, or a single file: one network, or those of a pipeline."""
    recognized = [recognize(path) for path in files]
    found, notes = _choose(recognized, where, adapter)
    sources = {}
    for name, network in found.items():
        beside = next(networks for networks in recognized if networks[0].path == network.path)
        others = [other for other in found.values() if other not in beside]
        sources[name] = _as_others_tell(source_in_file(network, ways.variant), [*beside, *others])
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
    pipeline = None if unet is None else unet.kind.pipeline(sources["unet"].config)
    needed = tuple(found) if pipeline is None else tuple(pipeline.networks)
    _check_all_there("unet" if pipeline is None else "", needed, found, where)
    for name in needed:
        wanted, cls = pipeline.networks[name], found[name].kind.cls.__name__
        if cls != wanted:
            raise CheckpointError(
                f"{found[name].path} holds {found[name].family.title}, and a {pipeline.name} needs a "
                f"{wanted}; give a file with that"
            )
    if pipeline.tokenizers and tokenizer is None:
        raise ValueError(
            f"{where} is a pipeline in original files, which come without a tokenizer; pass --tokenizer "
            "with a folder that has vocab.json and merges.txt, or a pipeline or hub id that has them, such "
            "as the same model in diffusers' form"
        )
    components = [plan(name, alone=False) for name in needed]
    words = {}
    for name, with_zero in pipeline.tokenizers.items():
        given = find_tokenizer(tokenizer, name, components, hub)
        words[name], said = padded_as_trained(name, given, with_zero)
        notes += said
    index, scheduler = pipeline.index(), dict(pipeline.scheduler)
    recommended = pipeline.recommend(sources["unet"].config, sources["unet"].called)
    if adapter is not None:
        training = training_of_adapter(adapter)
        scheduler = training.scheduler_config(scheduler)
        index["scheduler"] = ["diffusers", training.scheduler]
        recommended |= training.recommended
        notes += about_training(training)
    made = CheckpointPlan(
        str(source),
        where,
        with_recommendation(index, recommended, where),
        components,
        hub,
        words,
        scheduler,
        pipeline.image_processor(),
        notes,
    )
    return finish(made, ways)


def training_of_adapter(adapter: Source) -> Training:
    """How the motion modules of an adapter were trained, by its tensors and names."""
    keys = [*adapter.dropped, *(key for header in adapter.headers.values() for key in header.tensors)]
    return training_of(
        adapter.called,
        authors=any(".temporal_transformer." in key for key in keys),
        mid=bool(adapter.config.get("use_motion_mid_block", True)),
        tables=any(key.endswith(".pe") for key in keys),
    )


def about_training(training: Training) -> list[str]:
    """Return the line about the sampler that an adapter wants."""
    settings = ", ".join(f"{key}={value!r}" for key, value in training.settings.items())
    said = f"scheduler: {training.scheduler} with {settings}, as {training.title} were trained"
    return [said, *([f"{MOTION_ADAPTER}: {training.advice}"] if training.advice else [])]


def _as_others_tell(source: Source, networks: list[Recognized]) -> Source:
    """The source with what other networks say of its config, where no `config.json` does."""
    for network in networks if source.assumed else ():
        if network.kind.about_others is not None:
            shapes, assumed = network.kind.infer(network.shapes)
            said = network.kind.about_others(shapes | assumed).get(source.kind.component, {})
            source = replace(source, config=source.config | said, assumed=source.assumed | said)
    return source


def _check_all_there(more: str, needed: tuple[str, ...], found: dict[str, Recognized], where: Path) -> None:
    missing = more or " and ".join(name for name in needed if name not in found)
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
    shared = {networks[0].path for networks in files if _is_checkpoint(networks)}
    notes = []
    for networks in sorted(files, key=_is_checkpoint):
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
        if _is_clip(files[0]):
            del found["image_encoder"]
            notes.append("image_encoder: left out; it goes into the pipeline of a UNet that takes images")
    unet = found.get("unet")
    if unet is not None and not unet.kind.from_image and found.pop("image_encoder", None) is not None:
        notes.append(f"image_encoder: left out, as a pipeline of {unet.kind.name} takes no images")
    return _without_the_needed(found), notes


def _is_checkpoint(networks: list[Recognized]) -> bool:
    """Return True if a file holds more than one network; the two towers of a CLIP are one."""
    return len(networks) > 1 and not _is_clip(networks)


def _is_clip(networks: list[Recognized]) -> bool:
    return {network.kind.component for network in networks} == {"text_encoder", "image_encoder"}


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
        for other in ("unet", "text_encoder", "text_encoder_2")
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
