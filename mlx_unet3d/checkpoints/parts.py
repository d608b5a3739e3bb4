"""Parts of tensors under other names: which parameters a key of a foreign file holds.

A key map gives the parts of a key: none where the network has no use for it, three where a matrix is fused.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CheckpointError
from .headers import TensorInfo


@dataclass(frozen=True)
class Part:
    """A parameter, and which part of the tensor it is.

    Attributes:
        name: the parameter.
        third: 0, 1 or 2 for that third of the rows; None for all of them.
        pointwise: a Conv1d of kernel size 1, (O, I, 1), of which the matrix (O, I) is wanted.
        transposed: a matrix (I, O) by which rows are multiplied, of which (O, I) is wanted.
    """

    name: str
    third: int | None = None
    pointwise: bool = False
    transposed: bool = False

    def of(self, key: str, info: TensorInfo) -> tuple[str, TensorInfo]:
        """Name the part, `key[0:4]` in Python's notation, and locate it.

        Raises CheckpointError where the tensor has no such part.
        """
        if self.third is not None:
            if not info.shape or info.shape[0] % 3:
                raise CheckpointError(
                    f"{key!r} has shape {info.shape}; query, key and value must be equal thirds of its rows"
                )
            height = info.shape[0] // 3
            start, stop = self.third * height, (self.third + 1) * height
            return f"{key}[{start}:{stop}]", info.rows(start, stop)
        if self.pointwise and len(info.shape) == 3 and info.shape[2] == 1:
            return f"{key}[:,:,0]", info.squeezed()
        if self.transposed:
            if len(info.shape) != 2:
                raise CheckpointError(f"{key!r} has shape {info.shape}; a projection must be a matrix")
            return f"{key}.T", info.transposed()
        return key, info


KeyMap = Callable[[str], list[Part]]
"""The parts of a key; an unknown key is the parameter of its own name, which no network will have."""
