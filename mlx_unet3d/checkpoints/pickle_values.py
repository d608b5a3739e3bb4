"""Names that a pickle of weights may refer to, and the values of this package that stand for them.

The few functions and classes that torch's own files need are made here of plain containers; of classes whose
objects training leaves beside the weights, only the name is kept. Every other name is refused by its absence
from these tables. Source: `torch/_utils.py` and `torch/storage.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from .headers import MAX_AXES, MAX_DIMENSION

# torch's storage classes -> names of dtypes in safetensors' spelling, and bytes an element.
STORAGES = {
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


@dataclass(frozen=True)
class Storage:
    """A run of elements in the file; a legacy one learns its place only after the pickles."""

    key: str
    dtype: str
    item_bytes: int
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A name that a pickle refers to and that is on the list."""

    module: str
    name: str


@dataclass(frozen=True)
class Inert:
    """Stands for an object that is no weight, by the name of its class, without its content."""

    name: str


class Parameters(dict[Any, Any]):
    """torch.nn.ParameterDict: the parameters of its state."""


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *_unused: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2, and its forerunner with fewer arguments."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError(f"a tensor of a {type(storage).__name__} and a {type(shape).__name__}")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides, at most {MAX_AXES}")
    if any(type(n) is int and n > MAX_DIMENSION for n in shape):
        raise ValueError(f"a tensor of shape {', '.join(map(shown, shape))}; sizes go to 2**31 - 1")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (first, *shape, *strides)):
        raise ValueError(
            f"a tensor of shape {', '.join(map(shown, shape))}, strides {', '.join(map(shown, strides))}"
        )
    return Tensor(storage, first, shape, strides)


def _parameter(data: Any, *_unused: Any) -> Any:
    """torch._utils._rebuild_parameter and _rebuild_parameter_with_state: the tensor inside."""
    return data


def _parameters() -> Parameters:
    """torch.nn.ParameterDict, empty until its state comes."""
    return Parameters()


def _default_dictionary(_factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    """collections.defaultdict, without its factory."""
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


def shown(value: Any) -> str:
    """Show text and numbers in short, for a message; of anything else only the type, as it may be endless."""
    if isinstance(value, str):
        return printable(value[:80])
    return repr(value) if type(value) is int and abs(value) < 2**64 else type(value).__name__


_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
NAMES: dict[str, tuple[str, ...]] = {
    "collections": ("OrderedDict", "defaultdict"),
    "torch": (*STORAGES, "Size"),
    "torch._utils": _TENSORS,
    "torch.nn.modules.container": ("ParameterDict",),
}
CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "defaultdict"): _default_dictionary,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,  # torch < 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.modules.container", "ParameterDict"): _parameters,
}
PARAMETERS = Name("torch.nn.modules.container", "ParameterDict")

# Classes whose objects are plain values: each is replaced by an `Inert`. Python 2's names are those that
# pickles of protocol 2 have.
_BUILTINS = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object")
_BUILTINS += ("range", "set", "slice", "str", "tuple")
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
HARMLESS: dict[str, tuple[str, ...]] = {
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
