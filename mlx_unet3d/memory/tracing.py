"""The graph of a computation, by shapes alone: nothing is computed and nothing allocated.

`mx.export_function` hands the operations to a callback. It would take those of `operations` apart; in their
place stands `mx.depends` on a constant that tells which operation it stands for, a mark.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .. import cpu
from ..layers.chunking import sketched
from ..operations import Tracer, traced_by

_MAGIC = 0x3D0E7


@dataclass(frozen=True)
class Node:
    """One operation: its name, the names of the arrays it takes and gives, its arguments, and the number of
    its mark, if it has one."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()
    mark: int | None = None


@dataclass
class Graph:
    """Operations and the arrays between them, by name.

    Attributes:
        nodes: in the order in which they were made, producers first.
        shapes, dtypes: of all arrays.
        inputs, outputs: the arguments and the results.
        constants: arrays that were there before, such as parameters that are no arguments.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, mx.Dtype] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)

    @property
    def given(self) -> set[str]:
        """Arrays that no operation makes."""
        return self.constants.union(self.inputs)

    def nbytes(self, name: str) -> int:
        """Bytes of an array in a buffer of its own."""
        size = self.dtypes[name].size
        for n in self.shapes[name]:
            size *= n
        return size


def trace(
    fn: Callable[..., mx.array | Sequence[mx.array]], arguments: Sequence[mx.array], gpu: bool
) -> Graph:
    """The graph of `fn(*arguments)`, of which only shapes and dtypes matter; long sequences are sketched.

    `gpu`: as a GPU runs it, with attention and layer norms as operations of their own.
    """
    marks = Marks(gpu)
    with sketched(), cpu.routes(False) if gpu else nullcontext(), traced_by(marks):
        return record(fn, arguments, marks)


class Marks(Tracer):
    """Marks of element-wise functions, and on a GPU of attention and layer norms."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.names: list[str] = []

    def new(self, name: str) -> mx.array:
        """A mark for an operation of that name; they are numbered from 0."""
        self.names.append(name)
        return mx.array([_MAGIC, len(self.names) - 1], dtype=mx.int32)

    @staticmethod
    def number(constant: mx.array) -> int | None:
        """Return the number of a mark; None for any other array."""
        if constant.dtype != mx.int32 or constant.shape != (2,):
            return None
        magic, number = memoryview(constant).tolist()
        return number if magic == _MAGIC else None

    def whole(self, name: str, x: mx.array, *others: Any) -> mx.array:
        """An array like `x`, made by one operation of `x` and of those of `others` that are arrays."""
        return mx.depends([x], [*(a for a in others if isinstance(a, mx.array)), self.new(name)])[0]

    def attention(
        self, query: mx.array, key: mx.array, value: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        if not self.gpu:
            return super().attention(query, key, value, scale, mask)
        return self.whole("ScaledDotProductAttention", query, key, value, mask)

    def layer_norm(self, x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
        if not self.gpu:
            return super().layer_norm(x, weight, bias, eps)
        for other in weight, bias:
            if other is not None and other.dtype != x.dtype:
                x = x.astype(mx.result_type(x, other))
        return self.whole("LayerNorm", x, weight, bias)

    def fused(self, function: Callable[..., Any], *args: mx.array) -> Any:
        made = function(*args)  # for its form alone
        results = [made] if isinstance(made, mx.array) else list(made)
        like = next(a for a in args if a.shape == results[0].shape)
        others = [a for a in args if a is not like]
        results = mx.depends([like] * len(results), [*others, self.new("Compiled")])
        return results[0] if isinstance(made, mx.array) else type(made)(results)


def record(
    fn: Callable[..., mx.array | Sequence[mx.array]], arguments: Sequence[mx.array], marks: Marks
) -> Graph:
    """The graph of `fn(*arguments)` as it is, with marked operations under the names of their marks."""
    graph = Graph()
    numbers: dict[str, int] = {}

    def note(names: Sequence[tuple[str, tuple[int, ...], mx.Dtype]]) -> list[str]:
        for name, shape, dtype in names:
            graph.shapes[name], graph.dtypes[name] = tuple(shape), dtype
        return [name for name, *_ in names]

    def see(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "inputs":
            graph.inputs = note(event["inputs"])
        elif kind == "outputs":
            graph.outputs = note(event["outputs"])
        elif kind == "constants":
            for name, array in event["constants"]:
                number = marks.number(array)
                if number is None:
                    graph.constants.update(note([(name, array.shape, array.dtype)]))
                else:
                    numbers[name] = number
        elif kind == "primitive":
            names = [name for name, *_ in event["inputs"]]
            mark = next((numbers[name] for name in names if name in numbers), None)
            graph.nodes.append(
                Node(
                    event["name"] if mark is None else marks.names[mark],
                    tuple(name for name in names if name not in numbers),
                    tuple(note(event["outputs"])),
                    tuple(event["arguments"]),
                    mark,
                )
            )

    mx.export_function(see, fn, *arguments)
    return graph
