"""The stack machine of pickles, run as data: no import, no call.

A pickle is a program for a small stack machine, and unpickling runs it, calls of any function included. Here
its opcodes build containers, numbers and text; names stand for the values of `pickle_values`, and every name
that is not listed there is refused. Source: Python's `pickletools`.
"""

import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from ..errors import CheckpointError
from .pickle_values import (
    CALLS,
    HARMLESS,
    NAMES,
    PARAMETERS,
    STORAGES,
    Inert,
    Name,
    Parameters,
    Storage,
    shown,
)

# Names and shapes of 50,000 tensors take a twentieth of the bytes, and all of the steps. The steps bound the
# memory: each is a byte or more of the file and may make a list, which takes 64.
MAX_PICKLE_BYTES = 256 * 2**20
_MAX_STEPS = 2_000_000

_MARK = object()


class Reader(Protocol):
    """The part of a file object that a pickle is read by."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Bounded:
    """The part of a file that holds pickles: reads no more of it than any list of tensors takes."""

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, MAX_PICKLE_BYTES

    def read(self, count: int) -> bytes:
        return self._spent(self._file.read(count) if count <= self._left else None)

    def readline(self) -> bytes:
        return self._spent(self._file.readline(self._left + 1))

    def _spent(self, data: bytes | None) -> bytes:
        if data is None or len(data) > self._left:
            raise ValueError("it is larger than any list of tensors")
        self._left -= len(data)
        return data


class Machine:
    """Runs one pickle as data, from where the file stands to its STOP."""

    def __init__(self, path: Path, file: Reader):
        self.path, self.file = path, file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
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
        """Take the last mark and the values above it off the stack; returns the values."""
        at = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK), None)
        if at is None:
            raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def name(self, module: Any, name: Any) -> None:
        known = isinstance(module, str) and isinstance(name, str)
        if not known or name not in (*NAMES.get(module, ()), *HARMLESS.get(module, ())):
            raise self.refused(f"{shown(module)}.{shown(name)}")
        self.stack.append(Name(module, name))

    def named(self, text: str) -> None:
        self.name(*text.split(" ", 1))  # genops joins the two lines of GLOBAL by a space

    def named_from_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise self.refused("a call of a value")
        make = CALLS.get((function.module, function.name))
        if make is not None:
            self.step(sum(len(value) for value in arguments if isinstance(value, tuple | list | dict)))
            self.stack.append(make(*arguments))
        elif function.name in HARMLESS.get(function.module, ()):
            self.stack.append(Inert(f"{function.module}.{function.name}"))
        else:
            raise self.refused(f"a call of {function.module}.{function.name}")

    def build(self, _: Any) -> None:
        """Set the state of a ParameterDict; pass over any other, such as an OrderedDict's `_metadata`."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Parameters):
            parameters = state.get("_parameters") if isinstance(state, dict) else None
            if not isinstance(parameters, dict):
                raise ValueError("a ParameterDict without parameters")
            self.step(len(parameters))
            target.update(parameters)
        elif not isinstance(target, dict | Inert):
            raise self.refused(f"changing a {type(target).__name__}")

    def add_all(self, items: list[Any]) -> None:
        """Add to a set, which is dropped as any `Inert`."""
        if not isinstance(self.stack[-1], Inert):
            raise ValueError("items for no set")

    def persistent(self, _: Any) -> None:
        """Push a storage: ("storage", class, key, device, elements), and in legacy files a view.

        Legacy files have ("module", class, its file, its source) in the place of the class of a module.
        """
        identity = self.stack.pop()
        if isinstance(identity, tuple) and identity[:1] == ("module",) and identity[1:2] == (PARAMETERS,):
            self.stack.append(PARAMETERS)
            return
        kind, cls, key, _device, count, *view = identity if isinstance(identity, tuple) else (None,) * 5
        if kind != "storage" or not isinstance(cls, Name) or cls.name not in STORAGES:
            raise self.refused(f"the storage {shown(kind)}")
        if (
            not isinstance(key, str)
            or type(count) is not int
            or count < 0
            or any(v is not None for v in view)
        ):
            raise ValueError(f"storage {shown(key)} of {shown(count)} elements")
        dtype, item_bytes = STORAGES[cls.name]
        self.storages[key] = storage = Storage(key, dtype, item_bytes, count)
        self.stack.append(storage)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items for no dictionary")
        if not all(type(key) in (str, int) for key in pairs[::2]):
            raise ValueError("a key that is no name")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append_all(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], Inert):
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


def _memoize(machine: Machine, _: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _frozen(_items: list[Any]) -> Inert:
    return Inert("frozenset")


_ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
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
    "GLOBAL": Machine.named,
    "STACK_GLOBAL": Machine.named_from_stack,
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.call,
    "EMPTY_SET": lambda m, _: m.stack.append(Inert("set")),
    "ADDITEMS": lambda m, _: m.add_all(m.marked()),
    "FROZENSET": lambda m, _: m.stack.append(_frozen(m.marked())),
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}
