"""Names of weight files, and the weight files of a folder: safetensors or torch pickles, sharded or not."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import CheckpointError
from .config import read_json
from .headers import Header, read_header
from .pickles import read_pickle

_PICKLE_STEMS = {"model": "pytorch_model"}
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")


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
    """List the safetensors files of a component, sorted by name.

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
    """List the torch pickles of a component, as `weight_files`; transformers' have a stem of their own.

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
    """Return True where `weight_files`, or with `pickles` also `pickle_files`, find something in a folder."""
    names = weight_patterns(stem, variant, False) + (weight_patterns(stem, variant, True) if pickles else [])
    return any((folder / name).is_file() for name in names if "*" not in name)


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
    """Say where to see the rest of a folder of the hub's cache, which has only the files asked for."""
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
    """List the variants of which `names` has a single file or an index."""
    single = re.compile(re.escape(stem) + r"\.([\w-]+)\.safetensors")
    index = re.compile(re.escape(stem) + r"\.safetensors\.index\.([\w-]+)\.json")
    shard = re.compile(r".*-\d{5}-of-\d{5}")
    matches = [single.fullmatch(name) or index.fullmatch(name) for name in names]
    return sorted({m[1] for m in matches if m and not shard.fullmatch(m[1])})


def weight_patterns(stem: str, variant: str | None, pickles: bool) -> list[str]:
    """Return the patterns of file names that `weight_files`, or with `pickles` `pickle_files`, looks for."""
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
