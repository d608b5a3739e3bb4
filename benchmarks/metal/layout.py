"""How an array lies in memory, and which primitives must copy to change that.

Read from MLX "0.32.2": mlx/backend/common/broadcasting.cpp, slicing.cpp, unary.h, binary.h, ternary.h and
compiled.cpp (outputs of element-wise kernels).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mlx_unet3d.memory.views import reshaped, row_major


@dataclass(frozen=True)
class View:
    """Shape and strides in elements, as MLX keeps them.

    `data_size` is the number of elements of memory that it spans, `dense` whether it uses all of them.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    data_size: int
    dense: bool = True

    @classmethod
    def row(cls, shape: Sequence[int]) -> "View":
        """Row-major."""
        return cls(tuple(shape), row_major(shape), prod(shape))

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_row(self) -> bool:
        """Row-major and without gaps: what most kernels ask for."""
        return self.dense and self.data_size == self.size and self._is(row_major(self.shape))

    @property
    def is_column(self) -> bool:
        reverse = row_major(self.shape[::-1])[::-1]
        return self.dense and self.data_size == self.size and self._is(reverse)

    def _is(self, strides: tuple[int, ...]) -> bool:
        return all(n == 1 or s == t for n, s, t in zip(self.shape, self.strides, strides, strict=True))

    @property
    def touched(self) -> int:
        """Elements of memory that a kernel reads: those that are broadcast count once."""
        return prod(n for n, s in zip(self.shape, self.strides, strict=True) if s)

    def transpose(self, axes: Sequence[int]) -> "View":
        shape, strides = (tuple(values[a] for a in axes) for values in (self.shape, self.strides))
        return View(shape, strides, self.data_size, self.dense)

    def broadcast(self, shape: Sequence[int]) -> "View":
        lead = len(shape) - len(self.shape)
        strides = [0] * lead
        strides += [
            0 if have == 1 != want else s
            for have, want, s in zip(self.shape, shape[lead:], self.strides, strict=True)
        ]
        return View(tuple(shape), tuple(strides), self.data_size, self.dense)

    def reshape(self, shape: Sequence[int]) -> "View | None":
        """A view of that shape, or None where the elements must be copied."""
        shape = tuple(shape)
        if self.is_row:
            return View.row(shape)
        strides = reshaped(self.shape, self.strides, shape)
        return None if strides is None else View(shape, strides, self.data_size, self.dense)

    def expand_dims(self, axes: Sequence[int]) -> "View":
        shape, strides = list(self.shape), list(self.strides)
        for axis in axes:
            shape.insert(axis, 1)
            strides.insert(axis, 1)
        return View(tuple(shape), tuple(strides), self.data_size, self.dense)

    def squeeze(self, axes: Sequence[int]) -> "View":
        kept = [i for i in range(len(self.shape)) if i not in axes]
        shape, strides = (tuple(values[i] for i in kept) for values in (self.shape, self.strides))
        return View(shape, strides, self.data_size, self.dense)

    def slice(self, shape: Sequence[int], steps: Sequence[int]) -> "View":
        """A part of that shape, every `steps`-th element along each axis."""
        strides = tuple(s * step for s, step in zip(self.strides, steps, strict=True))
        spanned = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
        part = View(tuple(shape), strides, spanned)
        return View(part.shape, strides, spanned, part.touched == spanned)


def element_wise(shape: Sequence[int], inputs: Sequence[View]) -> View:
    """The output of an element-wise kernel: as its inputs where they agree, else row-major."""
    large = [view for view in inputs if view.data_size > 1]
    if not large:
        return View(tuple(shape), (0,) * len(shape), 1)
    alike = all(view.is_row for view in large) or all(view.is_column for view in large)
    whole = all(view.shape == tuple(shape) for view in large)
    if whole and (alike or (len(large) == 1 and large[0].dense)):
        return large[0]
    return View.row(shape)
