"""The kernels that a graph comes down to, the bytes they move, and the memory that is alive meanwhile.

Read from MLX "0.32.2": mlx/backend/metal/conv.cpp, matmul.cpp (`check_transpose`), normalization.cpp,
softmax.cpp, scaled_dot_product_attention.cpp, mlx/backend/gpu/copy.cpp and slicing.cpp (`concatenate_gpu`,
`pad_gpu`), and the `set_*_output_data` of mlx/backend/common (donation).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx
from mlx_unet3d.memory.roofline import operations
from mlx_unet3d.memory.views import ELEMENTWISE

from . import rules
from .layout import View, element_wise
from .rules import Conv, Winograd, conv_route
from .trace import Graph, Node

_VIEWS = {"Broadcast", "ExpandDims", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"}
_RESHAPES = {"Flatten", "Reshape", "Unflatten"}


@dataclass(frozen=True)
class Kernel:
    """One dispatch: what runs, its FLOPs as issued, the bytes that it reads and writes."""

    place: str
    kind: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Copy:
    """An array that is written again in another order, and why."""

    place: str
    why: str
    shape: tuple[int, ...]
    bytes: int  # of the copy; as many were read
    of_weight: bool = False


@dataclass(frozen=True)
class Convolution:
    place: str
    conv: Conv
    route: str


@dataclass
class Execution:
    """The events of a forward, in the order of evaluation.

    Attributes:
        matmul_flops: of products of matrices outside attention kernels.
        leaks: (place, op, shape) of single-precision outputs.
        weight_work: (place, op, shape) of what is computed from parameters alone on every call.
        peak: bytes of activations alive at once, with the inputs and without the parameters.
        peak_place: where.
        largest: (place, elements, bytes) of the largest buffer, scratch included.
    """

    kernels: list[Kernel] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    convolutions: list[Convolution] = field(default_factory=list)
    matmul_flops: int = 0
    leaks: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    weight_work: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    peak: int = 0
    peak_place: str = ""
    largest: tuple[str, int, int] = ("", 0, 0)


class _Machine:
    def __init__(self, graph: Graph, nodes: list[Node], winograd_budget: int | None):
        self.graph = graph
        self.budget = winograd_budget
        self.did = Execution()
        self.views: dict[str, View] = {}
        self.buffer: dict[str, str] = {}  # array -> the array that its memory was made for
        self.bytes: dict[str, int] = {}
        self.holders: Counter[str] = Counter()
        self.uses = Counter(name for node in nodes for name in node.inputs)
        self.given, self.fixed = graph.given, set(graph.constants)
        self.live = 0
        self.scratch = 0
        for name in self.given:
            self.views[name] = View.row(graph.shapes[name])
            self.buffer[name] = name
            self.bytes[name] = 0 if name in graph.constants else graph.nbytes(name)
            self.holders[name] = 2  # the caller's is never given up
            self.live += self.bytes[name]
        self.uses.update(graph.outputs)

    # Small helpers.

    def itemsize(self, name: str) -> int:
        return self.graph.dtypes[name].size

    def read(self, name: str) -> int:
        return self.views[name].touched * self.itemsize(name)

    def kernel(self, node: Node, kind: str, flops: int, moved: int) -> None:
        self.did.kernels.append(Kernel(node.place, kind, flops, moved))

    def note_size(self, node: Node, elements: int, itemsize: int) -> None:
        if elements > self.did.largest[1]:
            self.did.largest = (node.place, elements, elements * itemsize)

    def allocate(self, node: Node, name: str, view: View) -> None:
        self.views[name], self.buffer[name] = view, name
        self.holders[name] += 1
        self.bytes[name] = view.data_size * self.itemsize(name)
        self.live += self.bytes[name]
        self.note_size(node, view.data_size, self.itemsize(name))

    def share(self, name: str, source: str, view: View) -> None:
        self.views[name], self.buffer[name] = view, self.buffer[source]
        self.holders[self.buffer[source]] += 1

    def donates(self, name: str, view: View, itemsize: int) -> bool:
        """Whether the memory of an input can become the output's."""
        return (
            self.uses[name] == 1
            and self.holders[self.buffer[name]] == 1
            and self.itemsize(name) == itemsize
            and self.views[name].data_size == view.data_size
            and self.bytes[self.buffer[name]] == view.data_size * itemsize
            and self.views[name].strides == view.strides
        )

    def make(self, node: Node, view: View, donors: list[str]) -> None:
        """The output of a kernel, in the memory of a donor where one is free."""
        name = node.outputs[0]
        donor = next((d for d in donors if self.donates(d, view, self.itemsize(name))), None)
        if donor is None:
            self.allocate(node, name, view)
        else:
            self.share(name, donor, view)

    def copied(self, node: Node, name: str, why: str, temporary: bool = True) -> View:
        """A row-major copy of an input."""
        shape, nbytes = self.graph.shapes[name], self.graph.nbytes(name)
        of_weight = self.buffer[name] in self.graph.constants
        self.did.copies.append(Copy(node.place, why, shape, nbytes, of_weight))
        self.kernel(node, "copy", 0, self.read(name) + nbytes)
        if temporary:
            self.scratch += nbytes
            self.note_size(node, prod(shape), self.itemsize(name))
        return View.row(shape)

    def as_row(self, node: Node, name: str, why: str) -> None:
        if not self.views[name].is_row:
            self.copied(node, name, why)

    # Primitives.

    def run(self, node: Node) -> None:
        self.scratch = 0
        name = node.outputs[0]
        if node.name in _RESHAPES:
            shape = self.graph.shapes[name]
            view = self.views[node.inputs[0]].reshape(shape)
            if view is None:
                self.copied(node, node.inputs[0], "reshape", temporary=False)
                self.allocate(node, name, View.row(shape))
            else:
                self.share(name, node.inputs[0], view)
        elif node.name in _VIEWS:
            self.view(node)
        else:
            self.handler(node.name)(node)
            self.note(node)
        self.did.peak, self.did.peak_place = max(
            (self.did.peak, self.did.peak_place), (self.live + self.scratch, node.place), key=lambda x: x[0]
        )
        self.release(node)

    def handler(self, op: str) -> Callable[[Node], None]:
        if op in ELEMENTWISE:
            return self.elements
        handlers = {
            "AddMM": self.matmul,
            "Contiguous": self.contiguous,
            "Convolution": self.convolution,
            "LayerNorm": self.layer_norm,
            "Matmul": self.matmul,
            "ScaledDotProductAttention": self.attention,
            "Softmax": self.softmax,
        }
        return handlers.get(op, self.other)

    def note(self, node: Node) -> None:
        """What must not be: single precision among halves, and work on parameters alone."""
        shapes = [self.graph.shapes[name] for name in node.outputs]
        for name, shape in zip(node.outputs, shapes, strict=True):
            if self.graph.dtypes[name] == mx.float32:
                self.did.leaks.append((node.place, node.name, shape))
        if node.inputs and self.fixed.issuperset(node.inputs):
            self.fixed.update(node.outputs)
            self.did.weight_work.append((node.place, node.name, shapes[0]))

    def release(self, node: Node) -> None:
        """Give up inputs that nobody else wants, and outputs that nobody wants."""
        for name in node.inputs:
            self.uses[name] -= 1
        unused = [name for name in {*node.inputs, *node.outputs} if not self.uses[name]]
        for name in unused:
            if name in self.given:
                continue
            owner = self.buffer[name]
            self.holders[owner] -= 1
            if not self.holders[owner]:
                self.live -= self.bytes[owner]

    def view(self, node: Node) -> None:
        source = node.inputs[0]
        before = self.views[source]
        shapes = [self.graph.shapes[name] for name in node.outputs]
        match node.name:
            case "Transpose":
                views = [before.transpose(node.arguments[0])]
            case "Broadcast":
                views = [before.broadcast(shapes[0])]
            case "ExpandDims":
                views = [before.expand_dims(node.arguments[0])]
            case "Squeeze":
                views = [before.squeeze(node.arguments[0])]
            case "Slice":
                views = [before.slice(shapes[0], node.arguments[2])]
            case "Split":
                views = [before.slice(shape, (1,) * len(shape)) for shape in shapes]
            case _:
                views = [before]
        for name, view in zip(node.outputs, views, strict=True):
            self.share(name, source, view)
        if self.fixed.issuperset(node.inputs):
            self.fixed.update(node.outputs)

    def elements(self, node: Node) -> None:
        name = node.outputs[0]
        view = element_wise(self.graph.shapes[name], [self.views[n] for n in node.inputs])
        kind = "fused element-wise" if node.name == "Compiled" else "element-wise"
        each = len(set(node.parts) - {"Broadcast"}) or 1
        moved = sum(self.read(n) for n in dict.fromkeys(node.inputs)) + view.data_size * self.itemsize(name)
        self.kernel(node, kind, each * view.data_size, moved)
        self.make(node, view, node.inputs)

    def other(self, node: Node) -> None:
        """Concatenate, Pad, Gather, Reduce, Arange, ...: read all, write all."""
        moved = sum(self.read(name) for name in dict.fromkeys(node.inputs))
        for name in node.outputs:
            self.allocate(node, name, View.row(self.graph.shapes[name]))
            moved += self.graph.nbytes(name)
        self.kernel(node, node.name.lower(), 0, moved)

    def contiguous(self, node: Node) -> None:
        source, name = node.inputs[0], node.outputs[0]
        if self.views[source].is_row:
            self.share(name, source, self.views[source])
        else:
            self.allocate(node, name, self.copied(node, source, "contiguous", temporary=False))

    def layer_norm(self, node: Node) -> None:
        source = node.inputs[0]
        view = self.views[source]
        width = view.shape[-1]
        fits = view.dense and view.strides[-1] == 1
        if fits and len(view.shape) > 1:
            fits = view.strides[-2] in (0, width) or view.shape[-2] == 1
        self.row_wise(node, view if fits else None, 8, "norm input")

    def softmax(self, node: Node) -> None:
        view = self.views[node.inputs[0]]
        self.row_wise(node, view if view.dense and view.strides[-1] == 1 else None, 5, "softmax input")

    def row_wise(self, node: Node, view: View | None, each: int, why: str) -> None:
        name, source = node.outputs[0], node.inputs[0]
        # Rows above 6656 elements are read three times; how much of that a cache takes is not known here.
        moved = sum(map(self.read, node.inputs[1:])) + 2 * self.graph.nbytes(name)
        if view is None:  # written over its copy
            self.allocate(node, name, self.copied(node, source, why, temporary=False))
        else:
            self.make(node, view, [source])
        self.kernel(node, node.name.lower(), each * prod(self.graph.shapes[name]), moved)

    def matmul(self, node: Node) -> None:
        for name in node.inputs[:2]:
            if 1 not in self.views[name].strides[-2:]:
                self.copied(node, name, "matmul input")
        out, flops = node.outputs[0], operations(node, self.graph)
        self.did.matmul_flops += flops
        self.kernel(node, "matmul", flops, sum(map(self.read, node.inputs)) + self.graph.nbytes(out))
        self.allocate(node, out, View.row(self.graph.shapes[out]))

    def attention(self, node: Node) -> None:
        for name in node.inputs:
            if self.views[name].strides[-1] != 1:
                self.copied(node, name, "attention input")
        out = node.outputs[0]
        moved = sum(map(self.read, node.inputs)) + self.graph.nbytes(out)
        self.kernel(node, "attention", operations(node, self.graph), moved)
        batch, heads, length, dim = shape = self.graph.shapes[out]
        # It is stored (B, L, heads, D), so that merging the heads is a view.
        view = View.row((batch, length, heads, dim)).transpose((0, 2, 1, 3))
        self.allocate(node, out, view if length > 8 else View.row(shape))

    def convolution(self, node: Node) -> None:
        x, weight = node.inputs
        self.as_row(node, x, "convolution input")
        self.as_row(node, weight, "convolution weight")
        n, *size, c = self.graph.shapes[x]
        o, *kernel, _ = self.graph.shapes[weight]
        stride, low, high, kernel_dilation, input_dilation = (tuple(v) for v in node.arguments[:5])
        groups, flip = node.arguments[5:]
        conv = Conv(
            n,
            tuple(size),
            c,
            o,
            tuple(kernel),
            stride,
            low,
            high,
            kernel_dilation,
            input_dilation,
            groups,
            flip,
        )
        itemsize = self.itemsize(x)
        route = conv_route(conv, self.budget, itemsize)
        self.did.convolutions.append(Convolution(node.place, conv, route))
        out = node.outputs[0]
        ends = [self.graph.nbytes(name) for name in (x, weight, out)]
        if route == rules.WINOGRAD:
            self.winograd(node, conv, itemsize, *ends)
        elif route == rules.UNFOLD:
            unfolded = conv.rows * conv.depth * conv.groups * itemsize
            self.scratch += unfolded
            self.note_size(node, unfolded // itemsize, itemsize)
            self.kernel(node, "unfold", 0, ends[0] + unfolded)
            self.kernel(node, "matmul", conv.flops, unfolded + ends[1] + ends[2])
        else:
            if route in (rules.IMPLICIT_PADDED, rules.IMPLICIT_3D_PADDED):
                padded = -(-c // 16) * 16 / c
                extra = int((ends[0] + ends[1]) * padded)
                self.scratch += extra
                self.kernel(node, "pad", 0, ends[0] + ends[1] + extra)
            self.kernel(node, route, conv.flops, sum(ends))
        self.allocate(node, out, View.row(self.graph.shapes[out]))

    def winograd(self, node: Node, conv: Conv, itemsize: int, x: int, weight: int, out: int) -> None:
        scratch = Winograd.of(conv)
        if self.budget is not None:  # MLX takes as many images at a time as fit
            one = Winograd.of(conv, n=1).bytes(itemsize)
            taken = min(scratch.bytes(itemsize), max(one, self.budget))
        else:
            taken = scratch.bytes(itemsize)
        self.scratch += taken
        self.note_size(node, max(scratch.inputs, scratch.outputs), itemsize)
        padded, filters, inputs, outputs = (
            itemsize * n for n in (scratch.padded, scratch.filters, scratch.inputs, scratch.outputs)
        )
        self.kernel(node, "winograd padding", 0, padded)
        self.kernel(node, "winograd padding", 0, 2 * x)
        self.kernel(node, "winograd filters", 0, weight + filters)
        self.kernel(node, "winograd inputs", 0, padded + inputs)
        self.kernel(node, "winograd products", scratch.flops(conv), inputs + filters + outputs)
        self.kernel(node, "winograd outputs", 0, outputs + out)


def execute(graph: Graph, nodes: list[Node], winograd_budget: int | None = None) -> Execution:
    """Walk through `nodes` in the order given, keeping the books; see `rules.conv_route` for the budget."""
    machine = _Machine(graph, nodes, winograd_budget)
    for node in nodes:
        machine.run(node)
    return machine.did
