"""The shapes of a network's tensors, of which a config is made where files have none."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError


@dataclass(frozen=True)
class Shapes:
    """The shapes of a network's tensors, by parameter name.

    Attributes:
        where: the file, for messages.
        shapes: by name, as they lie in the file.
        layout: "mlx" or "diffusers".
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    layout: str

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def outputs(self, name: str) -> int:
        """The first axis of a tensor: output channels, rows."""
        return self._axis(name, 0)

    def inputs(self, name: str) -> int:
        """The axis of input channels."""
        return self._axis(name, -1 if self.layout == "mlx" else 1)

    def count(self, name: str) -> int:
        """How many tensors there are of a name with `{}` for their numbers, from 0 on."""
        number = 0
        while name.format(number) in self.shapes:
            number += 1
        return number

    def _axis(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.where} has no tensor for the parameter {name!r}, whose shape tells the config; is "
                "the file whole? If not, download it again"
            )
        if len(shape) <= max(axis, 0):
            raise CheckpointError(f"{self.where}: {name!r} has shape {shape}, which is not one of its kind")
        return shape[axis]
