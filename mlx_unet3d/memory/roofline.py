"""The least time that a graph can take on a chip."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..chips import Chip
from .liveness import order
from .tracing import Graph, Node
from .views import input_view, view_of

_GIGA, _TERA = 1e9, 1e12


def operations(node: Node, graph: Graph) -> int:
    """Operations of convolutions, products and attention, two a multiply-add; 0 for others."""
    if node.name == "Convolution":
        return 2 * math.prod(graph.shapes[node.outputs[0]]) * math.prod(graph.shapes[node.inputs[1]][1:])
    if node.name in ("Matmul", "AddMM"):
        return 2 * math.prod(graph.shapes[node.outputs[0]]) * graph.shapes[node.inputs[0]][-1]
    if node.name == "ScaledDotProductAttention":
        return 4 * math.prod(graph.shapes[node.inputs[0]]) * graph.shapes[node.inputs[1]][2]
    return 0


@dataclass(frozen=True)
class Work:
    """Operations (two a multiply-add) of convolutions, products and attention, and bytes that are read and
    written at the least."""

    operations: int
    moved: int


def work(graph: Graph) -> Work:
    """The work of all of `graph`."""
    parts = [(operations(node, graph), moved) for node, moved in _traffic(graph)]
    return Work(*(sum(column) for column in zip(*parts, strict=True)))


def seconds(graph: Graph, chip: Chip, dtype: mx.Dtype) -> float:
    """Seconds at the peak rates of `chip`: each operation as slow as its arithmetic or its memory traffic,
    whichever takes longer. Real runs take longer; how much, only a measurement tells."""
    half = dtype.size < 4
    total = 0.0
    for node, moved in _traffic(graph):
        rate = chip.fp16_tflops if node.name == "Convolution" or not half else chip.matmul_tflops
        total += max(operations(node, graph) / (rate * _TERA), moved / (chip.gb_per_s * _GIGA))
    return total


def _traffic(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Each operation that is more than a view, and the bytes that it reads and writes."""
    views = {name: input_view(graph.shapes[name], -1) for name in graph.given}
    for node in order(graph):
        made = [view_of(node, k, graph, views) for k in range(len(node.outputs))]
        for name, view in zip(node.outputs, made, strict=True):
            views[name] = view if view is not None else input_view(graph.shapes[name], -1)
        if None not in made:
            continue
        names = (*node.inputs, *node.outputs)
        yield node, sum(graph.nbytes(name) for name in names if not _repeats(views[name]))


def _repeats(view) -> bool:
    """Return True if an array is the same few elements again and again, which stay in caches."""
    return any(stride == 0 and n > 1 for stride, n in zip(view.steps, view.shape, strict=True))
