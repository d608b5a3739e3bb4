"""A forward as a graph of MLX primitives, recorded without running it, as if it were on a Metal GPU.

Beside what `mlx_unet3d.memory.tracing` marks, so are the arrays at the borders of each module and of each
compiled function, which say where a primitive comes from: marks are numbered in the order of the program, and
a primitive belongs to where the latest of its inputs was marked. The forward is that of a copy of the model,
with the same arrays, whose modules mark their borders.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_unet3d import cpu
from mlx.utils import tree_map
from mlx_unet3d.memory import tracing
from mlx_unet3d.memory.tracing import Marks, record
from mlx_unet3d.operations import traced_by

from .rules import UNFUSED, attention_route

_BORDER = "Border"


@dataclass(frozen=True)
class Node(tracing.Node):
    """A primitive, and where it was called.

    Attributes:
        place: path of the module that it was called in.
        region: number of the call of a compiled function that it belongs to, or None.
        parts: names of the primitives that were fused into it.
    """

    place: str = ""
    region: int | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attention:
    """A call of `mx.fast.scaled_dot_product_attention`."""

    place: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    route: str

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.dim


@dataclass
class Graph(tracing.Graph):
    """All primitives of a forward, and its calls of attention; parameters are constants."""

    nodes: list[Node] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)


class _Tracer(Marks):
    def __init__(self) -> None:
        super().__init__(gpu=True)
        self.stack: list[tuple[str, int | None]] = [("", None)]
        self.places: list[tuple[str, int | None]] = []  # place and region, by the number of the mark
        self.regions = 0
        self.attentions: list[Attention] = []
        self.paths: dict[int, str] = {}  # of modules, by id
        self.inputs: tuple[mx.array, ...] = ()  # the first argument of the forward
        self.new(_BORDER)  # number 0, for what comes before all others

    def new(self, name: str) -> mx.array:
        self.places.append(self.stack[-1])
        return super().new(name)

    def border(self, value: Any) -> Any:
        """Arrays of a tuple or list, or the one array, marked as being here; anything else as it is."""
        if isinstance(value, mx.array):
            return self.whole(_BORDER, value)
        if type(value) in (tuple, list):
            return type(value)(map(self.border, value))
        if type(value) is dict:
            return {name: self.border(item) for name, item in value.items()}
        return value

    @contextlib.contextmanager
    def inside(self, place: str, region: int | None) -> Iterator[None]:
        self.stack.append((place, region))
        yield
        self.stack.pop()

    def call(self, function: Callable, place: str, region: int | None, args: tuple, keywords: dict) -> Any:
        def marked(value: Any) -> Any:
            # Lists stay the same objects: a block may take its skips out of them.
            return self.border(value) if isinstance(value, mx.array | dict) else value

        with self.inside(place, region):
            out = function(*map(marked, args), **{k: marked(v) for k, v in keywords.items()})
        return self.border(out)

    def new_region(self) -> int:
        """The number of a compiled call; one inside another belongs to the outer."""
        current = self.stack[-1][1]
        if current is not None:
            return current
        self.regions += 1
        return self.regions

    def bordered(self, model: nn.Module) -> nn.Module:
        """A copy of `model`, with the same arrays, whose modules below it mark their borders."""
        arrays = (value for module in model.modules() for value in module.values())
        model = copy.deepcopy(model, {id(a): a for a in arrays if isinstance(a, mx.array)})
        kinds: dict[type, type] = {}
        for path, module in model.named_modules():
            if module is not model and callable(module):
                kind = type(module)
                if kind not in kinds:
                    kinds[kind] = type(kind.__name__, (kind,), {"__call__": self.module_call(kind.__call__)})
                module.__class__ = kinds[kind]
                self.paths[id(module)] = path
        return model

    def module_call(self, call: Callable) -> Callable:
        def marking(module: nn.Module, *args: Any, **keywords: Any) -> Any:
            place, region = self.paths[id(module)], self.stack[-1][1]
            return self.call(call.__get__(module), place, region, args, keywords)

        return marking

    # The operations.

    def fused(self, function: Callable, *args: mx.array) -> Any:
        """As the primitives that it is made of, in a region of their own."""
        # Made of the inputs: MLX compiles, and cannot export, a function of constants alone.
        args = tuple(self.whole(_BORDER, x, *self.inputs) for x in args)
        return self.call(function, self.stack[-1][0], self.new_region(), args, {})

    def compiled(self, forward: Callable, *args: Any) -> Any:
        return self.call(forward, self.stack[-1][0], self.new_region(), args, {})

    def attention(
        self, query: mx.array, key: mx.array, value: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        """As its parts, where Metal has no kernel for it."""
        kind = mask if mask is None or isinstance(mask, str) else "array"
        batch, heads, queries, dim = query.shape
        route = attention_route(
            queries,
            key.shape[2],
            dim,
            value.shape[3],
            heads,
            key.shape[1],
            kind,
        )
        place = self.stack[-1][0]
        self.attentions.append(Attention(place, batch, heads, queries, key.shape[2], dim, route))
        if route == UNFUSED or dim != value.shape[3]:
            return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask)
        return super().attention(query, key, value, scale, mask)


def trace(fn: Callable[..., mx.array], *args: mx.array, model: nn.Module) -> Graph:
    """The graph of `fn(model, *args)`; nothing is computed.

    Parameters and `args` must be evaluated; `hollow` makes such that take no memory. ValueError where `fn`
    evaluates something, or uses a primitive that MLX cannot export.
    """
    tracer = _Tracer()
    model = tracer.bordered(model)

    def forward(*args: mx.array) -> mx.array:
        tracer.inputs = args[:1]
        return fn(model, *args)

    with cpu.routes(False), traced_by(tracer):
        recorded = record(forward, args, tracer)
    graph = Graph(**vars(recorded) | {"nodes": []}, attentions=tracer.attentions)
    same: dict[str, str] = {}  # name of an array at a border -> what it was before
    latest: dict[str, int] = {}  # name of an array -> the latest mark before it
    for node in recorded.nodes:
        number = node.mark
        if number is None:
            number = max((latest.get(name, 0) for name in node.inputs), default=0)
        latest |= dict.fromkeys(node.outputs, number)
        inputs = tuple(same.get(name, name) for name in node.inputs)
        if node.name == _BORDER:
            same[node.outputs[0]] = inputs[0]
        else:
            place = tracer.places[number]
            graph.nodes.append(Node(node.name, inputs, node.outputs, node.arguments, node.mark, *place))
    graph.outputs = [same.get(name, name) for name in graph.outputs]
    _place_constants(graph)
    return graph


def _place_constants(graph: Graph) -> None:
    """Leave arrays of constants alone without a mark: they belong to their users."""
    fixed = set(graph.constants)
    consumers: dict[str, int] = {}
    alone = []
    for i, node in enumerate(graph.nodes):
        for name in node.inputs:
            consumers.setdefault(name, i)
        if fixed.issuperset(node.inputs):
            fixed.update(node.outputs)
            if (node.place, node.region) == ("", None):
                alone.append(i)
    for i in reversed(alone):
        node = graph.nodes[i]
        consumer = next((graph.nodes[consumers[name]] for name in node.outputs if name in consumers), None)
        if consumer is not None:
            graph.nodes[i] = replace(node, place=consumer.place, region=consumer.region)


def hollow(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The model ready for inference, with parameters of zero that share one number's memory; floating ones in
    `dtype`."""
    zero = mx.zeros((), dtype=dtype)

    def empty(parameter: mx.array) -> mx.array:
        if not mx.issubdtype(parameter.dtype, mx.floating):
            return mx.broadcast_to(mx.zeros((), dtype=parameter.dtype), parameter.shape)
        return mx.broadcast_to(zero, parameter.shape)

    model.update(tree_map(empty, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model
