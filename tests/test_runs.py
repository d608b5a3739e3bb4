"""Runs of one pipeline at the same time: interleaved, one in the other's callback, in two threads."""

import copy
import itertools
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, VideoToVideoPipeline
from mlx_unet3d.compilation import CompiledForward
from mlx_unet3d.schedulers import SCHEDULERS, scheduler_from_config

FRAMES = 2
LONG, SHORT = 4, 3  # steps of the two runs


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))
    return TextToVideoPipeline.from_pretrained(folder), VideoToVideoPipeline.from_pretrained(folder)


@pytest.fixture(autouse=True)
def own_schedulers(pipes):
    """Each test may set a scheduler; the runs may not."""
    before = [pipe.scheduler for pipe in pipes]
    yield
    for pipe, scheduler in zip(pipes, before, strict=True):
        pipe.scheduler = scheduler


def begin(pipe, count, **settings):
    """The steps of a run of `count` steps, from its own seed and prompt."""
    text = mx.random.normal((1, 77, 12), key=mx.random.key(count))
    settings = dict(num_inference_steps=count, seed=count, guidance_scale=1.0) | settings
    if isinstance(pipe, VideoToVideoPipeline):
        video = mx.random.normal((1, 4, FRAMES, 4, 4), key=mx.random.key(9))
        return pipe.steps((text, None), video, strength=0.8, **settings)
    return pipe.steps((text, None), num_frames=FRAMES, **settings)


def same(records, others):
    assert [r.timestep for r in records] == [r.timestep for r in others]
    assert all(mx.array_equal(a.latents, b.latents).item() for a, b in zip(records, others, strict=True))


@pytest.mark.parametrize("kind", [0, 1], ids=["text", "video"])
@pytest.mark.parametrize("short", SCHEDULERS)
def test_interleaved_runs(pipes, short, kind):
    pipe = pipes[kind]
    config = pipe.scheduler.config.to_dict() | {"skip_prk_steps": True}
    pipe.scheduler = scheduler_from_config(config, short)
    before = {name: copy.copy(value) for name, value in vars(pipe.scheduler).items()}
    alone = [list(begin(pipe, count)) for count in (LONG, SHORT)]
    in_turn = list(itertools.zip_longest(begin(pipe, LONG), begin(pipe, SHORT)))
    for k in (0, 1):
        same([pair[k] for pair in in_turn if pair[k] is not None], alone[k])

    # The longer one stops after two steps, and goes on while the other runs.
    start = [record.prediction for record in alone[0][:2]]
    in_turn = list(itertools.zip_longest(begin(pipe, LONG, predictions=start), begin(pipe, SHORT)))
    same([pair[0] for pair in in_turn], alone[0])
    for name, value in vars(pipe.scheduler).items():
        assert np.array_equal(value, before[name]), name


def test_a_scheduler_set_during_a_run_is_for_the_next(pipes):
    pipe, _ = pipes
    alone = list(begin(pipe, SHORT))
    records = []
    for record in begin(pipe, SHORT):
        records.append(record)
        pipe.scheduler = scheduler_from_config(pipe.scheduler.config, "euler")
    same(records, alone)


@pytest.mark.parametrize("short", ["ddim", "dpm++", "unipc"])
def test_a_call_in_its_own_callback(pipes, short):
    pipe, _ = pipes
    pipe.scheduler = scheduler_from_config(pipe.scheduler.config, short)
    settings = dict(num_frames=FRAMES, output_type="latent", guidance_scale=1)
    outer = pipe("a cat", num_inference_steps=3, seed=1, **settings).frames
    inner = pipe("a dog", num_inference_steps=2, seed=2, **settings).frames
    seen = []

    def callback(*_):
        seen.append(pipe("a dog", num_inference_steps=2, seed=2, **settings).frames)

    got = pipe("a cat", num_inference_steps=3, seed=1, callback=callback, **settings).frames
    assert mx.array_equal(got, outer)
    assert len(seen) == 3
    assert all(mx.array_equal(latents, inner) for latents in seen)


def in_thread(work):
    """A thread under way, and where its result, or error, will be."""
    result = []

    def target():
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)
        finally:
            mx.clear_streams()  # else MLX may abort the process at its exit

    thread = threading.Thread(target=target)
    thread.start()
    return thread, result


@pytest.mark.parametrize(
    ("short", "kind", "rng"), [("ddim", 0, "torch"), ("dpm++-sde", 0, "mlx"), ("lcm", 1, "torch")]
)
def test_two_threads(pipes, short, kind, rng):
    pipe = pipes[kind]
    pipe.scheduler = scheduler_from_config(pipe.scheduler.config, short)
    alone = [list(begin(pipe, count, rng=rng)) for count in (LONG, SHORT)]
    threads = [in_thread(lambda count=count: list(begin(pipe, count, rng=rng))) for count in (LONG, SHORT)]
    for (thread, result), expected in zip(threads, alone, strict=True):
        thread.join()
        assert not isinstance(result[0], BaseException), result[0]
        same(result[0], expected)


@pytest.mark.parametrize("rng", ["torch", "mlx"])
@pytest.mark.parametrize("kind", [0, 1], ids=["text", "video"])
def test_a_run_begun_in_one_thread_goes_on_in_another(pipes, kind, rng):
    pipe = pipes[kind]
    pipe.scheduler = scheduler_from_config(pipe.scheduler.config, "lcm")  # draws noise on the way
    expected = list(begin(pipe, LONG, rng=rng))
    steps = begin(pipe, LONG, rng=rng)
    first = next(steps)
    thread, result = in_thread(lambda: list(steps))
    thread.join()
    assert not isinstance(result[0], BaseException), result[0]
    same([first, *result[0]], expected)


def test_a_compiled_network_in_two_threads():
    """A second thread waits while the first traces, when placeholders stand in the network."""
    layer = nn.Linear(4, 4)
    x = mx.random.normal((2, 4), key=mx.random.key(1))
    expected = layer(x)
    mx.eval(expected, x)
    under_way = []

    def forward(inputs):
        if not under_way:
            under_way.append(in_thread(lambda: np.array(compiled(x))))
            under_way[0][0].join(0.2)
        return layer(inputs)

    compiled = CompiledForward(layer, forward)
    assert mx.array_equal(compiled(x), expected)
    thread, result = under_way[0]
    thread.join()
    assert not isinstance(result[0], BaseException), result[0]
    assert np.array_equal(result[0], np.array(expected))
