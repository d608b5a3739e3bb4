"""How much memory a graph takes when MLX evaluates it.

A walk through the graph in the order of MLX's evaluator, with what it does to memory: views share a buffer,
element-wise operations write into an input that nobody else needs, a buffer is freed with its last user. What
an operation takes beside its results is up to the backend, see `costs`. Sources: `eval_impl` in MLX's
`transforms.cpp`, `array::is_donatable`, and the operations of its CPU backend.
"""

from collections import Counter, deque
from dataclasses import dataclass

from .costs import Backend
from .tracing import Graph, Node
from .views import DONATES, View, input_view, view_of

_MAX_WIDTH = 20  # MLX_BFS_MAX_WIDTH


@dataclass(frozen=True)
class Memory:
    """Memory of a graph beside its inputs: bytes at the peak, of the largest buffer, and where.

    Attributes:
        peak: bytes at the worst moment.
        largest: bytes of the largest buffer.
        at: name of the operation of the worst moment, with the shape of its result.
    """

    peak: int
    largest: int
    at: str


def order(graph: Graph) -> list[Node]:
    """The operations that the results need, in the order in which MLX evaluates them."""
    maker = {name: node for node in graph.nodes for name in node.outputs}
    root = Node("Results", tuple(graph.outputs), ())
    uses: Counter[int] = Counter()
    seen, stack = {id(root)}, [root]
    while stack:
        for name in stack.pop().inputs:
            node = maker.get(name)
            if node is None:
                continue
            uses[id(node)] += 1
            if id(node) not in seen:
                seen.add(id(node))
                stack.append(node)
    # From the results backwards, in breadth up to a width, then in depth.
    tape, waiting, i = [root], [], 0
    while i < len(tape) or waiting:
        start = 0
        if i < len(tape):
            node = tape[i]
            i += 1
        else:
            node, start = waiting.pop()
        for j in range(start, len(node.inputs)):
            source = maker.get(node.inputs[j])
            if source is None:
                continue
            if len(tape) - i >= _MAX_WIDTH:
                waiting.append((node, j))
                break
            uses[id(source)] -= 1
            if uses[id(source)] == 0:
                tape.append(source)
    return tape[:0:-1]


class _Buffers:
    """Who holds which buffer; `given` buffers have no size and are never freed."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.holders: Counter[int] = Counter()
        self.active = self.peak = self.largest = 0

    def new(self, nbytes: int) -> int:
        key = len(self.sizes)
        self.sizes[key] = nbytes
        self.active += nbytes
        self.peak = max(self.peak, self.active)
        self.largest = max(self.largest, nbytes)
        return key

    def hold(self, key: int) -> None:
        self.holders[key] += 1

    def release(self, key: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.active -= self.sizes[key]


def simulate(graph: Graph, backend: Backend) -> Memory:
    """The memory of one evaluation of `graph`."""
    nodes = order(graph)
    left = Counter(name for node in nodes for name in node.inputs)
    left.update(graph.outputs)
    buffers = _Buffers()
    views: dict[str, View] = {}
    for name in graph.given:
        views[name] = input_view(graph.shapes[name], -1)
    pending: deque[tuple[int, int]] = deque()  # when to release which buffer
    dispatched, worst, at = 0, 0, ""
    for node in nodes:
        scratch = [buffers.new(n) for n in backend.scratch(node, graph, views) if n]
        for key in scratch:
            buffers.hold(key)
        for k, name in enumerate(node.outputs):
            view = view_of(node, k, graph, views)
            if view is None:
                view = _donated(node, name, graph, views, left, buffers, backend)
            if view is None:
                view = input_view(graph.shapes[name], buffers.new(graph.nbytes(name)))
            views[name] = view
            if view.buffer >= 0 and left[name]:
                buffers.hold(view.buffer)
        if buffers.peak > worst:
            worst, at = buffers.peak, f"{node.name} {graph.shapes[node.outputs[0]]}"
        # The operation holds its inputs until it has run.
        outputs = {views[name].buffer for name in node.outputs}
        held = {views[name].buffer for name in node.inputs} - outputs - {-1}
        for key in held:
            buffers.hold(key)
        dispatched += backend.dispatches(node, graph, views)
        pending.extend((dispatched + backend.behind, key) for key in (*held, *scratch))
        for name in node.inputs:
            left[name] -= 1
            if left[name] == 0 and views[name].buffer >= 0:
                buffers.release(views[name].buffer)
        while pending and pending[0][0] <= dispatched:
            buffers.release(pending.popleft()[1])
    return Memory(buffers.peak, buffers.largest, at)


def _donated(
    node: Node,
    name: str,
    graph: Graph,
    views: dict[str, View],
    left: Counter[str],
    buffers: _Buffers,
    backend: Backend,
) -> View | None:
    """The view of an input's buffer that `node` may write its result into."""
    if node.name not in DONATES and node.name not in backend.donates:
        return None
    needed = graph.nbytes(name)
    for source in node.inputs:
        view = views[source]
        if (
            view.buffer >= 0
            and left[source] == node.inputs.count(source)
            and buffers.holders[view.buffer] == 1
            and view.dense
            and graph.nbytes(source) == needed == buffers.sizes[view.buffer]
        ):
            return View(
                graph.shapes[name], view.strides if view.shape == graph.shapes[name] else None, view.buffer
            )
    return None
