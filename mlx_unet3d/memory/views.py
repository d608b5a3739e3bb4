"""Which operations give views of their input, and the strides of these."""

from collections.abc import Sequence
from dataclasses import dataclass

from .tracing import Graph, Node

ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh", "AsType"),
        *("BitwiseBinary", "BitwiseInvert", "Ceil", "Compiled", "Cos", "Cosh", "Divide", "Equal", "Erf"),
        *("ErfInv", "Exp", "Expm1", "Floor", "FloorDivide", "Greater", "GreaterEqual", "Less", "LessEqual"),
        *("Log", "Log10", "Log1p", "Log2", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum"),
        *("Minimum", "Multiply", "Negative", "NotEqual", "Power", "Remainder", "Round", "Rsqrt", "Select"),
        *("Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Subtract", "Tan", "Tanh"),
    )
)
"""Operations on each element alone."""

DONATES = ELEMENTWISE | {"Softmax", "SliceUpdate", "DynamicSliceUpdate"}
"""Operations that write into an input where nobody else needs it."""

_SAME = frozenset({"Depends", "StopGradient", "Copy", "Contiguous"})


@dataclass(frozen=True)
class View:
    """An array as a view of a buffer.

    Attributes:
        shape: of the array.
        strides: in elements; None for row-major.
        buffer: number of the buffer; -1 for one that is not counted.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    buffer: int

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, written out."""
        return row_major(self.shape) if self.strides is None else self.strides

    @property
    def contiguous(self) -> bool:
        """True if its elements lie in order without gaps."""
        if self.strides is None:
            return True
        expected = row_major(self.shape)
        return all(n == 1 or s == e for n, s, e in zip(self.shape, self.strides, expected, strict=True))

    @property
    def dense(self) -> bool:
        """True if its elements lie without gaps and repeats, in any order."""
        axes = sorted((s, n) for s, n in zip(self.steps, self.shape, strict=True) if n != 1)
        reach = 1
        for stride, n in axes:
            if stride != reach:
                return False
            reach *= n
        return True


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array whose elements lie in order."""
    strides, reach = [], 1
    for n in reversed(shape):
        strides.append(reach)
        reach *= n
    return tuple(reversed(strides))


def input_view(shape: tuple[int, ...], buffer: int) -> View:
    """A row-major array that has a buffer to itself."""
    return View(shape, None, buffer)


def view_of(node: Node, output: int, graph: Graph, views: dict[str, View]) -> View | None:
    """The view that an output of `node` is; None where it has a buffer of its own."""
    if not node.inputs:
        return None
    # An array that waits for others is the one of its own place.
    source = views[node.inputs[output if node.name == "Depends" else 0]]
    shape = graph.shapes[node.outputs[output]]
    name, arguments = node.name, node.arguments
    strides: tuple[int, ...] | None
    if name in _SAME:
        if name == "Contiguous" and not source.contiguous:
            return None
        strides = source.strides
    elif name == "Transpose":
        strides = tuple(source.steps[axis] for axis in arguments[0])
    elif name in ("Broadcast", "BroadcastAxes"):
        lead = len(shape) - len(source.shape)
        kept = [
            0 if n == 1 != m else s for n, m, s in zip(source.shape, shape[lead:], source.steps, strict=True)
        ]
        strides = (0,) * lead + tuple(kept)
    elif name == "Slice":
        steps = arguments[2]
        strides = tuple(s * step for s, step in zip(source.steps, steps, strict=True))
    elif name == "Split":
        strides = source.steps
    elif name in ("ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten"):
        if source.contiguous:
            strides = None
        else:
            found = reshaped(source.shape, source.steps, shape)
            if found is None:
                return None
            strides = found
    elif name == "AsStrided":
        return View(shape, tuple(arguments[1]), source.buffer)
    else:
        return None
    return View(shape, strides, source.buffer)


def reshaped(
    shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of the same elements in another shape, by `prepare_reshape` of MLX; None for a copy."""
    sizes: list[int] = []  # of axes that lie in memory like one
    steps: list[int] = []
    for n, stride in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if sizes and steps[-1] == n * stride:
            sizes[-1] *= n
            steps[-1] = stride
        else:
            sizes.append(n)
            steps.append(stride)
    if not sizes:
        sizes, steps = [1], [0]
    found: list[int] = []
    j = 0
    for n in new:
        if j < len(sizes) and sizes[j] % n == 0:
            sizes[j] //= n
            found.append(sizes[j] * steps[j])
            j += sizes[j] == 1
        elif n == 1:
            found.append(found[-1])
        else:
            return None
    return tuple(found)
