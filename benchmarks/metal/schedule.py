"""What MLX makes of a graph before it runs: fused element-wise kernels, and the order of evaluation.

Read from MLX "0.32.2": mlx/compile.cpp (`compile_fuse`, `max_compile_depth`, `max_compile_arrays`) and
mlx/transforms.cpp (`eval_impl`).
"""

from dataclasses import replace

from .trace import Graph, Node

_UNARY = {
    *(
        "Abs",
        "ArcCos",
        "ArcCosh",
        "ArcSin",
        "ArcSinh",
        "ArcTan",
        "ArcTanh",
        "AsType",
        "BitwiseInvert",
        "Ceil",
    ),
    *("Cos", "Cosh", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Log", "Log1p", "Log2", "Log10", "LogicalNot"),
    *("Negative", "Round", "Rsqrt", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Tan", "Tanh"),
}
_BINARY = {
    *("Add", "ArcTan2", "BitwiseBinary", "Divide", "Equal", "FloorDivide", "Greater", "GreaterEqual", "Less"),
    *("LessEqual", "LogAddExp", "LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Multiply", "NotEqual"),
    *("Power", "Remainder", "Subtract"),
}
ELEMENT_WISE = _UNARY | _BINARY | {"Select"}
_FUSABLE = ELEMENT_WISE | {"Broadcast"}
_MAX_DEPTH, _MAX_ARRAYS = 11, 24
_MAX_WIDTH = 20  # MLX_BFS_MAX_WIDTH


def fused(graph: Graph, everything: bool) -> list[Node]:
    """The nodes with element-wise chains put together, as `mx.compile` does it.

    Within each call of a compiled function, or where `everything`, as if the whole forward were one.
    """
    producers = {name: node for node in graph.nodes for name in node.outputs}
    consumers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            consumers.setdefault(name, []).append(node)
    outputs = set(graph.outputs)
    done: set[int] = set()
    made = []
    for node in reversed(graph.nodes):
        if id(node) in done:
            continue
        group = _group(node, producers, consumers, outputs, everything)
        if len(group) <= 1:
            made.append(node)
            continue
        done.update(group)
        inside = {name for part in group.values() for name in part.outputs}
        names = (name for part in group.values() for name in part.inputs if name not in inside)
        parts = tuple(part.op for part in group.values())
        made.append(replace(node, op="Compiled", inputs=list(dict.fromkeys(names)), parts=parts))
    return made[::-1]


def _group(
    root: Node,
    producers: dict[str, Node],
    consumers: dict[str, list[Node]],
    outputs: set[str],
    everything: bool,
) -> dict[int, Node]:
    """id -> node of all that is fused into `root`."""
    group: dict[int, Node] = {}
    borders: set[str] = set()
    if root.op not in ELEMENT_WISE or not (everything or root.region is not None):
        return group

    def visit(name: str, node: Node | None, depth: int) -> None:
        if node is not None and id(node) in group:
            return
        joins = (
            node is not None
            and depth < _MAX_DEPTH
            and node.op in _FUSABLE
            and (everything or node.region == root.region)
            and (depth == 0 or (name not in outputs and all(id(user) in group for user in consumers[name])))
        )
        if not joins:
            borders.add(name)
            return
        borders.discard(name)
        if len(borders) >= _MAX_ARRAYS:
            return
        group[id(node)] = node
        for source in node.inputs:
            visit(source, producers.get(source), depth + 1)

    visit(root.outputs[0], root, 0)
    return group


def ordered(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """In the order of evaluation: a breadth-first walk back from the outputs, turned round."""
    producers = {name: node for node in nodes for name in node.outputs}
    sources = {id(node): [producers[n] for n in node.inputs if n in producers] for node in nodes}
    uses: dict[int, int] = {}
    walk = [producers[name] for name in outputs if name in producers]
    for node in walk:
        uses[id(node)] = uses.get(id(node), 0) + 1
    seen = set(uses)
    while walk:
        for source in sources[id(walk.pop())]:
            uses[id(source)] = uses.get(id(source), 0) + 1
            if id(source) not in seen:
                seen.add(id(source))
                walk.append(source)

    tape: list[Node] = []
    roots = [producers[name] for name in outputs if name in producers]
    waiting: list[tuple[list[Node], int]] = [(roots, 0)]
    at = 0
    while at < len(tape) or waiting:
        if at < len(tape):
            inputs, j = sources[id(tape[at])], 0
            at += 1
        else:
            inputs, j = waiting.pop()
        while j < len(inputs):
            if len(tape) - at >= _MAX_WIDTH:
                waiting.append((inputs, j))
                break
            uses[id(inputs[j])] -= 1
            if uses[id(inputs[j])] == 0:
                tape.append(inputs[j])
            j += 1
    return tape[::-1]
