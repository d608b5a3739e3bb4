"""Outputs of networks: dataclasses that can also be read by key, by index and as a tuple."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class ModelOutput:
    """Base of all outputs; behaves like diffusers' `BaseOutput`: `o.x`, `o["x"]`, `o[0]`, `o.to_tuple()`.

    Fields that are None do not count, as there.
    """

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, key) for key in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, index: str | int | slice) -> Any:
        if isinstance(index, str):
            return dict(self.items())[index]
        return self.to_tuple()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())
