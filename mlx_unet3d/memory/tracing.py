"""The graph of a computation, by shapes alone: nothing is computed and nothing allocated."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .. import cpu
from ..layers.slicing import sketched

# What the trace takes apart, but a backend does at once, is marked: a dependency on an array of so many
# axes, which none of our networks has. Those of `mx.fast` are taken apart where there is no GPU, compiled
# functions always.
_MARKS = {"Compiled": 10, "LayerNorm": 11, "ScaledDotProductAttention": 12}


@dataclass(frozen=True)
class Node:
    """One operation: its name, the names of the arrays it takes and gives, and its arguments."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


@dataclass
class Graph:
    """Operations, the arrays between them, and which of these are given and wanted.

    Attributes:
        nodes: in the order in which they were made.
        shapes, dtypes: of all arrays, by name.
        given: arrays that exist before: arguments and constants.
        wanted: the results.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, mx.Dtype] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    wanted: list[str] = field(default_factory=list)

    def nbytes(self, name: str) -> int:
        """Bytes of an array in a buffer of its own."""
        size = self.dtypes[name].size
        for n in self.shapes[name]:
            size *= n
        return size


def trace(
    fn: Callable[..., mx.array | Sequence[mx.array]], arguments: Sequence[mx.array], gpu: bool
) -> Graph:
    """The graph of `fn(*arguments)`, of which only shapes and dtypes matter.

    `gpu`: as a GPU runs it, with attention and layer norms as operations of their own.
    """
    graph = Graph()
    marks: dict[str, str] = {}

    def note(names: Sequence[tuple[str, tuple[int, ...], mx.Dtype]]) -> None:
        for name, shape, dtype in names:
            graph.shapes[name], graph.dtypes[name] = tuple(shape), dtype

    def record(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind in ("inputs", "outputs"):
            note(event[kind])
            names = [name for name, *_ in event[kind]]
            graph.given.update(names) if kind == "inputs" else graph.wanted.extend(names)
        elif kind == "constants":
            for name, array in event["constants"]:
                note([(name, array.shape, array.dtype)])
                graph.given.add(name)
                marks.update((name, mark) for mark, axes in _MARKS.items() if array.ndim == axes)
        elif kind == "primitive":
            note(event["inputs"])
            note(event["outputs"])
            inputs = tuple(name for name, *_ in event["inputs"])
            mark = next((marks[name] for name in inputs if name in marks), None)
            graph.nodes.append(
                Node(
                    mark or event["name"],
                    tuple(name for name in inputs if name not in marks),
                    tuple(name for name, *_ in event["outputs"]),
                    tuple(event["arguments"]),
                )
            )

    with sketched(), _compiled_functions_marked(), _fast_operations_marked() if gpu else nullcontext():
        mx.export_function(record, fn, *arguments)
    return graph


def _mark(name: str) -> mx.array:
    array = mx.zeros((1,) * _MARKS[name])
    mx.eval(array)
    return array


@contextmanager
def _compiled_functions_marked() -> Iterator[None]:
    """Element-wise functions of `mx.compile`, wherever they are imported, as one operation each."""
    mark = _mark("Compiled")

    def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: mx.array) -> Any:
            made = function(*args)  # for its form alone
            results = [made] if isinstance(made, mx.array) else list(made)
            like = next(a for a in args if a.shape == results[0].shape)
            others = [a for a in args if a is not like]
            results = mx.depends([like] * len(results), [*others, mark])
            return results[0] if isinstance(made, mx.array) else type(made)(results)

        return marked

    kind = type(mx.compile(lambda x: x))
    found = [
        (module, name, value)
        for path, module in list(sys.modules.items())
        if path.startswith(("mlx_unet3d.", "mlx.nn")) and module is not None
        for name, value in vars(module).items()
        if type(value) is kind
    ]
    stand_ins = {id(value): stand_in(value) for _, _, value in found}
    try:
        for module, name, value in found:
            setattr(module, name, stand_ins[id(value)])
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


@contextmanager
def _fast_operations_marked() -> Iterator[None]:
    norm_mark, attention_mark = _mark("LayerNorm"), _mark("ScaledDotProductAttention")

    def layer_norm(x, weight, bias, eps, **_):
        return mx.depends([x], [a for a in (weight, bias, norm_mark) if a is not None])[0]

    def attention(q, k, v, *, scale, mask=None, **_):
        masks = [mask] if isinstance(mask, mx.array) else []
        return mx.depends([q], [k, v, *masks, attention_mark])[0]

    originals = mx.fast.layer_norm, mx.fast.scaled_dot_product_attention
    mx.fast.layer_norm, mx.fast.scaled_dot_product_attention = layer_norm, attention
    try:
        with cpu.routes(False):
            yield
    finally:
        mx.fast.layer_norm, mx.fast.scaled_dot_product_attention = originals
