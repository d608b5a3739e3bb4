"""Where a checkpoint is: local folders, the hub and its cache, and the weight files in a folder."""

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ..errors import CheckpointError
from .config import read_json
from .headers import Header, read_header
from .pickles import read_pickle

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLE_STEMS = {"model": "pytorch_model"}
DEMO = "demo"
"""The name of the small model that the package brings along, wherever a folder or hub id is taken."""
_DEMO_FOLDER = Path(__file__).parents[1] / "demo"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def find_folder(
    path_or_id: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    files: Sequence[str] = ("config.json",),
    stem: str | None = None,
    pickles: bool = False,
) -> Path:
    """The local folder of a checkpoint, downloaded first if it is on the hub.

    Args:
        path_or_id: a folder, taken as it is, or a hub id `owner/name`; a folder of that name wins. "demo" is
            the small model in this package, whatever folders there are; "./demo" is a folder.
        subfolder: the folder of the component inside it, such as "unet".
        revision: branch, tag or commit on the hub; only for hub ids.
        variant: with `stem`, which weight files to download, such as "fp16".
        local_files_only: look in the hub's cache and nowhere else.
        token: hub token; True or None takes the one that `hf auth login` stored, False sends none.
        cache_dir: the hub's cache; None is its usual place.
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
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for hub ids; {DEMO!r} is the model in this package")
        return _inside(_DEMO_FOLDER, subfolder)
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for hub ids, but {local} is a local folder; leave it out"
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
    names = [*files, *(_weight_patterns(stem, variant, pickles) if stem is not None else ())]
    snapshot = _download(
        path_or_id,
        revision=revision,
        allow_patterns=[prefix + name for name in names],
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )
    return _inside(snapshot, subfolder, hub_id=path_or_id)


def pinned_revision(path_or_id: str | Path, folder: Path, revision: str | None) -> str | None:
    """The commit of a folder that `find_folder` gave for a hub id, for what else is read of it.

    A branch may move between two downloads; their files would then be of different versions. For a local
    folder, and where the cache does not say the commit, it is `revision`.
    """
    if Path(path_or_id).expanduser().is_dir():
        return revision
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision


def read_component_config(
    path_or_id: str | Path,
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Read one JSON file, such as "scheduler_config.json", of a folder or hub repository.

    The arguments and errors are those of `find_folder` and `read_json`; nothing else is downloaded.
    """
    folder = find_folder(
        path_or_id,
        subfolder=subfolder,
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
        files=(filename,),
    )
    return read_json(folder / filename)


def single_name(stem: str, variant: str | None) -> str:
    """Name of an unsharded weight file: `stem[.variant].safetensors`."""
    return f"{_with_variant(stem, variant)}.safetensors"


def index_name(stem: str, variant: str | None) -> str:
    """Name of the index of sharded weights: `stem.safetensors.index[.variant].json`."""
    return f"{stem}.safetensors.index{'' if variant is None else f'.{variant}'}.json"


def shard_name(stem: str, variant: str | None, number: int, count: int) -> str:
    """Name of one shard, `number` from 1: `stem[.variant]-00001-of-00002.safetensors`."""
    return f"{_with_variant(stem, variant)}-{number:05d}-of-{count:05d}.safetensors"


def variant_of(name: str) -> str | None:
    """The variant in the name of a weight file, a shard or not; None for a plain one."""
    parts = re.sub(r"-\d{5}-of-\d{5}", "", name).split(".")[1:-1]
    return ".".join(parts) or None


def weight_files(folder: str | Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component, sorted by name.

    The first that exists is taken: the single file, then the index with its shards; with a variant
    the same two of that variant, and never another. An index must agree with its shards.

    Raises:
        FileNotFoundError: there are no such files; the message says what there is instead.
        CheckpointError: there are only pickles, or the index is wrong.
    """
    folder = Path(folder)
    single = folder / single_name(stem, variant)
    if single.is_file():
        return [single]
    # The second spelling is that of diffusers before 0.31.
    old = f"{stem}.safetensors{'' if variant is None else f'.{variant}'}.index.json"
    for name in (index_name(stem, variant), old):
        if (folder / name).is_file():
            return _shards(folder / name)
    _raise_no_weights(folder, stem, variant)


def pickle_files(folder: str | Path, stem: str, variant: str | None = None) -> list[Path]:
    """The torch pickles of a component, as `weight_files`; transformers' have a stem of their own.

    Raises:
        FileNotFoundError: there are no such files.
        CheckpointError: the index is wrong.
    """
    folder, stem = Path(folder), _PICKLE_STEMS.get(stem, stem)
    single = folder / f"{_with_variant(stem, variant)}.bin"
    if single.is_file():
        return [single]
    index = folder / f"{stem}.bin.index{'' if variant is None else f'.{variant}'}.json"
    if index.is_file():
        return _shards(index, ".bin", read_pickle)
    raise FileNotFoundError(f"{folder} has no {single.name} or {index.name}{_page_of_snapshot(folder)}")


def has_weights(folder: Path, stem: str, variant: str | None = None, *, pickles: bool = False) -> bool:
    """Whether `weight_files`, or with `pickles` also `pickle_files`, find something in a folder."""
    names = _weight_patterns(stem, variant, False) + (
        _weight_patterns(stem, variant, True) if pickles else []
    )
    return any((folder / name).is_file() for name in names if "*" not in name)


def choose_variants(
    path_or_id: str | Path,
    stems: Mapping[str, str],
    variant: str | None,
    *,
    pickles: bool = False,
    **hub: Any,
) -> dict[str, str | None]:
    """Which files to take of each network of a pipeline: the variant where there is one, else the plain ones.

    Where no network has the variant, it is asked for of all, which gives the error of a network alone.

    Args:
        path_or_id, hub: see `find_folder`; of the hub, the files of the variant are downloaded.
        stems: of the weight files, by the folder of the network.
        variant: such as "fp16"; None for none.
        pickles: whether torch pickles count as well.
    """
    chosen: dict[str, str | None] = dict.fromkeys(stems)
    if variant is None:
        return chosen
    for name, stem in stems.items():
        for kind in (False, True) if pickles else (False,):
            folder = find_folder(path_or_id, subfolder=name, variant=variant, stem=stem, pickles=kind, **hub)
            if has_weights(folder, stem, variant, pickles=kind):
                chosen[name] = variant
                break
    return chosen if any(chosen.values()) else dict.fromkeys(stems, variant)


def _shards(
    index: Path, suffix: str = ".safetensors", read: Callable[[Path], Header] = read_header
) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; download it again")
    for key, name in weight_map.items():
        # A plain name beside the index: a path could lead anywhere on the disk.
        plain = isinstance(name, str) and re.fullmatch(
            rf"[^./\\:\0][^/\\:\0]{{,200}}{re.escape(suffix)}", name
        )
        if not plain:
            raise CheckpointError(
                f"{index} maps {key[:80]!r} to {str(name)[:80]!r}; a shard must be the plain name of a "
                f"{suffix} file in the same folder: download the index again"
            )
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(shards)} shards, of which {len(absent)} are not there: "
            f"{', '.join(absent[:4])}; finish the download"
        )
    found: dict[str, str] = {}
    for shard in shards:
        for key in read(shard).tensors:
            if key in found:
                raise CheckpointError(
                    f"{index.parent}: tensor {key!r} is in two shards, {found[key]} and "
                    f"{shard.name}; download them again"
                )
            found[key] = shard.name
    for key, name in weight_map.items():
        if found.get(key) != name:
            raise CheckpointError(
                f"{index} says that tensor {key!r} is in {name}; it is in "
                f"{found.get(key, 'none of the shards')}; download the shards and the index again"
            )
    return shards


def _raise_no_weights(folder: Path, stem: str, variant: str | None) -> NoReturn:
    wanted = f"{single_name(stem, variant)} or {index_name(stem, variant)}"
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    variants = _variants(stem, there)
    choices = ["files without a variant"] if variant is not None and _has_plain(stem, there) else []
    choices += [f"the variant {name!r}" for name in variants]
    if choices:
        known = f"it has {', '.join(choices)}: ask for {'that' if len(choices) == 1 else 'one of these'}"
        raise FileNotFoundError(f"{folder} has no {wanted} (variant={variant!r}); {known}")
    pickles = [name for name in there if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only as torch pickles ({', '.join(pickles[:4])}); this "
            "package loads safetensors and never runs pickles. Convert the checkpoint once: "
            "mlx-unet3d convert --hf-path ... --mlx-path ..."
        )
    listing = f"it has {', '.join(there[:8])}" if there else "the folder is empty"
    page = _page_of_snapshot(folder) or ": download the weights, or pass the folder that holds them"
    raise FileNotFoundError(f"{folder} has no {wanted}; {listing}{page}")


def _page_of_snapshot(folder: Path) -> str:
    """For a folder of the hub's cache, which has only what was asked for, where to see the rest."""
    for part in folder.parts:
        if part.startswith("models--"):
            page = f"https://huggingface.co/{part.removeprefix('models--').replace('--', '/', 1)}"
            return (
                f". Only the asked variant is downloaded: see {page}/tree/main for others. "
                "Repositories that have only .bin files must be converted first: mlx-unet3d convert"
            )
    return ""


def _has_plain(stem: str, names: list[str]) -> bool:
    return single_name(stem, None) in names or index_name(stem, None) in names


def _variants(stem: str, names: list[str]) -> list[str]:
    """The variants of which `names` has a single file or an index."""
    single = re.compile(re.escape(stem) + r"\.([\w-]+)\.safetensors")
    index = re.compile(re.escape(stem) + r"\.safetensors\.index\.([\w-]+)\.json")
    shard = re.compile(r".*-\d{5}-of-\d{5}")
    matches = [single.fullmatch(name) or index.fullmatch(name) for name in names]
    return sorted({m[1] for m in matches if m and not shard.fullmatch(m[1])})


def _weight_patterns(stem: str, variant: str | None, pickles: bool) -> list[str]:
    if pickles:
        stem = _PICKLE_STEMS.get(stem, stem)
        infix = "" if variant is None else f".{variant}"
        return [f"{stem}{infix}.bin", f"{stem}{infix}-*-of-*.bin", f"{stem}.bin.index{infix}.json"]
    name = _with_variant(stem, variant)
    infix = "" if variant is None else f".{variant}"
    return [
        f"{name}.safetensors",
        f"{name}-*-of-*.safetensors",
        index_name(stem, variant),
        f"{stem}.safetensors{infix}.index.json",
    ]


def _with_variant(stem: str, variant: str | None) -> str:
    if variant is None:
        return stem
    if not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant={variant!r} must be letters, digits, '_' or '-', such as 'fp16'")
    return f"{stem}.{variant}"


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


def _download(hub_id: str, **arguments: Any) -> Path:
    """`snapshot_download`, with its errors turned into what the user can do."""
    # Imported late: it takes longer than the rest of the package together, and folders need none
    # of it.
    import huggingface_hub
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{hub_id}"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, **arguments))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{hub_id} is gated: accept its licence at {page}, then {LOGIN}; a local folder with "
            "its files works too"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{hub_id} has no revision {arguments['revision']!r}; see {page}/tree/main for its branches"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {hub_id!r} here, and the hub has no {page} or does not show it to "
            "you: check the spelling; repositories also move or close. If it is private or gated, "
            f"{LOGIN}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # Also raised where the hub did answer, with an error, and the cache does not have the file.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(hub_id, page, error.__cause__) from error
        raise FileNotFoundError(
            f"there is no folder {hub_id!r} here, and the hub's cache does not have all its files, "
            "while the hub is out of reach or not to be asked (local_files_only, HF_HUB_OFFLINE): "
            f"run once online, or download {page} elsewhere and pass the folder. The hub library "
            f"says: {error}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(hub_id, page, error) from error
    except OSError as error:
        cache = arguments.get("cache_dir") or constants.HF_HUB_CACHE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"no room for {hub_id}: the disk of the hub's cache {cache} is full; make room, or "
                "move the cache with HF_HOME or cache_dir="
            ) from error
        raise OSError(
            f"{hub_id} could not be downloaded to the hub's cache {cache} ({error}); try again, or "
            "move the cache with HF_HOME or cache_dir="
        ) from error
    except Exception as error:
        if not is_broken_connection(error):
            raise
        raise ConnectionError(
            f"the download of {hub_id} broke off ({error}); run again: the files that are complete "
            "are not downloaded twice"
        ) from error


LOGIN = "log in with `hf auth login`, or set HF_TOKEN or pass token="


def is_broken_connection(error: Exception) -> bool:
    """Whether an error is one of the HTTP library or of the transfer library below huggingface_hub.

    Which libraries these are differs between its versions, and their errors are no OSErrors.
    """
    return isinstance(error, RuntimeError) or type(error).__module__.split(".")[0].startswith("http")


def _refusal(hub_id: str, page: str, error: Any) -> OSError:
    """For an answer of the hub that is an error of no class of its own."""
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"the hub refuses {hub_id} (HTTP {status}): accept its licence at {page} if it has "
            f"one, then {LOGIN}"
        )
    return ConnectionError(
        f"the hub answered HTTP {status} for {hub_id}: {error}; try again later, or pass a local folder"
    )
