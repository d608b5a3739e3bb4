"""A forward as a graph of MLX primitives, recorded without running it, as if it were on a Metal GPU.

`mx.export_function` hands the primitives to a callback. What Metal runs as one kernel and the CPU backend
takes to pieces (`mx.fast.*`) is replaced while tracing by `mx.depends`, which keeps inputs and output and can
be exported; so is `mx.contiguous`, which cannot. Another `mx.depends` at the borders of each module and each
compiled function says where a primitive comes from: every one carries the number of an event, events are
numbered in the order of the program, and a primitive belongs to the latest event among its inputs.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_unet3d import cpu
from mlx.utils import tree_map
from mlx_unet3d.compilation import CompiledForward

from .rules import UNFUSED, attention_route

_MAGIC = 0x3D0E7
_COMPILED = type(mx.compile(lambda x: x))
_SCANNED = ("mlx.nn", "mlx_unet3d")


@dataclass(frozen=True)
class Array:
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size


@dataclass
class Node:
    """A primitive: its name, the names of the arrays it takes and makes, and its arguments as exported.

    Attributes:
        place: path of the module that it was called in.
        region: number of the call of a compiled function that it belongs to, or None.
        parts: names of the primitives that were fused into it.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any] = field(default_factory=list)
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
class Graph:
    """All primitives of a forward, producers first.

    Attributes:
        arrays: name -> shape and dtype.
        inputs: names of the traced function's arguments.
        constants: names of parameters and of other arrays that were there before.
    """

    arrays: dict[str, Array]
    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]
    constants: set[str]
    attentions: list[Attention]


@dataclass
class _Event:
    place: str
    region: int | None
    op: str | None = None


class _Tracer:
    def __init__(self, model: nn.Module):
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.events = [_Event("", None)]
        self.stack: list[tuple[str, int | None]] = [("", None)]
        self.regions = 0
        self.attentions: list[Attention] = []

    def event(self, op: str | None = None) -> mx.array:
        """A new event here -> the constant that stands for it."""
        self.events.append(_Event(*self.stack[-1], op))
        return mx.array([_MAGIC, len(self.events) - 1], dtype=mx.int32)

    def mark(self, value: Any) -> Any:
        """Arrays of a tuple or list, or the one array, marked with a new event; anything else as it is."""
        if isinstance(value, mx.array):
            return mx.depends([value], [self.event()])[0]
        if type(value) in (tuple, list):
            return type(value)(map(self.mark, value))
        return value

    @contextlib.contextmanager
    def inside(self, place: str, region: int | None) -> Iterator[None]:
        self.stack.append((place, region))
        yield
        self.stack.pop()

    def call(self, function: Callable, place: str, region: int | None, args: tuple, keywords: dict) -> Any:
        def marked(value: Any) -> Any:
            # Lists stay the same objects: a block may take its skips out of them.
            return self.mark(value) if isinstance(value, mx.array) else value

        with self.inside(place, region):
            out = function(*map(marked, args), **{k: marked(v) for k, v in keywords.items()})
        return self.mark(out)

    def new_region(self) -> int:
        """The number of a compiled call; one inside another belongs to the outer."""
        current = self.stack[-1][1]
        if current is not None:
            return current
        self.regions += 1
        return self.regions

    # Stand-ins.

    def module_call(self, call: Callable) -> Callable:
        compiled = any(isinstance(cell.cell_contents, _COMPILED) for cell in call.__closure__ or ())

        def stand_in(module: nn.Module, *args: Any, **keywords: Any) -> Any:
            place = self.paths.get(id(module), self.stack[-1][0])
            region = self.new_region() if compiled else self.stack[-1][1]
            bound = call.__get__(module)
            if len(self.stack) == 1 and not place:  # the model itself
                return bound(*args, **keywords)
            return self.call(bound, place, region, args, keywords)

        return stand_in

    def compiled(self, function: Callable) -> Callable:
        def stand_in(*args: Any, **keywords: Any) -> Any:
            return self.call(function, self.stack[-1][0], self.new_region(), args, keywords)

        return stand_in

    def compiled_forward(self, forward: CompiledForward, *args: Any) -> mx.array:
        """In place of `CompiledForward.__call__`, which keeps what it compiles."""
        return self.compiled(forward._forward)(*args)

    def whole(self, op: str, x: mx.array, others: list[mx.array | None]) -> mx.array:
        return mx.depends([x], [*(o for o in others if o is not None), self.event(op)])[0]

    def contiguous(self, x: mx.array, allow_col_major: bool = False, **_: Any) -> mx.array:
        return self.whole("Contiguous", x, [])

    def layer_norm(self, x, weight, bias, eps, **_: Any) -> mx.array:
        for other in weight, bias:
            if other is not None and other.dtype != x.dtype:
                x = x.astype(mx.result_type(x, other))
        return self.whole("LayerNorm", x, [weight, bias])

    def rms_norm(self, x, weight, eps, **_: Any) -> mx.array:
        return self.layer_norm(x, weight, None, eps)

    def attention(self, original: Callable) -> Callable:
        def stand_in(q, k, v, *, scale, mask=None, **rest: Any) -> mx.array:
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
                return original(q, k, v, scale=scale, mask=mask)
            return self.whole("Attention", q, [k, v, mask if kind == "array" else None])

        return stand_in


@contextlib.contextmanager
def _patched(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    owners = [m for n, m in list(sys.modules.items()) if n.startswith(_SCANNED)]
    owners += [module for _, module in model.named_modules()]
    mx.disable_compile()
    try:
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if isinstance(value, _COMPILED):
                    replace(owner, name, tracer.compiled(value))
        calling = {
            next(base for base in type(module).__mro__ if "__call__" in vars(base))
            for _, module in model.named_modules()
            if callable(module)
        }
        for base in calling:
            replace(base, "__call__", tracer.module_call(vars(base)["__call__"]))
        # A plain function, to become a method of the forward that it is called on.
        replace(CompiledForward, "__call__", lambda *args: tracer.compiled_forward(*args))
        fast = mx.fast
        replace(fast, "scaled_dot_product_attention", tracer.attention(fast.scaled_dot_product_attention))
        replace(fast, "layer_norm", tracer.layer_norm)
        replace(fast, "rms_norm", tracer.rms_norm)
        replace(mx, "contiguous", tracer.contiguous)
        yield
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)
        mx.enable_compile()


def trace(fn: Callable[..., mx.array], *args: mx.array, model: nn.Module) -> Graph:
    """The graph of `fn(*args)`, which calls `model`; nothing is computed.

    Parameters and `args` must be evaluated; `hollow` makes such that take no memory. ValueError where `fn`
    evaluates something, or uses a primitive that MLX cannot export.
    """
    tracer = _Tracer(model)
    records: list[dict[str, Any]] = []
    with cpu.routes(False), _patched(model, tracer):
        mx.export_function(records.append, fn, *args)

    arrays: dict[str, Array] = {}
    graph = Graph(arrays, [], [], [], set(), tracer.attentions)
    numbers: dict[str, int] = {}  # name of a marker -> its event
    same: dict[str, str] = {}  # name of a marked array -> what it marks
    latest: dict[str, int] = {}  # name of an array -> its event
    for record in records:
        kind = record["type"]
        if kind == "inputs":
            graph.inputs = [name for name, _, _ in record["inputs"]]
            arrays |= {name: Array(tuple(shape), dtype) for name, shape, dtype in record["inputs"]}
        elif kind == "outputs":
            graph.outputs = [name for name, _, _ in record["outputs"]]
        elif kind == "constants":
            for name, value in record["constants"]:
                marks = value.dtype == mx.int32 and value.shape == (2,)
                marker = memoryview(value).tolist() if marks else []
                if marker[:1] == [_MAGIC]:
                    numbers[name] = marker[1]
                else:
                    arrays[name] = Array(tuple(value.shape), value.dtype)
                    graph.constants.add(name)
        elif kind == "primitive":
            marker = next((numbers[name] for name, _, _ in record["inputs"] if name in numbers), None)
            inputs = [same.get(n, n) for n, _, _ in record["inputs"] if n not in numbers]
            outputs = [name for name, _, _ in record["outputs"]]
            if marker is None:
                op, number = (
                    record["name"],
                    max((latest.get(n, 0) for n, _, _ in record["inputs"]), default=0),
                )
            else:
                op, number = tracer.events[marker].op, marker
            latest |= dict.fromkeys(outputs, number)
            if op is None:
                same[outputs[0]] = inputs[0]
                latest[outputs[0]] = number
                continue
            arrays |= {name: Array(tuple(shape), dtype) for name, shape, dtype in record["outputs"]}
            event = tracer.events[number]
            graph.nodes.append(Node(op, inputs, outputs, record["arguments"], event.place, event.region))
    graph.outputs = [same.get(name, name) for name in graph.outputs]
    _place_constants(graph)
    return graph


def _place_constants(graph: Graph) -> None:
    """What is made of constants alone has no event of its own: it belongs to who uses it."""
    fixed = set(graph.constants)
    consumers: dict[str, Node] = {}
    for node in graph.nodes:
        for name in node.inputs:
            consumers.setdefault(name, node)
    alone = []
    for node in graph.nodes:
        if fixed.issuperset(node.inputs):
            fixed.update(node.outputs)
            if (node.place, node.region) == ("", None):
                alone.append(node)
    for node in reversed(alone):
        consumer = next((consumers[name] for name in node.outputs if name in consumers), None)
        if consumer is not None:
            node.place, node.region = consumer.place, consumer.region


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
