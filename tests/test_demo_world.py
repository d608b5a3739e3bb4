"""The demo model's world and its judge: examples/demo_model/world.py and judge.py."""

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_model"


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module("world")
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def judge(world):
    return importlib.import_module("judge")


def soften(clip: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A slight blur and noise, as a VAE leaves them."""
    padded = np.pad(clip, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    return np.clip(blurred + rng.normal(0, noise, clip.shape), 0, 1)


@pytest.mark.parametrize("soft", [False, True])
def test_the_judge_reads_true_clips(world, judge, soft):
    rng = np.random.default_rng(5)
    wrong = Counter()
    for _ in range(80):
        attributes = world.sample_attributes(rng)
        clip = world.render(attributes, rng)
        verdict = judge.judge(soften(clip, 0.02, rng) if soft else clip)
        wrong.update(name for name, right in verdict.agrees(attributes).items() if not right)
    assert not wrong


def test_the_judge_takes_bytes(world, judge):
    attributes = world.attributes_of("a small cyan ring moving up on a light background")
    clip = world.render(attributes, 1)
    assert all(judge.judge((clip * 255).round().astype(np.uint8)).agrees(attributes).values())


def test_the_judge_is_not_fooled(world, judge):
    rng = np.random.default_rng(0)
    noise = judge.judge(rng.random((8, 64, 64, 3)))
    assert noise.shape == judge.UNCLEAR
    assert judge.judge(np.full((8, 64, 64, 3), 0.1)).shape == judge.UNCLEAR
    # The frames of a clip in a random order move nowhere in particular.
    clip = world.render(world.attributes_of("a large red circle moving left"), 0)
    assert judge.judge(clip[[3, 7, 0, 5, 2, 6, 1, 4]]).motion != "moving left"
    assert judge.judge(clip[::-1]).motion == "moving right"
    # Two figures are not one.
    one = world.render(world.attributes_of("a small red circle standing still on a dark background"), 2)
    two = one + one[:, ::-1, ::-1] - one[0, 0, 0]
    assert (judge.judge(one).shape, judge.judge(two).shape) == ("circle", judge.UNCLEAR)


def test_rendering_is_deterministic(world):
    attributes = world.attributes_of("a green triangle growing")
    first, again, other = (world.render(attributes, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first.shape, first.dtype) == ((8, 64, 64, 3), np.float32)
    assert 0 <= first.min() < first.max() <= 1


def test_prompts_round_trip(world):
    rng = np.random.default_rng(1)
    for _ in range(200):
        full = world.sample_attributes(rng)
        attributes = {name: word if rng.random() < 0.7 else None for name, word in full.items()}
        assert world.attributes_of(world.prompt_of(attributes)) == attributes
    named = world.attributes_of("A red  circle moving left")
    assert named == dict(size=None, colour="red", shape="circle", motion="moving left", background=None)
    assert world.prompt_of({}) == "a shape"


def test_held_out_combinations(world):
    out, kept = world.combinations(True), world.combinations(False)
    assert 0.15 < len(out) / (len(out) + len(kept)) < 0.25
    rng = np.random.default_rng(0)
    assert not any(world.is_held_out(world.sample_attributes(rng, training=True)) for _ in range(300))
    prompts = world.held_out_prompts(100)
    assert len(set(prompts)) == 100
    assert prompts == world.held_out_prompts(100)
    assert all(world.is_held_out(world.attributes_of(prompt)) for prompt in prompts)
    with pytest.raises(ValueError, match="holds out"):
        world.held_out_prompts(10_000)


def test_world_and_judge_need_numpy_only():
    code = "import sys, world, judge; assert not {'torch', 'mlx', 'PIL', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=DEMO, check=True)
