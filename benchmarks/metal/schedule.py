"""The result of `mx.compile` for a graph: fused element-wise kernels.

Read from MLX "0.32.2": mlx/compile.cpp (`compile_fuse`, `max_compile_depth`, `max_compile_arrays`).
"""

from dataclasses import replace

from mlx_unet3d.memory.views import ELEMENTWISE

from .trace import Graph, Node

_FUSABLE = ELEMENTWISE | {"Broadcast"}
_MAX_DEPTH, _MAX_ARRAYS = 11, 24


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
        parts = tuple(part.name for part in group.values())
        made.append(replace(node, name="Compiled", inputs=tuple(dict.fromkeys(names)), parts=parts))
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
    if root.name not in ELEMENTWISE or not (everything or root.region is not None):
        return group

    def visit(name: str, node: Node | None, depth: int) -> None:
        if node is not None and id(node) in group:
            return
        joins = (
            node is not None
            and depth < _MAX_DEPTH
            and node.name in _FUSABLE
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
