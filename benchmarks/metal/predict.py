"""A prediction for one forward: kernels and routes, FLOPs, bytes, copies, leaks, memory, time at best."""

import re
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
from mlx_unet3d.chips import Chip
from mlx_unet3d.memory.liveness import order

from . import rules
from .execution import Copy, Execution, Kernel, execute
from .schedule import fused
from .trace import Attention, Graph, Node

# Shares of the peak rates that kernels are taken to reach. Assumed, not measured: what is published for MLX's
# products of matrices and for copies on M1 to M3 is about this; the general route is 1.2 to 4.5 times slower.
_REACHED = {"matmul": 0.8, "implicit": 0.7, "general": 0.25, "attention": 0.6, "element-wise": 0.5}
_BANDWIDTH_REACHED = 0.8

# What is smaller is no activation: the sinusoid of a timestep, a row of statistics.
ACTIVATION = 4096


def hoisted(graph: Graph, *inputs: str) -> tuple[Graph, Graph]:
    """The graph without what depends on nothing but `inputs` and constants, and that part by itself.

    A pipeline computes the keys and values of a prompt once; the rest of the graph takes them as inputs.
    """
    constant, known = set(graph.constants), graph.constants | set(inputs)
    once: list[Node] = []
    rest: list[Node] = []
    for node in graph.nodes:
        if constant.issuperset(node.inputs):  # views of parameters stay with their users
            constant.update(node.outputs)
            once.append(node)
            rest.append(node)
        elif all(name in known or name in constant for name in node.inputs):
            known.update(node.outputs)
            once.append(node)
        else:
            rest.append(node)
    needed = {name for node in rest for name in node.inputs} | set(graph.outputs)
    made = [name for node in once for name in node.outputs if name not in constant]
    crossing = [name for name in made if name in needed]
    left = [name for name in graph.inputs if name not in inputs or name in needed]
    step = replace(graph, nodes=rest, inputs=left + crossing)
    return step, replace(graph, nodes=once, inputs=list(inputs), outputs=crossing)


@dataclass(frozen=True)
class Prediction:
    """Of a forward in one dtype.

    Attributes:
        done: as it runs, with those functions fused that are compiled.
        best: as it would run if the whole forward were compiled.
        attentions: calls of the fused attention, with the kernels that they get.
        weights: bytes of the parameters.
        dtype: of the activations.
    """

    done: Execution
    best: Execution
    attentions: list[Attention]
    weights: int
    dtype: mx.Dtype

    @property
    def kernels(self) -> int:
        return len(self.done.kernels)

    @property
    def kernels_fused(self) -> int:
        return len(self.best.kernels)

    @property
    def bytes(self) -> int:
        """Read and written by all kernels."""
        return sum(kernel.bytes for kernel in self.done.kernels)

    @property
    def bytes_fused(self) -> int:
        return sum(kernel.bytes for kernel in self.best.kernels)

    @property
    def conv_flops(self) -> int:
        return sum(c.conv.flops for c in self.done.convolutions)

    @property
    def attention_flops(self) -> int:
        """Of attention kernels; the products of unfused attention are in `matmul_flops`."""
        return sum(a.flops for a in self.attentions if a.route != rules.UNFUSED)

    @property
    def matmul_flops(self) -> int:
        return self.done.matmul_flops

    @property
    def flops(self) -> int:
        """Two a multiply-add, by the definitions of the operations, whatever a kernel saves."""
        return self.conv_flops + self.matmul_flops + self.attention_flops

    @cached_property
    def copies(self) -> list[Copy]:
        """Of activations."""
        return [c for c in self.done.copies if not c.of_weight and c.bytes >= ACTIVATION * self.dtype.size]

    @cached_property
    def weight_work(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(place, what, shape) of parameters that are copied or changed on every call."""
        copies = [(c.place, c.why, c.shape) for c in self.done.copies if c.of_weight]
        return copies + [work for work in self.done.weight_work if _large(work[2])]

    @cached_property
    def leaks(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(place, what, shape) of activations in single precision in a forward in half precision."""
        if self.dtype == mx.float32:
            return []
        return [leak for leak in self.done.leaks if _large(leak[2])]

    @property
    def peak(self) -> int:
        """Bytes of activations alive at once at worst, scratch included, parameters not.

        MLX encodes kernels ahead of the GPU, and holds what they use until they are done: some ten more.
        """
        return self.done.peak

    def seconds(self, chip: Chip, fused: bool = False) -> float:
        """Of the kernels one by one: the larger of compute and traffic, at an assumed share of the peaks."""
        half = self.dtype.size == 2
        kernels = (self.best if fused else self.done).kernels
        return sum(kernel_seconds(kernel, chip, half) for kernel in kernels)


def predict(graph: Graph, winograd_budget: int | None = None) -> Prediction:
    """See `Prediction`; `winograd_budget` as in `rules.conv_route`."""
    runs = (
        execute(graph, order(replace(graph, nodes=fused(graph, everything))), winograd_budget)
        for everything in (False, True)
    )
    weights = sum(graph.nbytes(name) for name in graph.constants)
    places = {node.place for node in graph.nodes if node.name in ("ScaledDotProductAttention", "Softmax")}
    attentions = [a for a in graph.attentions if a.place in places]
    return Prediction(*runs, attentions, weights, graph.dtypes[graph.outputs[0]])


def kernel_seconds(kernel: Kernel, chip: Chip, half: bool) -> float:
    """The roofline of one kernel: an assumption about the chip, not a measurement."""
    with_units = chip.matmul_tflops if half else chip.fp16_tflops
    if kernel.kind in ("matmul", "winograd products"):
        rate = with_units * _REACHED["matmul"]
    elif kernel.kind == "attention":
        rate = with_units * _REACHED["attention"]
    elif kernel.kind == rules.IMPLICIT_GENERAL:
        rate = chip.fp16_tflops * _REACHED["general"]
    elif kernel.kind.startswith("implicit"):
        rate = chip.fp16_tflops * _REACHED["implicit"]
    else:
        rate = chip.fp16_tflops * _REACHED["element-wise"]
    return max(kernel.flops / (rate * 1e12), kernel.bytes / (chip.gb_per_s * _BANDWIDTH_REACHED * 1e9))


def kind_of_place(place: str) -> str:
    """What all places of a sort have in common: "down_blocks.0.resnets.1.norm2" -> "resnets.norm2"."""
    without_level = re.sub(r"^(.*\.)?(down_blocks|up_blocks|mid_block)(\.\d+)?\.", "", place)
    return re.sub(r"(s)\.\d+(?=\.|$)", r"\1", without_level)


def _large(shape: tuple[int, ...]) -> bool:
    size = 1
    for n in shape:
        size *= n
    return size >= ACTIVATION
