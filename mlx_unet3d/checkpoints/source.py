"""Where a checkpoint is: a local folder, the demo model, or the hub and its cache."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from .config import read_json
from .hub import Hub, download, takes_hub
from .weight_files import has_weights, weight_patterns

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEMO = "demo"
"""The name of the small model that the package brings along, wherever a folder or hub id is taken."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of weight files."""
_DEMO_FOLDER = Path(__file__).parents[1] / "demo"


@takes_hub
def find_folder(
    path_or_id: str | Path,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    hub: Hub,
    files: Sequence[str] = ("config.json",),
    stem: str | None = None,
    pickles: bool = False,
) -> Path:
    """Return the local folder of a checkpoint, downloaded first if it is on the hub.

    Args:
        path_or_id: a folder, taken as it is, or a hub id `owner/name`; a folder of that name wins. "demo" is
            the small model in this package, whatever folders there are; "./demo" is a folder.
        subfolder: the folder of the component inside it, such as "unet".
        variant: with `stem`, which weight files to download, such as "fp16".
        revision, local_files_only, token, cache_dir, hub: see `Hub`.
        files: names or patterns to download besides the weights.
        stem: download the safetensors files of this stem, see `weight_files`; None downloads no
            weights.
        pickles: download its torch pickles instead, see `pickle_files`.

    Raises:
        ValueError: neither a folder nor a hub id, or `revision` with a local folder.
        FileNotFoundError: no such folder, subfolder, repository or revision, or not in the cache.
        PermissionError: the repository is gated or private.
        ConnectionError: the hub answered with another error, or the connection broke.
        OSError: the disk is full, or the cache cannot be written.
    """
    _check_subfolder(subfolder)
    if path_or_id == DEMO:
        if hub.revision is not None:
            raise ValueError(
                f"revision={hub.revision!r} is for hub ids; {DEMO!r} is the model in this package"
            )
        return _inside(_DEMO_FOLDER, subfolder)
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        if hub.revision is not None:
            raise ValueError(
                f"revision={hub.revision!r} is for hub ids, but {local} is a local folder; leave it out"
            )
        return _inside(local, subfolder)
    if local.exists():
        raise ValueError(f"{local} is a file; pass the folder that holds it")
    if isinstance(path_or_id, Path) or str(path_or_id).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{local} does not exist; pass an existing folder or a hub id")
    if not _HUB_ID.fullmatch(path_or_id):
        raise ValueError(
            f"{path_or_id!r} is neither an existing folder nor a hub id; a hub id is 'owner/name', and "
            f"{DEMO!r} the small model in this package"
        )

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [*files, *(weight_patterns(stem, variant, pickles) if stem is not None else ())]
    snapshot = download(path_or_id, hub, [prefix + name for name in names])
    return _inside(snapshot, subfolder, hub_id=path_or_id)


def inside_hub(source: str) -> tuple[str, str | None, str | None]:
    """Split OWNER/NAME/FOLDER/FILE into hub id, folder and file, the last two None where absent."""
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    if not inside or owner in ("", ".", "..", "~"):
        return source, None, None
    folder, _, last = inside.rstrip("/").rpartition("/")
    if Path(last).suffix in SUFFIXES:
        return f"{owner}/{name}", folder or None, last
    return f"{owner}/{name}", inside.rstrip("/"), None


@takes_hub
def find_file(path_or_id: str | Path, *, hub: Hub) -> Path | None:
    """Return the path of a weight file, downloaded first if it is on the hub, OWNER/NAME[/FOLDER]/FILE.

    None for anything else, such as a folder or a hub id. Raises as `find_folder`, and FileNotFoundError where
    the repository has no such file.
    """
    local = Path(path_or_id).expanduser()
    if local.is_file():
        return local
    if local.exists() or isinstance(path_or_id, Path):
        return None
    source, folder, file = inside_hub(path_or_id)
    if file is None:
        return None
    found = find_folder(source, subfolder=folder, files=(file,), hub=hub) / file
    if not found.is_file():
        raise FileNotFoundError(
            f"{source} has no file {'/'.join(part for part in (folder, file) if part)}, or it is not in the "
            f"cache; see https://huggingface.co/{source}/tree/main"
        )
    return found


def pinned(hub: Hub, path_or_id: str | Path, folder: Path) -> Hub:
    """Return `hub` at the commit of a folder that `find_folder` gave for a hub id.

    A branch may move between two downloads; their files would then be of different versions. `hub` itself
    is returned for a local folder, and where the cache does not say the commit.
    """
    if Path(path_or_id).expanduser().is_dir():
        return hub
    return replace(hub, revision=folder.name) if re.fullmatch(r"[0-9a-f]{40}", folder.name) else hub


@takes_hub
def read_component_config(
    path_or_id: str | Path, filename: str, *, subfolder: str | None = None, hub: Hub
) -> dict[str, Any]:
    """Read one JSON file, such as "scheduler_config.json", of a folder or hub repository.

    The arguments and errors are those of `find_folder` and `read_json`; nothing else is downloaded.
    """
    folder = find_folder(path_or_id, subfolder=subfolder, hub=hub, files=(filename,))
    return read_json(folder / filename)


@takes_hub
def choose_variants(
    path_or_id: str | Path,
    stems: Mapping[str, str],
    variant: str | None,
    *,
    pickles: bool = False,
    hub: Hub,
) -> dict[str, str | None]:
    """Choose the files of each network of a pipeline: the variant where there is one, else the plain ones.

    Where no network has the variant, it is asked for of all, which gives the error of a network alone.

    Args:
        path_or_id, hub: see `find_folder`; the files of the variant are downloaded.
        stems: of the weight files, by the folder of the network.
        variant: such as "fp16"; None for none.
        pickles: count torch pickles as well.
    """
    chosen: dict[str, str | None] = dict.fromkeys(stems)
    if variant is None:
        return chosen
    for name, stem in stems.items():
        for kind in (False, True) if pickles else (False,):
            folder = find_folder(
                path_or_id, subfolder=name, variant=variant, stem=stem, pickles=kind, hub=hub
            )
            if has_weights(folder, stem, variant, pickles=kind):
                chosen[name] = variant
                break
    return chosen if any(chosen.values()) else dict.fromkeys(stems, variant)


def _check_subfolder(subfolder: str | None) -> None:
    if subfolder is None:
        return
    parts = PurePosixPath(subfolder.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"subfolder={subfolder!r} must lie inside the checkpoint, such as 'unet'")


def _inside(folder: Path, subfolder: str | None, hub_id: str | None = None) -> Path:
    if not subfolder or (folder / subfolder).is_dir():
        return folder / subfolder if subfolder else folder
    if hub_id is not None:
        raise FileNotFoundError(
            f"{hub_id} has no files for subfolder {subfolder!r}, or they are not in the cache "
            f"({folder}); see https://huggingface.co/{hub_id}/tree/main, and run once online to "
            "download them"
        )
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    listing = f"its folders are {', '.join(there)}" if there else "it has no folders"
    raise FileNotFoundError(
        f"{folder} has no folder {subfolder!r}; {listing}: download the rest of the checkpoint"
    )
