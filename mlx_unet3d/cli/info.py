"""mlx-unet3d info: say what a file, folder or repository is, and what it can be used with."""

import argparse
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import media
from ..checkpoints import DEMO, Hub, describe, find_folder, read_json
from ..checkpoints.describe import describe_component, label, size
from ..checkpoints.remote import Repository, cached_file
from ..checkpoints.source import SUFFIXES as WEIGHTS
from ..checkpoints.source import inside_hub, pinned
from ..errors import CheckpointError, printable
from ..latents import LATENTS, open_latents
from ..media.files import READ_ONLY_SUFFIXES, SUFFIXES
from ..pipelines.loading import PIPELINES
from .families import FAMILIES
from .settings import DEFAULTS, SETTINGS, of_file

_CONFIGS = ("model_index.json", "config.json", "*/config.json", "*_config.json")
_MOST_FILES = 4
"""Of a folder without a config, that are looked into; others are listed."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="say what a file, folder or repository is",
        description="Read configs and the headers of weight files, and say what they hold and what it can be "
        "used with: a pipeline, a network, a LoRA, motion modules, an IP-Adapter, an embedding, a video made "
        "here, latents. Of the hub no weights are downloaded.",
        usage="PATH_OR_ID [OPTIONS]",
        examples=(
            "mlx-unet3d info ms-1.7b",
            "mlx-unet3d info mm_sd_v15_v2.ckpt",
            "mlx-unet3d info stabilityai/stable-video-diffusion-img2vid",
            "mlx-unet3d info panda.gif",
        ),
    )
    parser.add_argument(
        "path",
        metavar="PATH_OR_ID",
        help="file, folder, or on the hub OWNER/NAME[/FOLDER][/FILE]; or demo",
    )
    parser.add_argument("--variant", help="weight files to look at, such as fp16")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the hub")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    hub = Hub(args.revision, args.local_files_only)
    for line in lines(args.path, args.variant, hub):
        print(printable(line))
    return 0


def lines(name: str, variant: str | None, hub: Hub) -> Iterator[str]:
    """Yield lines about what `name` names.

    Raises FileNotFoundError, PermissionError, ConnectionError as `find_folder`; ValueError, CheckpointError.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if hub.revision is not None:
            raise ValueError(f"revision={hub.revision!r} is for hub ids, but {path} is a file; leave it out")
        return of_local_file(path, shlex.quote(name))
    source, folder, file = inside_hub(name)
    if name == DEMO or path.is_dir() or source == name:
        found = find_folder(name, files=_CONFIGS, hub=hub)
        return of_folder(found, variant, name, None if path.is_dir() or name == DEMO else hub, "")
    if file is not None:
        return of_hub_file(source, "/".join(part for part in (folder, file) if part), name, hub)
    return of_folder(find_folder(source, files=_CONFIGS, hub=hub), variant, name, hub, folder or "")


def of_local_file(path: Path, name: str) -> Iterator[str]:
    """Yield lines about a file: a video, latents, or weights."""
    # Only files need the converter.
    from mlx_unet3d_convert.describing import describe_file
    from mlx_unet3d_convert.recognition import read_any

    if path.suffix.lower() in SUFFIXES | READ_ONLY_SUFFIXES:
        yield from of_video(path, size(path.stat().st_size), name)
        return
    header, pickled = read_any(path)
    if LATENTS in header.tensors and not pickled:
        saved = open_latents(path)
        done = f"{saved.steps} steps done" if saved.steps else "finished, to be decoded"
        yield f"{label('latents')}of a run, {done}, {'x'.join(map(str, saved.shape))}"
        yield from settings_lines(of_file(saved.settings, path))
        yield f"{label('use')}{'generate --resume' if saved.steps else 'decode'} {name}"
        return
    yield from describe_file(path, header, pickled, name)


def of_video(path: Path, kind: str, name: str) -> Iterator[str]:
    """Yield lines about a video, a file or a folder of pictures.

    Raises ValueError for one that was not made here.
    """
    found = of_file(media.read_metadata(path), path)
    if "prompt" not in found:
        raise ValueError(f"{path} has no settings of mlx-unet3d in it; it was made by another program")
    yield f"{label('video')}made by this program, {kind}"
    yield from settings_lines(found)
    yield f"{label('use')}generate --from {name}"


def settings_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings of a video that are not the usual ones."""
    for name in SETTINGS:
        if settings.get(name) is not None and settings[name] != DEFAULTS[name]:
            yield f"  {name.replace('_', ' '):<16}{settings[name]}"


def of_hub_file(source: str, file: str, name: str, hub: Hub) -> Iterator[str]:
    """Yield lines about a weight file of a repository, of which only the header is read."""
    from mlx_unet3d_convert.describing import describe_file

    if (cached := cached_file(source, file, hub)) is not None:
        yield from of_local_file(cached, name)
        return
    if hub.local_files_only:
        raise FileNotFoundError(f"{name} is not in the hub's cache; run again without --local-files-only")
    repository = Repository.of(source, hub)
    if file not in repository.sizes:
        there = ", ".join(sorted(n for n in repository.sizes if n.endswith(WEIGHTS))[:8]) or "none"
        raise FileNotFoundError(f"{source} has no file {file}; its weight files are {there}")
    header, pickled = repository.read(file)
    yield f"{label('on the hub')}{size(repository.sizes[file])}, of which only the header was read"
    yield from describe_file(Path(name), header, pickled, name)


def of_folder(folder: Path, variant: str | None, name: str, hub: Hub | None, inside: str) -> Iterator[str]:
    """Yield lines about a folder: a pipeline, a network, or files.

    Args:
        folder: local; of the hub, that of the repository, with configs at least.
        name: as it was given.
        hub: of a repository; None for a local folder.
        inside: the folder in the repository.
    """
    from mlx_unet3d_convert.describing import describe_file, describe_use
    from mlx_unet3d_convert.recognition import read_any

    repository = None
    if hub is not None and not hub.local_files_only:
        hub = pinned(hub, name, folder)
        try:
            repository = Repository.of(inside_hub(name)[0], hub).below(inside)
        except OSError:
            if not folder.is_dir():
                raise
            yield "the hub is out of reach: what its cache has is shown"
    folder = folder / inside
    word = shlex.quote(name)
    if (folder / "model_index.json").is_file():
        yield from describe(folder, variant=variant, repository=repository)
        index = read_json(folder / "model_index.json")
        yield f"{label('use')}{use_of_pipeline(index, folder, word, repository)}"
        return
    if (folder / "config.json").is_file():
        component = describe_component(folder, variant, repository)
        yield from describe(folder, variant=variant, repository=repository)
        yield from describe_use(component.config, component.pickled, word)
        return
    if repository is not None:
        files = {n: s for n, s in repository.sizes.items() if "/" not in n}
    else:
        files = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()} if folder.is_dir() else {}
    files = {n: files[n] for n in sorted(files) if n.endswith(WEIGHTS)}
    if not files and hub is None and any(folder.glob("*.png")):
        yield from of_video(folder, "a folder of pictures", word)
        return
    if not files:
        raise CheckpointError(
            f"{name} has neither model_index.json (a pipeline) nor config.json (a component) nor weight files"
        )
    for file, nbytes in files.items():
        if len(files) > _MOST_FILES:
            yield f"{size(nbytes):>10}  {file}"
            continue
        yield f"{file}, {size(nbytes)}"
        try:
            header, pickled = read_any(folder / file) if repository is None else repository.read(file)
            yield from describe_file(
                folder / file, header, pickled, shlex.quote(f"{name.rstrip('/')}/{file}")
            )
        except CheckpointError as error:
            if len(files) == 1:
                raise
            yield label("") + str(error)
    if len(files) > _MOST_FILES:
        yield f"{label('use')}info {name.rstrip('/')}/FILE says what one of these files holds"


def use_of_pipeline(index: Mapping[str, Any], folder: Path, name: str, repository: Repository | None) -> str:
    """Return what a pipeline can be used with."""
    kind = PIPELINES.get(str(index.get("_class_name")))
    if kind is None:
        return f"none here: there are pipelines for {', '.join(PIPELINES)}"
    family = next(family for family in FAMILIES if family.pipeline is kind)
    words = ["generate", *(["PROMPT"] if "prompt" in family.takes else []), "--model", name]
    words += ["--image", "PICTURE"] if "image" in family.takes else []
    unet = index.get("unet")
    if isinstance(unet, list) and unet[-1] == "UNet2DConditionModel" and not index.get("motion_adapter"):
        words += ["--motion-adapter", "ADAPTER"]
    if repository is None:
        names = [file.name for file in (folder / "unet").glob("*")]
    else:
        names = list(repository.below("unet").sizes)
    weights = [n for n in names if n.endswith(WEIGHTS)]
    if weights and not any(n.endswith(".safetensors") for n in weights):
        return f"convert --hf-path {name} --mlx-path FOLDER, as its weights are pickles, then " + " ".join(
            ["FOLDER" if word == name else word for word in words]
        )
    return " ".join(words)
