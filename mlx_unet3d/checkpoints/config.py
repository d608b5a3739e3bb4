"""Configurations: the dataclass base and the JSON files that they come from."""

import dataclasses
import math
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import CheckpointError, printable
from ..inputs import open_input, parse_json
from ..scalars import as_python

Config = TypeVar("Config", bound="ModelConfig")

_MAX_TEXT_BYTES = 100_000_000  # the largest vocabularies have a tenth of that
_LARGEST = 2**31 - 1  # MLX shapes are int32
# Errors that values of a wrong kind or size may raise in the code that takes them.
_MISFITS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def key(default: Any, doc: str, *, least: int | None = None, choices: Collection[str] | None = None) -> Any:
    """A field of a config: its default, its line of documentation, and the checks of its value.

    Args:
        least: the smallest value of an integer, or of each in a tuple of integers, nested or not; None
            passes.
        choices: the values of a string, or of each in a tuple of strings.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "least": least, "choices": choices})


class ModelConfig(Mapping[str, Any]):
    """Base of the config dataclasses, whose fields are the keys of `config.json`.

    A config is read by attribute (`config.sample_size`) or, as in diffusers, by item
    (`config["sample_size"]`), and can be unpacked with `**`. The constructor of the network, its signature
    and its documentation are made of the fields, see `key`.

    Making one raises ValueError for values that its fields refuse; lists become tuples.
    """

    ignored_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of older config files that never changed the network: passed over in silence."""

    @classmethod
    def from_dict(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """Make the config from a `config.json`; lists become tuples, missing keys their defaults.

        Unknown keys are left out and named in one UserWarning; keys that start with "_" and
        `ignored_keys` are left out in silence.

        Raises:
            CheckpointError: a key without a default is missing.
            ValueError: a value is not of the declared type; numbers must be finite and below 2**31.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(
            key
            for key in config
            if key not in fields and not key.startswith("_") and key not in cls.ignored_keys
        )
        if unknown:
            warnings.warn(
                f"{cls.__name__} does not know these config keys and leaves them out: "
                f"{printable(', '.join(unknown))}; if one of them changes the network, the result differs",
                stacklevel=2,
            )
        missing = sorted(
            name
            for name, field in fields.items()
            if name not in config
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if missing:
            raise CheckpointError(f"{cls.__name__} needs the config keys {', '.join(missing)}")
        values = {key: _tuples(config[key]) for key in config if key in fields}
        hints = typing.get_type_hints(cls)
        for key, value in values.items():
            if not _is_a(value, hints[key]):
                kind = hints[key].__name__ if hints[key] in _PLAIN else hints[key]
                raise ValueError(f"{key}={_shown(value)} must be {kind}, of finite numbers below 2**31")
        return cls(**values)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _tuples(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            least, choices = (field.metadata.get(name) for name in ("least", "choices"))
            if field.metadata and not _is_a(value, hints[field.name]):
                kind = hints[field.name].__name__ if hints[field.name] in _PLAIN else hints[field.name]
                raise ValueError(f"{field.name}={_shown(value)} must be {kind}")
            if least is not None:
                _check_least(field.name, value, least)
            for name in (value if isinstance(value, tuple) else (value,)) if choices is not None else ():
                if name not in choices:
                    raise ValueError(f"{field.name}: `{name}` does not exist; use one of {sorted(choices)}")

    @classmethod
    def documentation(cls) -> str:
        """The lines of the fields, as the section "Args" of a docstring."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        lines = [f"    {f.name}: {f.metadata['doc']}" for f in fields if f.metadata.get("doc")]
        return "\n".join(["Args:", *lines])

    def to_dict(self) -> dict[str, Any]:
        """The fields and their values as a new dict."""
        return dict(self)

    def __getitem__(self, key: str) -> Any:
        if key not in list(self):
            raise KeyError(f"{type(self).__name__} has no {key!r}; it has {', '.join(self)}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(dataclasses.fields(self))  # type: ignore[arg-type]


def _check_least(name: str, value: Any, least: int) -> None:
    """ValueError unless `value` is None or an integer of at least `least`, or a tuple of such."""
    if value is None:
        return
    if isinstance(value, tuple):
        for item in value:
            _check_least(name, item, least)
    elif isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


_PLAIN = (bool, int, float, str)


def _is_a(value: Any, hint: Any) -> bool:
    """Return True where a value of a JSON file, with tuples for its lists, is of an annotated type."""
    if hint in (None, types.NoneType):
        return value is None
    if hint is float:
        number = type(value) in (int, float)
        return number and math.isfinite(value) and abs(value) <= _LARGEST
    if hint is int:
        return type(value) is int and abs(value) <= _LARGEST
    if hint in _PLAIN:
        return type(value) is hint
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple:
        return any(_is_a(value, part) for part in parts)
    if parts[-1] is ...:
        parts = parts[:1] * len(value) if isinstance(value, tuple) else ()
    return (
        isinstance(value, tuple)
        and len(value) == len(parts)
        and all(_is_a(item, part) for item, part in zip(value, parts, strict=True))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def blame(path: str | Path) -> Iterator[None]:
    """Turns errors about values that were read from `path` into CheckpointErrors that name it."""
    try:
        yield
    except _MISFITS as error:
        if isinstance(error, CheckpointError) and str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}; correct it or download it again") from error


def disguise(start: bytes) -> str | None:
    """Recognise a git-lfs pointer or a web page by the first bytes of a file; returns its name and the cure.

    None for anything else.
    """
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run `git lfs pull` in its folder"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page; download the file itself (the `resolve` link)"
    return None


def read_text(path: Path) -> str:
    """The text of a small file.

    Raises:
        CheckpointError: it is no text in UTF-8, a git-lfs pointer, a web page, or larger than any such file.
    """
    with open_input(path) as file:
        content = file.read(_MAX_TEXT_BYTES + 1)
    if len(content) > _MAX_TEXT_BYTES:
        raise CheckpointError(f"{path} is too large (more than {_MAX_TEXT_BYTES} bytes); download it again")
    other = disguise(content[:512])
    if other is not None:
        raise CheckpointError(f"{path} is not what its name says but {other}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file; the message names the JSON files beside it.
        CheckpointError: it is not JSON, not an object, or what `read_text` refuses.
    """
    path = Path(path)
    if not path.exists():
        beside = sorted(file.name for file in path.parent.glob("*.json"))
        there = f"the folder has {', '.join(beside)}" if beside else "the folder has no JSON file"
        raise FileNotFoundError(
            f"{path} does not exist ({there}); is this the folder of the component itself, or does "
            "it need a subfolder?"
        )
    try:
        value = parse_json(read_text(path), finite=False)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); repair it or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not a {type(value).__name__}; download it again"
        )
    return value


def _tuples(value: Any) -> Any:
    """The value with tuples for lists, and Python's numbers for NumPy's."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else as_python(value)
