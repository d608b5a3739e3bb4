"""Putting a component on the disk, whole or not at all, and telling one weight file from
another."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .headers import Deferred, write_safetensors
from .weight_files import index_name, shard_name, single_name

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def checksum(files: Sequence[str | Path]) -> str:
    """A short fingerprint of weight files, 16 hex digits, for the records of a run.

    It covers the number of files and, of each, the size, the whole header and 64 blocks of 4 KiB
    spread evenly over the data, not the names. Other weights, a fine-tune or a re-saved file give
    another fingerprint; a few changed bytes between the blocks do not, so it is no proof against
    tampering. A full hash would take longer than loading the weights.
    """
    digest = hashlib.sha256(len(files).to_bytes(8, "little"))
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            start = file.read(8)
            digest.update(start)
            header_end = 8 + int.from_bytes(start, "little")
            if header_end > size:  # no safetensors
                header_end = 8
            digest.update(file.read(header_end - 8))
            last = max(size - _SAMPLE_BYTES, header_end)
            for i in range(_SAMPLES):
                file.seek(header_end + (last - header_end) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5_000_000_000, "5GB", "500MB" or "2GiB".

    Raises:
        ValueError: no such size, or not above zero.
    """
    if isinstance(size, int):
        value = size
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", size.strip().upper())
        value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if value <= 0:
        raise ValueError(f"max_shard_size={size!r} must be a number of bytes above 0, or like '5GB'")
    return value


def plan_shards(
    tensors: Mapping[str, mx.array | Deferred], max_bytes: int
) -> list[dict[str, mx.array | Deferred]]:
    """Divide tensors over files, in the order of their names, so that none passes `max_bytes`.

    A tensor that alone is larger gets a file of its own.
    """
    shards: list[dict[str, mx.array | Deferred]] = [{}]
    filled = 0
    for name in sorted(tensors):
        nbytes = tensors[name].nbytes
        if shards[-1] and filled + nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensors[name]
        filled += nbytes
    return shards


def write_component(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, mx.array | Deferred],
    *,
    stem: str,
    variant: str | None,
    metadata: Mapping[str, str],
    max_shard_bytes: int,
    overwrite: bool,
) -> list[Path]:
    """Write config.json and the weights; returns the weight files.

    Everything is first written beside, under names that no loader looks for. Only when all is on
    the disk do the files take their names, and the one by which a loader finds the weights (the
    single file or the index) takes its name last; that of an earlier save goes first. So a save
    that fails at writing leaves what was there, and one that is cut off while renaming leaves
    nothing that loads half old, half new.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    single, index = single_name(stem, variant), index_name(stem, variant)
    if len(shards) == 1:
        names = [single]
    else:
        names = [shard_name(stem, variant, i + 1, len(shards)) for i in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    if not overwrite:
        there = [n for n in ("config.json", single, index) if (folder / n).exists()]
        if there:
            raise FileExistsError(f"{folder} already has {', '.join(there)}; pass overwrite=True")

    mark = f".{uuid.uuid4().hex[:8]}.part"
    waiting = ["config.json"]  # in the order of the renames
    try:
        _write_json(folder / ("config.json" + mark), config)
        for name, shard in zip(names, shards, strict=True):
            waiting.append(name)
            write_safetensors(folder / (name + mark), shard, metadata)
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(array.nbytes for array in tensors.values())
            entry = {"metadata": {"total_size": total}, "weight_map": weight_map}
            waiting.append(index)
            _write_json(folder / (index + mark), entry)

        for name in (single, index):
            (folder / name).unlink(missing_ok=True)
        for name in waiting:
            os.replace(folder / (name + mark), folder / name)
    except BaseException:
        for name in waiting:
            (folder / (name + mark)).unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    for path in folder.glob(shard_name(stem, variant, 0, 0).replace("00000", "[0-9]" * 5)):
        if path.name not in names:
            path.unlink()
    return [folder / name for name in names]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renames last through a power cut, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
