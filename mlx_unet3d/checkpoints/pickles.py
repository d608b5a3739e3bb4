"""Reading the tensors of torch pickles (`.bin`, `.pth`, `.ckpt`) without torch, and without running them.

A pickle is a program for a small stack machine, and unpickling runs it, calls of any function included. Here
its opcodes are interpreted as data: containers, numbers and text are built, the few names that torch's own
files need stand for values of this module, some of what training leaves beside the weights is passed over,
and every other name is refused. Nothing is ever imported or called.

Both containers of torch are read: the zip archive (torch >= 1.6) and the older sequence of pickles. Source:
`torch/serialization.py`, whose formats these are, and Python's `pickletools`.
"""

import io
import math
import os
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import CheckpointError, printable
from ..inputs import open_input
from .headers import MAX_AXES, MAX_DIMENSION, Header, TensorInfo

# torch's storage classes -> names of dtypes in safetensors' spelling, and bytes an element.
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# What reading nonsense may raise.
_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, EOFError, RuntimeError, OverflowError,
    OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
# Names and shapes of 50,000 tensors take a twentieth of the bytes, and all of the steps. The steps bound the
# memory: each is a byte or more of the file and may make a list, which takes 64.
_MAX_PICKLE_BYTES = 256 * 2**20
_ZIP = b"PK\x03\x04"
_ENCRYPTED = 0x1
_UTF_8 = 0x800  # the flag of zip entries whose names are not in its old code page
_MAX_STEPS = 2_000_000


@dataclass(frozen=True)
class _Storage:
    """A run of elements in the file; a legacy one learns its place only after the pickles."""

    key: str
    dtype: str
    item_bytes: int
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A name that a pickle refers to and that is on the list."""

    module: str
    name: str


@dataclass(frozen=True)
class _Inert:
    """In the place of an object that is no weight, by the name of its class; what it holds is dropped."""

    name: str


class _Parameters(dict[Any, Any]):
    """torch.nn.ParameterDict: the parameters of its state."""


def is_pickle(path: str | Path) -> bool:
    """Whether the file begins like one of torch's containers."""
    with open_input(path) as file:
        start = file.read(4)
    return start == _ZIP or (len(start) > 1 and start[0] == 0x80 and start[1] in (2, 3, 4, 5))


def read_pickle(path: str | Path, *, lists: bool = False) -> Header:
    """The tensors of a state dict and where they lie, as `read_header`; no tensor data is read.

    A file that wraps its state dict ("state_dict", "module" or "model", beside an optimizer and the like)
    gives the wrapped one; one that has a state dict for each network of a pipeline ("unet", "vae",
    "text_encoder") gives them all, as "unet.NAME" and so on. With `lists`, a list of tensors counts as well:
    their names are "0", "1" and so on. Of an embedding of the web UI
    ("string_to_param"), the metadata has the "name".

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no torch file, or a damaged one, or asks for something that is not on the list.
    """
    path = Path(path)
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.read(4) == _ZIP:  # as torch decides it: not what comes behind other bytes
                value, places = _read_zip(path, file, size)
            else:
                value, places = _read_legacy(path, file, size)
        except CheckpointError:
            raise
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path} is not a torch file, or a damaged one ({str(error)[:300]}); download it again"
            ) from error
    if lists and isinstance(value, list) and value and all(isinstance(v, _Tensor) for v in value):
        value = {str(i): tensor for i, tensor in enumerate(value)}
    metadata = {}
    if isinstance(value, dict) and isinstance(value.get("string_to_param"), dict):
        metadata = {"name": name} if isinstance(name := value.get("name"), str) else {}
        value = value["string_to_param"]
    tensors = _state_dict(path, value)
    located = {name: _located(path, name, tensor, places, size) for name, tensor in tensors.items()}
    return Header(located, metadata)


_PARTS = ("unet", "vae", "text_encoder")


def _state_dict(path: Path, value: Any) -> dict[str, _Tensor]:
    for key in ("state_dict", "module", "model", None):
        found = value if key is None else value.get(key) if isinstance(value, dict) else None
        if isinstance(found, dict):
            tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, _Tensor)}
            if tensors:
                return tensors
    if isinstance(value, dict):
        parts = {part: found for part in _PARTS if isinstance(found := value.get(part), dict)}
        tensors = {
            f"{part}.{key}": tensor
            for part, found in parts.items()
            for key, tensor in found.items()
            if isinstance(key, str) and isinstance(tensor, _Tensor)
        }
        if tensors:
            return tensors
    keys = f" with {', '.join(_shown(key) for key in list(value)[:6])}" if isinstance(value, dict) else ""
    raise CheckpointError(
        f"{path} holds no tensors by name but a {type(value).__name__}{keys}; is it a checkpoint of weights?"
    )


def _located(
    path: Path, name: str, tensor: _Tensor, places: Mapping[str, tuple[int, int]], size: int
) -> TensorInfo:
    """The tensor's place in the file, checked to lie inside its storage and that inside the file."""
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
    # How far it is to the next element of an axis that has one says nothing.
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


# The two containers.


def _read_zip(path: Path, file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The unpickled object, and place and bytes of each storage."""
    places = {}
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check_archive(archive)
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path} is a zip archive without torch's data.pkl "
                f"({printable(', '.join(list(entries)[:4]))}, ...); unpack it, or take the weights themselves"
            )
        root = pickles[0].removesuffix("data.pkl")
        for name, entry in entries.items():
            if not name.startswith(root):
                raise ValueError(f"{_shown(name)} lies outside {_shown(root)}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: {name[:80]!r} is compressed, which torch never does; download it again"
                )
            if name.startswith(root + "data/"):
                places[name.removeprefix(root + "data/")] = _data_of(file, entry), entry.file_size
        if root + "byteorder" in entries:
            with archive.open(root + "byteorder") as data:
                order = data.read(20)
            if order != b"little":
                raise CheckpointError(
                    f"{path} has {order.decode(errors='replace')}-endian data; save it again"
                )
        if entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: its data.pkl is larger than any list of tensors; download it again"
            )
        with archive.open(pickles[0]) as data:
            value = _Machine(path, io.BytesIO(data.read())).run()
    return value, places


def _check_archive(archive: zipfile.ZipFile) -> None:
    """ValueError for what torch refuses or reads as something else: bytes in front, for which `zipfile` moves
    all offsets; names that come twice, or in capitals; sizes that differ; encryption."""
    size = archive.fp.seek(0, os.SEEK_END)
    archive.fp.seek(max(size - 2**16 - 22, 0))
    end = archive.fp.read()
    end = end[end.rindex(b"PK\x05\x06") :]  # the end of the central directory, which a comment may follow
    stated = int.from_bytes(end[16:20], "little")
    if stated not in (
        archive.start_dir,
        0xFFFFFFFF,
    ):  # the second: too large for its field, and stated elsewhere
        raise ValueError("bytes stand before the archive")
    names: set[str] = set()
    for entry in archive.infolist():
        if entry.filename.lower() in names:
            raise ValueError(f"{_shown(entry.filename)} comes twice")
        names.add(entry.filename.lower())
        stored = entry.compress_type == zipfile.ZIP_STORED
        if entry.flag_bits & _ENCRYPTED or (stored and entry.compress_size != entry.file_size):
            raise ValueError(f"{_shown(entry.filename)} is encrypted or of two sizes")


def _data_of(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the data of a stored entry begins: behind its local header, whose extra field may differ."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"no local header for {entry.filename}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    if file.read(name_bytes) != entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437"):
        raise ValueError(f"the local header of {entry.filename} has another name")
    return entry.header_offset + 30 + name_bytes + extra_bytes


def _read_legacy(path: Path, file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_zip`: magic number, protocol, system facts, object, the storages' keys, their data."""
    file.seek(0)
    pickles = _Bounded(file)
    magic, protocol, system = (_Machine(path, pickles).run() for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise ValueError("it does not begin with torch's magic number")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} has big-endian data; save it again")
    machine = _Machine(path, pickles)
    value, keys = machine.run(), _Machine(path, pickles).run()
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    places = {}
    for key in keys:
        storage = machine.storages.get(key) if isinstance(key, str) else None
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.count:
            raise ValueError(f"storage {_shown(key)} is not as announced")
        places[key] = file.tell(), count * storage.item_bytes
        file.seek(count * storage.item_bytes, os.SEEK_CUR)
    return value, places


# The stack machine.

_MARK = object()


class _Bounded:
    """The part of a file that holds pickles: reads no more of it than any list of tensors takes."""

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, _MAX_PICKLE_BYTES

    def read(self, count: int) -> bytes:
        return self._spent(self._file.read(count) if count <= self._left else None)

    def readline(self) -> bytes:
        return self._spent(self._file.readline(self._left + 1))

    def _spent(self, data: bytes | None) -> bytes:
        if data is None or len(data) > self._left:
            raise ValueError("it is larger than any list of tensors")
        self._left -= len(data)
        return data


class _Machine:
    """Runs one pickle as data, from where the file stands to its STOP."""

    def __init__(self, path: Path, file: "io.BytesIO | _Bounded"):
        self.path, self.file = path, file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        self.steps = 0

    def run(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes in text that is refused anyway
            return self._run()

    def _run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.file):
            name = opcode.name
            self.steps += 1
            if self.steps > _MAX_STEPS:
                self.step(0)
            action = _ACTIONS.get(name)
            if action is not None:
                action(self, argument)
            elif name in _PUSHED:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                (value,) = self.stack
                return value
            elif name not in _IGNORED:
                raise self.refused(f"the operation {name}")
        raise EOFError("the pickle has no end")

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > _MAX_STEPS:
            raise ValueError("it does more than any list of tensors needs")

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} asks for {what}, which a file of weights does not need; it may be malicious, and "
            "nothing of it was run. Take the weights from a source that you trust, as .safetensors"
        )

    def marked(self) -> list[Any]:
        """What lies above the last mark, taken off with it."""
        at = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK), None)
        if at is None:
            raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def name(self, module: Any, name: Any) -> None:
        known = isinstance(module, str) and isinstance(name, str)
        if not known or name not in (*_NAMES.get(module, ()), *_HARMLESS.get(module, ())):
            raise self.refused(f"{_shown(module)}.{_shown(name)}")
        self.stack.append(_Name(module, name))

    def named(self, text: str) -> None:
        self.name(*text.split(" ", 1))  # genops joins the two lines of GLOBAL by a space

    def named_from_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise self.refused("a call of a value")
        make = _CALLS.get((function.module, function.name))
        if make is not None:
            self.step(sum(len(value) for value in arguments if isinstance(value, tuple | list | dict)))
            self.stack.append(make(*arguments))
        elif function.name in _HARMLESS.get(function.module, ()):
            self.stack.append(_Inert(f"{function.module}.{function.name}"))
        else:
            raise self.refused(f"a call of {function.module}.{function.name}")

    def build(self, _: Any) -> None:
        """The state of a ParameterDict; else not needed, such as an OrderedDict's `_metadata`."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Parameters):
            parameters = state.get("_parameters") if isinstance(state, dict) else None
            if not isinstance(parameters, dict):
                raise ValueError("a ParameterDict without parameters")
            self.step(len(parameters))
            target.update(parameters)
        elif not isinstance(target, dict | _Inert):
            raise self.refused(f"changing a {type(target).__name__}")

    def add_all(self, items: list[Any]) -> None:
        """To a set, which is dropped as any `_Inert`."""
        if not isinstance(self.stack[-1], _Inert):
            raise ValueError("items for no set")

    def persistent(self, _: Any) -> None:
        """A storage: ("storage", class, key, device, elements), and in legacy files a view.

        Legacy files have ("module", class, its file, its source) in the place of the class of a module.
        """
        identity = self.stack.pop()
        if isinstance(identity, tuple) and identity[:1] == ("module",) and identity[1:2] == (_PARAMETERS,):
            self.stack.append(_PARAMETERS)
            return
        kind, cls, key, _device, count, *view = identity if isinstance(identity, tuple) else (None,) * 5
        if kind != "storage" or not isinstance(cls, _Name) or cls.name not in _STORAGES:
            raise self.refused(f"the storage {_shown(kind)}")
        if (
            not isinstance(key, str)
            or type(count) is not int
            or count < 0
            or any(v is not None for v in view)
        ):
            raise ValueError(f"storage {_shown(key)} of {_shown(count)} elements")
        dtype, item_bytes = _STORAGES[cls.name]
        self.storages[key] = storage = _Storage(key, dtype, item_bytes, count)
        self.stack.append(storage)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Inert):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items for no dictionary")
        if not all(type(key) in (str, int) for key in pairs[::2]):
            raise ValueError("a key that is no name")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append_all(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], _Inert):
            return
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for no list")
        self.stack[-1].extend(items)

    def top(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError("too few values")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *_unused: Any) -> _Tensor:
    """torch._utils._rebuild_tensor_v2, and its forerunner with fewer arguments."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError(f"a tensor of a {type(storage).__name__} and a {type(shape).__name__}")
    if any(type(n) is int and n > MAX_DIMENSION for n in shape):
        raise ValueError(f"a tensor of shape {', '.join(map(_shown, shape))}; sizes go to 2**31 - 1")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides, at most {MAX_AXES}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (first, *shape, *strides)):
        raise ValueError(
            f"a tensor of shape {', '.join(map(_shown, shape))}, strides {', '.join(map(_shown, strides))}"
        )
    return _Tensor(storage, first, shape, strides)


def _parameter(data: Any, *_unused: Any) -> Any:
    """torch._utils._rebuild_parameter, and that with attributes: the tensor that it holds."""
    return data


def _parameters() -> _Parameters:
    """torch.nn.ParameterDict, empty until its state comes."""
    return _Parameters()


def _default_dictionary(_factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    """collections.defaultdict, without what makes its defaults."""
    return _dictionary(items)


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    """collections.OrderedDict, made empty or of another dictionary's items; a dict keeps its order, too."""
    pairs = list(items.items() if isinstance(items, dict) else items)
    if not all(isinstance(pair, list | tuple) and type(pair[0]) in (str, int) for pair in pairs):
        raise ValueError("a key that is no name")
    return dict(pairs)


def _size(lengths: Any) -> tuple[Any, ...]:
    """torch.Size, of a tuple."""
    if not isinstance(lengths, tuple):
        raise ValueError("a size that is no tuple")
    return lengths


def _shown(value: Any) -> str:
    """For a message: text and numbers, in short; of anything else only what it is, as it may be endless."""
    if isinstance(value, str):
        return printable(value[:80])
    return repr(value) if type(value) is int and abs(value) < 2**64 else type(value).__name__


_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_NAMES: dict[str, tuple[str, ...]] = {
    "collections": ("OrderedDict", "defaultdict"),
    "torch": (*_STORAGES, "Size"),
    "torch._utils": _TENSORS,
    "torch.nn.modules.container": ("ParameterDict",),
}
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "defaultdict"): _default_dictionary,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,  # torch < 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.modules.container", "ParameterDict"): _parameters,
}
_PARAMETERS = _Name("torch.nn.modules.container", "ParameterDict")

# Classes whose objects are plain values: each is replaced by an `_Inert`. Python 2's names are those that
# pickles of protocol 2 have.
_BUILTINS = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object")
_BUILTINS += ("range", "set", "slice", "str", "tuple")
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_HARMLESS: dict[str, tuple[str, ...]] = {
    "__builtin__": (*_BUILTINS, "long", "unicode", "xrange"),
    "_codecs": ("encode",),  # bytes
    "argparse": ("Namespace",),
    "builtins": _BUILTINS,
    "collections": ("Counter", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "numpy": (
        "dtype", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
    ),
    "numpy._core.multiarray": ("scalar",),
    "numpy.core.multiarray": ("scalar",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": (
        "bfloat16", "bool", "complex64", "complex128", "device", "float16", "float32", "float64",
        "float8_e4m3fn", "float8_e5m2", "int8", "int16", "int32", "int64", "uint8",
    ),
    "torch.serialization": ("_get_layout",),
    "types": ("SimpleNamespace",),
}  # fmt: skip

_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "MARK": _MARK,
    "EMPTY_TUPLE": (),
}
_PUSHED = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip


def _memoize(machine: _Machine, _: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _frozen(_items: list[Any]) -> _Inert:
    return _Inert("frozenset")


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.stack.append(m.top(1)),
    "TUPLE2": lambda m, _: m.stack.append(m.top(2)),
    "TUPLE3": lambda m, _: m.stack.append(m.top(3)),
    "SETITEM": lambda m, _: m.set_items(list(m.top(2))),
    "SETITEMS": lambda m, _: m.set_items(m.marked()),
    "APPEND": lambda m, _: m.append_all(list(m.top(1))),
    "APPENDS": lambda m, _: m.append_all(m.marked()),
    "BINPUT": lambda m, i: m.memo.__setitem__(i, m.stack[-1]),
    "LONG_BINPUT": lambda m, i: m.memo.__setitem__(i, m.stack[-1]),
    "MEMOIZE": _memoize,
    "BINGET": lambda m, i: m.stack.append(m.memo[i]),
    "LONG_BINGET": lambda m, i: m.stack.append(m.memo[i]),
    "GLOBAL": lambda m, text: m.named(text),
    "STACK_GLOBAL": lambda m, x: m.named_from_stack(x),
    "REDUCE": lambda m, x: m.call(x),
    "NEWOBJ": lambda m, x: m.call(x),
    "EMPTY_SET": lambda m, _: m.stack.append(_Inert("set")),
    "ADDITEMS": lambda m, _: m.add_all(m.marked()),
    "FROZENSET": lambda m, _: m.stack.append(_frozen(m.marked())),
    "BUILD": lambda m, x: m.build(x),
    "BINPERSID": lambda m, x: m.persistent(x),
}
