"""Traces and forwards side by side in threads, and operations that a tracer sees as one."""

import re
import sys
import threading
from pathlib import Path

import mlx_unet3d
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import AutoencoderKL, CLIPTextModel, UNet3DConditionModel, cpu, memory, operations
from metal.trace import trace
from mlx_unet3d.memory.tracing import Marks, record
from mlx_unet3d.models.autoencoder_kl import AutoencoderKLConfig
from mlx_unet3d.models.clip_text import CLIPTextConfig
from mlx_unet3d.models.unet_3d_condition import UNet3DConditionConfig


@pytest.fixture
def eager_threads():
    """Threads take turns often, so that one is in the midst of its trace while the others run."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    """What each of the functions returns, run at the same time; the first error is raised."""
    results, errors = [None] * len(functions), []
    start = threading.Barrier(len(functions))

    def run(i):
        try:
            start.wait()
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)
        # A thread that ends with its streams still open may abort the process where that ends as well.
        mx.clear_streams()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def normal(*shape, seed=0):
    array = mx.random.normal(shape, key=mx.random.key(seed))
    mx.eval(array)
    return array


def forwards():
    """A forward of each network, on either route, as functions without arguments."""
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET))
    vae = tiny.randomize(AutoencoderKL(**tiny.VAE), 1)
    text = tiny.randomize(CLIPTextModel(vocab_size=30, **tiny.TEXT), 2)
    sample, states, latents = normal(2, 4, 3, 8, 8), normal(2, 5, 12, seed=1), normal(2, 4, 4, 4, seed=2)
    ids = np.arange(20).reshape(2, 10)

    def routed(use, fn):
        with cpu.routes(use):
            return np.array(fn())

    return unet, [
        lambda: routed(True, lambda: unet(sample, 7, states).sample),
        lambda: routed(False, lambda: unet(sample, 7, states).sample),
        lambda: routed(True, lambda: vae.decode(latents)),
        lambda: routed(False, lambda: text(ids)),
    ]


NETWORKS = memory.Networks(
    memory.Network(UNet3DConditionModel, UNet3DConditionConfig(**tiny.UNET)),
    memory.Network(AutoencoderKL, AutoencoderKLConfig(**tiny.VAE)),
    memory.Network(CLIPTextModel, CLIPTextConfig(vocab_size=30, **tiny.TEXT)),
)


def plans():
    size = dict(num_frames=2, height=32, width=32)
    return [memory.plan(NETWORKS, backend=backend, **size) for backend in ("metal", "cpu")]


def test_forwards_beside_plans_and_traces(eager_threads):
    """Each gives what it gives alone; the traced network is one of those that run."""
    unet, functions = forwards()
    inputs = normal(1, 4, 2, 4, 4), mx.array(1.0), normal(1, 3, 12)
    mx.eval(inputs)

    def traces():
        graphs = [trace(lambda unet, *args: unet(*args).sample, *inputs, model=unet) for _ in range(2)]
        return [[(node.name, node.place, node.region) for node in graph.nodes] for graph in graphs]

    alone, planned, traced = [fn() for fn in functions], plans(), traces()
    assert any(name == "LayerNorm" for name, *_ in traced[0])
    repeated = [lambda fn=fn: [fn() for _ in range(3)] for fn in functions]
    *results, plans_beside, traces_beside = in_threads(*repeated, plans, traces)
    for expected, found in zip(alone, results, strict=True):
        for result in found:
            np.testing.assert_array_equal(result, expected)
    assert plans_beside == planned
    assert traces_beside == traced


def test_one_compiled_network_in_threads(eager_threads):
    """Every shape is new to its thread, so that one traces while the others run."""
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET))
    states = normal(1, 5, 12)
    samples = [normal(1, 4, frames, 4, 4) for frames in (1, 2)]

    def run(order):
        return {i: np.array(unet(samples[i], 7, states).sample) for i in order}

    alone = run(range(2))
    unet.compile()
    for found in in_threads(*(lambda i=i: run([i, 1 - i]) for i in range(2))):
        for i, result in found.items():
            np.testing.assert_allclose(result, alone[i], atol=1e-5 * np.abs(alone[i]).max())


def marked(fn, *args, gpu):
    tracer = Marks(gpu)
    with operations.traced_by(tracer):
        return [node.name for node in record(fn, args, tracer).nodes if node.mark is not None]


def test_what_a_tracer_sees():
    x = normal(1, 2, 5, 8)
    double = operations.one_operation(mx.compile(lambda x: x * 2 + 1))

    def run(x):
        y = operations.attention(x, x, x, scale=1.0)
        return double(operations.layer_norm(y, None, None, 1e-5))

    assert marked(run, x, gpu=True) == ["ScaledDotProductAttention", "LayerNorm", "Compiled"]
    assert marked(run, x, gpu=False) == ["Compiled"]
    assert operations.active_tracer() is None


def test_networks_use_these_operations():
    """MLX's own, inside a network, would be taken apart while it is traced."""
    package = Path(mlx_unet3d.__file__).parent
    own = re.compile(r"mx\.fast\.|nn\.(LayerNorm|RMSNorm|GELU|SiLU)\(")
    exempt = {"operations.py", "selftest.py"}
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name not in exempt
        for line in path.read_text().splitlines()
        if own.search(line) and "`" not in line
    ]
    assert found == []
