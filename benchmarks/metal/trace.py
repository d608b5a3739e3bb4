"""A forward as a graph of MLX primitives, recorded without running it, as if it were on a Metal GPU.

Beside what `mlx_unet3d.memory.tracing` marks, so is `mx.contiguous`, which cannot be exported, and the arrays
at the borders of each module and each compiled function, which say where a primitive comes from: marks are
numbered in the order of the program, and a primitive belongs to where the latest of its inputs was marked.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_unet3d import cpu
from mlx.utils import tree_map
from mlx_unet3d.compilation import CompiledForward
from mlx_unet3d.memory import tracing
from mlx_unet3d.memory.tracing import COMPILED, Change, Marks, record, replaced

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
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.stack: list[tuple[str, int | None]] = [("", None)]
        self.places: list[tuple[str, int | None]] = []  # place and region, by the number of the mark
        self.regions = 0
        self.attentions: list[Attention] = []
        self.attend = mx.fast.scaled_dot_product_attention
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
        return value

    @contextlib.contextmanager
    def inside(self, place: str, region: int | None) -> Iterator[None]:
        self.stack.append((place, region))
        yield
        self.stack.pop()

    def call(self, function: Callable, place: str, region: int | None, args: tuple, keywords: dict) -> Any:
        def marked(value: Any) -> Any:
            # Lists stay the same objects: a block may take its skips out of them.
            return self.border(value) if isinstance(value, mx.array) else value

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

    # Stand-ins.

    def changes(self) -> list[Change]:
        """All of them."""
        modules = [module for _, module in self.model.named_modules()]
        calling = {
            next(base for base in type(module).__mro__ if "__call__" in vars(base))
            for module in modules
            if callable(module)
        }
        return [
            *self.of_compiled(*modules),
            *((base, "__call__", self.module_call(vars(base)["__call__"])) for base in calling),
            # A plain function, to become a method of the forward that it is called on.
            (CompiledForward, "__call__", lambda *args: self.compiled_forward(*args)),
            *self.of_fast(),
            (mx.fast, "rms_norm", self.rms_norm),
            (mx, "contiguous", self.contiguous),
        ]

    def module_call(self, call: Callable) -> Callable:
        compiled = any(isinstance(cell.cell_contents, COMPILED) for cell in call.__closure__ or ())

        def stand_in(module: nn.Module, *args: Any, **keywords: Any) -> Any:
            place = self.paths.get(id(module), self.stack[-1][0])
            region = self.new_region() if compiled else self.stack[-1][1]
            bound = call.__get__(module)
            if len(self.stack) == 1 and not place:  # the model itself
                return bound(*args, **keywords)
            return self.call(bound, place, region, args, keywords)

        return stand_in

    def compiled(self, function: Callable) -> Callable:
        """A compiled function as the primitives that it is made of, in a region of their own."""

        def stand_in(*args: Any, **keywords: Any) -> Any:
            return self.call(function, self.stack[-1][0], self.new_region(), args, keywords)

        return stand_in

    def compiled_forward(self, forward: CompiledForward, *args: Any) -> mx.array:
        """In place of `CompiledForward.__call__`, which keeps what it compiles."""
        return self.compiled(forward._forward)(*args)

    def contiguous(self, x: mx.array, allow_col_major: bool = False, **_: Any) -> mx.array:
        return self.whole("Contiguous", x)

    def rms_norm(self, x, weight, eps, **_: Any) -> mx.array:
        return self.layer_norm(x, weight, None, eps)

    def attention(self, q, k, v, *, scale, mask=None, **rest: Any) -> mx.array:
        """As its parts, where Metal has no kernel for it."""
        kind = mask if mask is None or isinstance(mask, str) else "array"
        batch, heads, queries, dim = q.shape
        route = attention_route(
            queries,
            k.shape[2],
            dim,
            v.shape[3],
            heads,
            k.shape[1],
            kind,
            force_fused=rest.get("force_fused", False),
        )
        place = self.stack[-1][0]
        self.attentions.append(Attention(place, batch, heads, queries, k.shape[2], dim, route))
        if route == UNFUSED or dim != v.shape[3]:
            return self.attend(q, k, v, scale=scale, mask=mask)
        return super().attention(q, k, v, scale=scale, mask=mask)


def trace(fn: Callable[..., mx.array], *args: mx.array, model: nn.Module) -> Graph:
    """The graph of `fn(*args)`, which calls `model`; nothing is computed.

    Parameters and `args` must be evaluated; `hollow` makes such that take no memory. ValueError where `fn`
    evaluates something, or uses a primitive that MLX cannot export.
    """
    tracer = _Tracer(model)
    mx.disable_compile()
    try:
        with cpu.routes(False), replaced(tracer.changes()):
            recorded = record(fn, args, tracer)
    finally:
        mx.enable_compile()
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
    """What is made of constants alone is marked nowhere: it belongs to who uses it."""
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
