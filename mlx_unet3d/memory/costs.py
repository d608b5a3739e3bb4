"""Costs of an operation in MLX's backends: scratch memory, and how far they run ahead.

Everything that differs between backends, and may change with MLX, is in this file. Source: MLX 0.32,
`backend/cpu` and `backend/metal` (`conv.cpp`, `matmul.cpp`, `scaled_dot_product_attention.cpp`).
"""

import math

from ..layers.attention_processors import FUSED_HEAD_DIMS
from .tracing import Graph, Node
from .views import ELEMENTWISE, View


class Backend:
    """The CPU backend.

    Attributes:
        name: "cpu" or "metal".
        gpu: whether attention and layer norms are operations of their own.
        behind: pieces of work by which the release of buffers is at most behind, where memory is over the
            limit. On the CPU it is up to chance: an operation may begin while the last one is being released.
        donates: operations that write into an input, besides `views.DONATES`.
    """

    name = "cpu"
    gpu = False
    behind = 1
    donates: frozenset[str] = frozenset()

    def scratch(self, node: Node, graph: Graph, views: dict[str, View]) -> list[int]:
        """Bytes of the buffers that `node` takes while it runs."""
        if node.name == "Convolution":
            return self.convolution(node, graph, views)
        if node.name in ("Matmul", "AddMM"):
            return [graph.nbytes(name) for name in node.inputs[:2] if not self.is_matrix(views[name])]
        if node.name == "Softmax" and not views[node.inputs[0]].contiguous:
            return [graph.nbytes(node.inputs[0])]
        return []

    def convolution(self, node: Node, graph: Graph, views: dict[str, View]) -> list[int]:
        """The padded input, all windows written out, and where they are not in fp32 weight and result."""
        x, weight = node.inputs[:2]
        shape, (n, *size, _) = graph.shapes[x], graph.shapes[node.outputs[0]]
        _, low, high, *_ = node.arguments
        padded = [s + a + b for s, a, b in zip(shape[1:-1], low, high, strict=True)]
        windows = n * math.prod(size) * math.prod(graph.shapes[weight][1:])
        buffers = [4 * n * math.prod(padded) * shape[-1], 4 * windows]
        if graph.dtypes[x].size != 4:
            buffers += [4 * math.prod(graph.shapes[name]) for name in (weight, node.outputs[0])]
        return buffers

    def is_matrix(self, view: View) -> bool:
        """Return True if a product reads it where it lies."""
        rows, columns = view.steps[-2:]
        height, width = view.shape[-2:]
        return (rows, columns) in ((width, 1), (1, height))

    def dispatches(self, node: Node, graph: Graph, views: dict[str, View]) -> int:
        """Pieces of work of an operation, the release of its inputs being one of them."""
        if node.name in ("Matmul", "AddMM"):
            return 2 + len(self.scratch(node, graph, views)) + (node.name == "AddMM")
        if node.name == "Concatenate":
            return 1 + len(node.inputs)
        if node.name == "Convolution":
            return 6
        shared = views[node.outputs[0]].buffer in {views[name].buffer for name in node.inputs}
        return 1 if shared and node.name not in ELEMENTWISE else 2


class MetalBackend(Backend):
    """The Metal backend, with a memory limit: evaluation then waits after each operation, if need be."""

    name = "metal"
    gpu = True
    behind = 0
    donates = frozenset({"LayerNorm"})

    def scratch(self, node: Node, graph: Graph, views: dict[str, View]) -> list[int]:
        if node.name == "ScaledDotProductAttention":
            return self.attention(node, graph)
        if node.name == "LayerNorm" and not views[node.inputs[0]].contiguous:
            return [graph.nbytes(node.inputs[0])]
        return super().scratch(node, graph, views)

    def attention(self, node: Node, graph: Graph) -> list[int]:
        """All scores, where no fused kernel takes these heads."""
        (batch, heads, queries, dim), keys = graph.shapes[node.inputs[0]], graph.shapes[node.inputs[1]][2]
        if dim in FUSED_HEAD_DIMS:
            return []
        return [batch * heads * queries * keys * graph.dtypes[node.inputs[0]].size]

    def convolution(self, node: Node, graph: Graph, views: dict[str, View]) -> list[int]:
        """Copies of what is not in order, and for 3x3 kernels Winograd's transforms of everything."""
        x, weight = node.inputs[:2]
        item = graph.dtypes[x].size
        copies = [graph.nbytes(name) for name in (x, weight) if not views[name].contiguous]
        channels, (n, height, width, outputs) = graph.shapes[x][-1], graph.shapes[node.outputs[0]]
        kernel = graph.shapes[weight][1:3]
        stride, _, _, dilation, spread, groups, flip = node.arguments
        plain = {*stride, *dilation, *spread} == {1} and groups == 1 and not flip
        pixels = n * math.prod(graph.shapes[x][1:3])
        wide = channels % 32 == 0 and outputs % 32 == 0 and channels + outputs >= 256
        if not (plain and tuple(kernel) == (3, 3) and wide and pixels >= 4096):
            return copies
        rows, columns = -(-height // 6), -(-width // 6)
        tiles = n * rows * columns
        padded = n * (6 * rows + 2) * (6 * columns + 2) * channels
        transformed = (channels * outputs, tiles * channels, tiles * outputs)
        return [*copies, item * padded, *(64 * item * n for n in transformed)]

    def is_matrix(self, view: View) -> bool:
        return 1 in view.steps[-2:]

    def dispatches(self, node: Node, graph: Graph, views: dict[str, View]) -> int:
        return 1


BACKENDS = {backend.name: backend for backend in (Backend(), MetalBackend())}
