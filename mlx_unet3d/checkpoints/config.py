"""Configurations: the dataclass base and the JSON files that they come from."""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import CheckpointError

Config = TypeVar("Config", bound="ModelConfig")


class ModelConfig(Mapping[str, Any]):
    """Base of the config dataclasses, whose fields are the keys of `config.json`.

    A config is read by attribute (`config.sample_size`) or, as in diffusers, by item
    (`config["sample_size"]`), and can be unpacked with `**`.
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
                f"{', '.join(unknown)}; if one of them changes the network, the result will differ",
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
        return cls(**{key: _tuples(config[key]) for key in config if key in fields})

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


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file; the message names the JSON files beside it.
        CheckpointError: it is not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*.json"))
        there = f"the folder has {', '.join(beside)}" if beside else "the folder has no JSON file"
        raise FileNotFoundError(
            f"{path} does not exist ({there}); is this the folder of the component itself, or does "
            "it need a subfolder?"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); repair it or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
