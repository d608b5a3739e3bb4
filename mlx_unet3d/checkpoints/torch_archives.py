"""The two containers of torch's files: the zip archive (torch >= 1.6) and the older sequence of pickles.

Both hold one pickled object and the data of its storages. Archives that torch refuses are refused, and those
that it reads as other numbers than Python's `zipfile`. Source: `torch/serialization.py` and
`caffe2/serialize/inline_container.cc`.
"""

import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, printable
from .pickle_values import shown
from .unpickling import MAX_PICKLE_BYTES, Bounded, Machine

_ZIP = b"PK\x03\x04"
_ENCRYPTED = 0x1
_UTF_8 = 0x800  # the flag of zip entries whose names are not in its old code page
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_VERSION_NAMES = (".data/version", "version")  # the first wins
_VERSIONS = range(1, 11)

Places = dict[str, tuple[int, int]]
"""Where the data of each storage begins in the file, and its bytes, by the storage's key."""


def begins_archive(start: bytes) -> bool:
    """Decide by the first bytes of a file, as torch does, whether to read it as a zip archive."""
    return start[:4] == _ZIP


def read_container(path: Path, file: BinaryIO, locate: bool = True) -> tuple[Any, Places]:
    """Return the unpickled object of an open file, and the places of its storages.

    Without `locate`, the places in an archive are those of the storages' headers, which lie just before them.

    Raises CheckpointError, and for nonsense anything that `zipfile`, `struct` and `pickletools` raise.
    """
    return _read_zip(path, file, locate) if begins_archive(file.read(4)) else _read_legacy(path, file)


def _read_zip(path: Path, file: BinaryIO, locate: bool) -> tuple[Any, Places]:
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive)
        root, members = _members(path, archive)
        places = {}
        for name, entry in members.items():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: {entry.filename[:80]!r} is compressed, which torch never does; "
                    "download it again"
                )
            if name.startswith("data/"):
                key = entry.filename.removeprefix(f"{root}data/")
                places[key] = _data_of(file, entry) if locate else entry.header_offset, entry.file_size

        def content(name: str, most: int = 32) -> bytes:
            with archive.open(members[name]) as member:
                return member.read(most)

        if "constants.pkl" in members:
            raise CheckpointError(
                f"{path} is a TorchScript program, not weights; save its state_dict() instead"
            )
        _check_version(path, next((content(name) for name in _VERSION_NAMES if name in members), None))
        if "byteorder" in members and (order := content("byteorder")) != b"little":
            kind = (
                "big-endian data"
                if order == b"big"
                else f"the unknown byte order {shown(order.decode(errors='replace'))!r}"
            )
            raise CheckpointError(f"{path} has {kind}, where this package reads little-endian; save it again")
        if ".storage_alignment" in members:
            int(content(".storage_alignment"))  # ValueError, as in torch
        if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: its data.pkl is larger than any list of tensors; download it again"
            )
        value = Machine(path, io.BytesIO(content("data.pkl", MAX_PICKLE_BYTES))).run()
    return value, places


def _members(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Return the folder that all members lie in, which the first one gives, and the members by their names
    inside it in lower case, by which torch finds them.

    Raises CheckpointError where there is no `data.pkl`, ValueError for members outside the folder.
    """
    entries = archive.infolist()
    if not any(entry.filename.lower().endswith("/data.pkl") for entry in entries):
        raise CheckpointError(
            f"{path} is a zip archive without torch's data.pkl "
            f"({printable(', '.join(entry.filename for entry in entries[:4]))}, ...); unpack it, or take the "
            "weights themselves"
        )
    root = f"{entries[0].filename.partition('/')[0]}/"
    outside = next((entry.filename for entry in entries if not entry.filename.startswith(root)), None)
    if outside is not None:
        raise ValueError(f"{shown(outside)} lies outside {shown(root)}, the folder of its first member")
    members = {entry.filename.removeprefix(root).lower(): entry for entry in entries}
    if "data.pkl" not in members:
        raise ValueError(f"{shown(root)} has no data.pkl")
    return root, members


def _check_version(path: Path, text: bytes | None) -> None:
    """CheckpointError for a format that torch refuses: without a number, or of a version that it does not
    know. Text behind the number is passed over, as there."""
    if text is None:
        raise CheckpointError(
            f"{path} has no member {_VERSION_NAMES[-1]!r}, which torch writes into every file; it is damaged "
            "or packed by another program: download it again, or save it again from torch"
        )
    number = re.match(rb"\s*\+?(\d+)", text)
    if number is None or int(number[1]) not in _VERSIONS:
        raise CheckpointError(
            f"{path} is of the version {shown(text.decode(errors='replace').strip())!r} of torch's format; "
            f"it must be {_VERSIONS[0]} to {_VERSIONS[-1]}: save it again from torch"
        )


def _check_archive(archive: zipfile.ZipFile) -> None:
    """ValueError for archives that torch refuses or reads as something else: bytes in front, for which
    `zipfile` moves all offsets; names that come twice, or in capitals; sizes that differ; encryption."""
    size = archive.fp.seek(0, os.SEEK_END)
    archive.fp.seek(max(size - 2**16 - 22, 0))
    end = archive.fp.read()
    end = end[end.rindex(b"PK\x05\x06") :]  # the end of the central directory, which a comment may follow
    stated = int.from_bytes(end[16:20], "little")
    # The second stands for an offset that is too large for its field, and stated elsewhere.
    if stated not in (archive.start_dir, 0xFFFFFFFF):
        raise ValueError("bytes stand before the archive")
    names: set[str] = set()
    for entry in archive.infolist():
        if entry.filename.lower() in names:
            raise ValueError(f"{shown(entry.filename)} comes twice")
        names.add(entry.filename.lower())
        stored = entry.compress_type == zipfile.ZIP_STORED
        if entry.flag_bits & _ENCRYPTED or (stored and entry.compress_size != entry.file_size):
            raise ValueError(f"{shown(entry.filename)} is encrypted or of two sizes")


def _data_of(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where the data of an entry begin: behind its local header, whose extra field may differ."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if not begins_archive(header):
        raise ValueError(f"no local header for {entry.filename}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    if file.read(name_bytes) != entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437"):
        raise ValueError(f"the local header of {entry.filename} has another name")
    return entry.header_offset + 30 + name_bytes + extra_bytes


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, Places]:
    """Read magic number, protocol, system facts, object, the storages' keys, and find their data."""
    file.seek(0)
    pickles = Bounded(file)
    magic, protocol, system = (Machine(path, pickles).run() for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise ValueError("it does not begin with torch's magic number")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} has big-endian data; save it again")
    machine = Machine(path, pickles)
    value, keys = machine.run(), Machine(path, pickles).run()
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    places = {}
    for key in keys:
        storage = machine.storages.get(key) if isinstance(key, str) else None
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.count:
            raise ValueError(f"storage {shown(key)} is not as announced")
        places[key] = file.tell(), count * storage.item_bytes
        file.seek(count * storage.item_bytes, os.SEEK_CUR)
    return value, places
