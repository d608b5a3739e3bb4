"""Reading and writing safetensors files.

`mx.load` believes the header: overlapping tensors, gaps, duplicate names and wrapped sizes pass,
and a crafted file crashes the process. So a header is first read here, strictly, without touching
the data; only then does MLX see the file. Format:
https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..inputs import open_input, parse_json
from .config import disguise

MLX_DTYPES: dict[str, mx.Dtype] = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "BOOL": mx.bool_,
    "C64": mx.complex64,
}
"""The dtypes of the format that MLX loads as what they are."""

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
_BITS = {name: 8 * dtype.size for name, dtype in MLX_DTYPES.items()} | {
    "F64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSION = 2**31 - 1
"""Of an axis: MLX shapes are int32."""
AHEAD = 64_000_000
"""Bytes of tensors that may be computed, and held, while others are written."""
MAX_AXES = 32
"""The most axes of a tensor: what NumPy 1 has, and far more than any layer needs."""


@dataclass(frozen=True)
class TensorInfo:
    """The entry of one tensor in a header.

    Attributes:
        dtype: the name of safetensors, such as "F16".
        shape: of the tensor.
        nbytes: bytes of its elements.
        begin: byte of the file at which its first element lies.
        strides: in elements, one for each axis; None for row-major, as in all safetensors files.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int
    strides: tuple[int, ...] | None = None

    def rows(self, start: int, stop: int) -> "TensorInfo":
        """Rows `start` to `stop` of its first axis, where they lie."""
        row_stride = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        item_bytes = self.nbytes // max(math.prod(self.shape), 1)
        shape = (stop - start, *self.shape[1:])
        return replace(
            self,
            shape=shape,
            nbytes=math.prod(shape) * item_bytes,
            begin=self.begin + start * row_stride * item_bytes,
        )

    def squeezed(self) -> "TensorInfo":
        """The same without its last axis, which must be of size 1."""
        if not self.shape or self.shape[-1] != 1:
            raise ValueError(f"the last axis of {self.shape} is not of size 1")
        return replace(
            self, shape=self.shape[:-1], strides=None if self.strides is None else self.strides[:-1]
        )

    def transposed(self) -> "TensorInfo":
        """The transpose of a matrix, where it lies."""
        if len(self.shape) != 2:
            raise ValueError(f"{self.shape} is not the shape of a matrix")
        strides = (self.shape[1], 1) if self.strides is None else self.strides
        return replace(self, shape=self.shape[::-1], strides=strides[::-1])


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when its turn to be written comes, and not kept."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    make: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Header:
    """The checked header of one file: its tensors, in the order of the file, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is something else (web page, git-lfs pointer, torch pickle, GGUF,
            ...), was cut short, or its header breaks a rule of the format.
    """
    path = Path(path)
    with open_input(path) as file:
        return read_header_of(path, file, os.fstat(file.fileno()).st_size)


def read_header_of(path: Path, file: BinaryIO, size: int) -> Header:
    """As `read_header`, of an open file of `size` bytes, which messages call `path`."""
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if size < 10 or start[8:9] != b"{" or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(_why_not_safetensors(path, start, size, length))
    file.seek(8)
    text = file.read(length)
    return _check_header(path, _parse(path, text), start=8 + length, data_bytes=size - 8 - length)


def load_tensors(path: str | Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name, once its header has been checked.

    The arrays are lazy: each is read when it is evaluated, so evaluate them while the file is
    unchanged.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: as `read_header`, or a dtype that MLX does not have.
    """
    check_dtypes(path, read_header(path))
    return mx.load(str(path), format="safetensors")


def check_dtypes(path: str | Path, header: Header) -> None:
    """Raise CheckpointError if `header` has a dtype that MLX cannot load as what it is."""
    for name, info in header.tensors.items():
        if info.dtype not in MLX_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {info.dtype}, which MLX does not have (it has "
                f"{', '.join(MLX_DTYPES)}); save the file as F32, F16 or BF16"
            )


def read_tensor(path: str | Path, info: TensorInfo) -> mx.array:
    """One tensor of a file, row-major and in memory; F64, which MLX lacks, comes as float32.

    Raises:
        CheckpointError: the file was cut short since its header was read, or MLX lacks the dtype.
    """
    if info.dtype not in MLX_DTYPES and info.dtype != "F64":
        raise CheckpointError(f"{path}: MLX has no dtype {info.dtype}; save the file as F32, F16 or BF16")
    bits = np.dtype(f"u{_BITS[info.dtype] // 8}")  # NumPy has no bfloat16, and copying needs no meaning
    strides = _row_major(info.shape) if info.strides is None else info.strides
    extent = 1 + sum((n - 1) * stride for n, stride in zip(info.shape, strides, strict=True))
    raw = np.fromfile(path, bits, count=extent if info.nbytes else 0, offset=info.begin)
    if info.nbytes and raw.size != extent:
        raise CheckpointError(f"{path} was cut short while it was read; download it again")
    if not info.nbytes:
        raw = np.zeros(info.shape, bits)
    elif info.strides is None:
        raw = raw.reshape(info.shape)
    else:
        view = np.lib.stride_tricks.as_strided(raw, info.shape, [bits.itemsize * s for s in strides])
        raw = np.ascontiguousarray(view).reshape(info.shape)
    if info.dtype == "F64":
        return mx.array(raw.view(np.float64).astype(np.float32))
    dtype = MLX_DTYPES[info.dtype]
    return mx.array(raw.reshape(-1).view(np.uint8)).view(dtype).reshape(info.shape)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def write_safetensors(
    path: str | Path, tensors: Mapping[str, mx.array | Deferred], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file and flush it to the disk.

    Equal tensors make equal bytes, in whatever order they come. Memory use is that of two of the largest
    tensors or of `AHEAD` above what is already evaluated: deferred ones are made, and lazy transposes made
    contiguous, a little ahead of those that are written.

    Raises:
        TypeError: an array has a dtype that the format does not have.
    """
    for name, array in tensors.items():
        if array.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, which safetensors does not have")
    # Widest items first keeps every tensor aligned to its item size without gaps.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.size, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        array = tensors[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in _made_ahead(tensors[name] for name in order):
            file.write(memoryview(array))
            del array
        file.flush()
        os.fsync(file.fileno())


def _made_ahead(tensors: Iterable[mx.array | Deferred]) -> Iterator[mx.array]:
    """The bytes of each tensor, in order; MLX computes some of those that follow meanwhile."""
    waiting: deque[mx.array] = deque()
    held = 0
    for tensor in tensors:
        array = tensor.make() if isinstance(tensor, Deferred) else tensor
        array = mx.contiguous(array).reshape(-1).view(mx.uint8)
        mx.async_eval(array)
        waiting.append(array)
        held += array.nbytes
        while len(waiting) > 1 and held > AHEAD:
            held -= waiting[0].nbytes
            yield waiting.popleft()
    yield from waiting


def _why_not_safetensors(path: Path, start: bytes, size: int, length: int) -> str:
    """One sentence for a file whose first bytes cannot be a safetensors header."""
    other = disguise(start)
    if size == 0:
        return f"{path} is empty; download it again"
    if other is not None:
        return f"{path} holds no weights but is {other}"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or (
        start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[8:9] != b"{"
    ):
        return (
            f"{path} is a torch pickle; this package loads safetensors and never runs pickles. "
            "Convert the checkpoint once with `mlx-unet3d convert`, or take the .safetensors file"
        )
    if start.startswith(b"GGUF"):
        return f"{path} is a GGUF file; this package reads safetensors, take the .safetensors file"
    if start.startswith(b"\x93NUMPY"):
        return f"{path} is a NumPy array; this package reads safetensors"
    if start[8:9] == b"{" and length > _MAX_HEADER_BYTES:
        return (
            f"{path}: its first 8 bytes claim a header of {length} bytes, above the limit of "
            f"{_MAX_HEADER_BYTES}; the file is damaged, download it again"
        )
    if size < 10 or (start[8:9] == b"{" and length > size - 8):
        return f"{path} is cut short: {size} bytes do not hold its header; download it again"
    return (
        f"{path} is not a safetensors file: it starts with {start[:16]!r}, not with a header "
        "length and '{'; download it again or take the .safetensors file"
    )


# An escape that Python's parser may take and others do not, such as "\\u+123"; an escaped backslash before
# the u makes it text.
_BAD_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u(?![0-9a-fA-F]{4})")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the name {twice!r} comes twice")
        return made

    def integer(digits: str) -> int:
        if digits == "-0":  # which the safetensors library takes for a fraction
            raise ValueError("-0 is no size")
        return int(digits)

    try:
        content = text.decode()
        if _BAD_ESCAPE.search(content):
            raise ValueError("an escape that is not of four hexadecimal digits")
        header = parse_json(content, pairs_hook=no_duplicates, parse_int=integer)
        if "\\u" in content:
            json.dumps(header, ensure_ascii=False).encode()  # half a character is no text
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its header is not valid JSON ({error}); the file is damaged, download it again"
        ) from error
    return header


def _check_header(path: Path, header: dict[str, Any], start: int, data_bytes: int) -> Header:
    def bad(what: str) -> CheckpointError:
        short = what if len(what) <= 500 else f"{what[:250]} ... {what[-250:]}"
        return CheckpointError(f"{path}: {short}; the file is damaged, download or convert it again")

    metadata = header.pop("__metadata__", {})
    if metadata is None:  # as mx.save_safetensors writes it without any
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad(f"its metadata must map text to text, not {str(metadata)[:80]}")

    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise bad(f"tensor {name!r} lacks one of dtype, shape, data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise bad(f"tensor {name!r} has the unknown dtype {dtype!r}")
        if isinstance(shape, list) and len(shape) > MAX_AXES:
            raise bad(f"tensor {name[:80]!r} has {len(shape)} axes, more than {MAX_AXES}")
        if not _naturals(shape) or any(n > MAX_DIMENSION for n in shape):
            raise bad(f"tensor {name!r} has shape {shape!r}; sizes go from 0 to 2**31 - 1")
        if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise bad(f"tensor {name!r} has data_offsets {offsets!r}, not [begin, end]")
        begin, end = offsets
        bits = math.prod(shape) * _BITS[dtype]
        if bits != 8 * (end - begin):
            raise bad(
                f"tensor {name!r} of {dtype} {tuple(shape)} takes {bits / 8:g} bytes, its "
                f"data_offsets {offsets} span {end - begin}"
            )
        tensors[name] = TensorInfo(dtype, tuple(shape), end - begin, start + begin)
        spans.append((begin, end, name))

    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise bad(f"tensor {name!r} {kind}: it begins at byte {begin}, not {position}")
        position = end
    if position > data_bytes:
        raise CheckpointError(
            f"{path} is cut short: its header promises {position} bytes of tensors, it has "
            f"{data_bytes}; download it again"
        )
    if position < data_bytes:
        raise bad(f"{data_bytes - position} bytes follow the last tensor")
    return Header(tensors, metadata)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
