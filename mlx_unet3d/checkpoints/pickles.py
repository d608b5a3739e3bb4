"""Tensors of torch pickles (`.bin`, `.pth`, `.ckpt`) without torch, and without running the pickles.

`torch_archives` opens the container, `unpickling` interprets the pickle in it as data, and this module finds
the tensors of the result and locates them in the file.
"""

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..inputs import open_input
from .headers import Header, TensorInfo
from .pickle_values import Tensor, shown
from .torch_archives import Places, begins_archive, read_container

# Errors that reading nonsense may raise.
_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, EOFError, RuntimeError, OverflowError,
    OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_PARTS = ("unet", "vae", "text_encoder", "image_proj", "ip_adapter")


def is_pickle(path: str | Path) -> bool:
    """Return True for a file that begins like one of torch's containers."""
    with open_input(path) as file:
        return begins_pickle(file.read(4))


def begins_pickle(start: bytes) -> bool:
    """Return True for the first bytes of one of torch's containers."""
    return begins_archive(start) or (len(start) > 1 and start[0] == 0x80 and start[1] in (2, 3, 4, 5))


def read_pickle(path: str | Path, *, lists: bool = False) -> Header:
    """Find the tensors of a state dict and where they lie, as `read_header`; no tensor data is read.

    A file that wraps its state dict ("state_dict", "module" or "model", beside an optimizer and the like)
    gives the wrapped one; one that has a state dict for each network of a pipeline ("unet", "vae",
    "text_encoder"), or for each part of an IP-Adapter, gives them all, as "unet.NAME" and so on. With
    `lists`, a list of tensors counts as well: their names are "0", "1" and so on. Of an embedding of the web
    UI ("string_to_param"), the metadata has the "name".

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no torch file, or a damaged one, or asks for something that is not on the list.
    """
    path = Path(path)
    with open_input(path) as file:
        return read_pickle_of(path, file, os.fstat(file.fileno()).st_size, lists=lists)


def read_pickle_of(
    path: Path, file: BinaryIO, size: int, *, lists: bool = False, locate: bool = True
) -> Header:
    """As `read_pickle`, of an open file of `size` bytes, which messages call `path`.

    Without `locate`, tensors are not located in a zip archive: their `begin` means nothing.
    """
    try:
        value, places = read_container(path, file, locate)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is not a torch file, or a damaged one ({str(error)[:300]}); download it again"
        ) from error
    if lists and isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
        value = {str(i): tensor for i, tensor in enumerate(value)}
    metadata = {}
    if isinstance(value, dict) and isinstance(value.get("string_to_param"), dict):
        metadata = {"name": name} if isinstance(name := value.get("name"), str) else {}
        value = value["string_to_param"]
    tensors = _state_dict(path, value)
    located = {name: _located(path, name, tensor, places, size) for name, tensor in tensors.items()}
    return Header(located, metadata)


def _state_dict(path: Path, value: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "module", "model", None):
        found = value if key is None else value.get(key) if isinstance(value, dict) else None
        if isinstance(found, dict):
            tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if tensors:
                return tensors
    if isinstance(value, dict):
        parts = {part: found for part in _PARTS if isinstance(found := value.get(part), dict)}
        tensors = {
            f"{part}.{key}": tensor
            for part, found in parts.items()
            for key, tensor in found.items()
            if isinstance(key, str) and isinstance(tensor, Tensor)
        }
        if tensors:
            return tensors
    keys = f" with {', '.join(shown(key) for key in list(value)[:6])}" if isinstance(value, dict) else ""
    raise CheckpointError(
        f"{path} holds no tensors by name but a {type(value).__name__}{keys}; is it a checkpoint of weights?"
    )


def _located(path: Path, name: str, tensor: Tensor, places: Places, size: int) -> TensorInfo:
    """Locate a tensor; CheckpointError unless it lies inside its storage, and that inside the file."""
    storage = tensor.storage
    begin, nbytes = places.get(storage.key, (0, -1))
    if nbytes != storage.count * storage.item_bytes or begin + nbytes > size:
        raise CheckpointError(
            f"{path}: the data of {name[:80]!r} is {'missing' if nbytes < 0 else 'cut short'}; "
            "download it again"
        )
    nbytes = math.prod(tensor.shape) * storage.item_bytes
    if not nbytes:
        return TensorInfo(storage.dtype, tensor.shape, 0, begin, (0,) * len(tensor.shape))
    # The stride of an axis of one element is never used, and may be anything.
    axes = [
        (length, stride if length > 1 else 0)
        for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    last = tensor.first + sum((length - 1) * stride for length, stride in axes)
    if last >= storage.count:
        raise CheckpointError(
            f"{path}: {name[:80]!r} reaches beyond its data; the file is damaged, download it again"
        )
    if nbytes > size:  # it repeats a part of its data
        raise CheckpointError(
            f"{path}: {name[:80]!r} of {tensor.shape} is larger than the file; save it again from torch, "
            "as tensor.contiguous()"
        )
    first = begin + tensor.first * storage.item_bytes
    return TensorInfo(storage.dtype, tensor.shape, nbytes, first, tuple(stride for _, stride in axes))
