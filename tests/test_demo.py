"""The model in the package: it is there, small, makes what it is asked for, and knows its words."""

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import TextToVideoPipeline, media
from mlx_unet3d.checkpoints import describe, find_folder
from mlx_unet3d.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo_model"))
import judge
import world


@pytest.fixture(scope="module")
def pipe():
    return TextToVideoPipeline.from_pretrained("demo", dtype=mx.float32)


def test_size_and_dtype():
    files = [path for path in find_folder("demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {line.split()[0] for line in describe(find_folder("demo"))} >= {"unet", "vae", "text_encoder"}
    weights = [line for line in describe(find_folder("demo")) if " tensors, " in line]
    assert all("F16" in line and "mlx layout" in line for line in weights)


def test_the_name_is_the_package_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_folder("demo").name == "demo" != find_folder("demo").parent.name
    assert (find_folder("demo") / "model_index.json").is_file()
    assert find_folder("./demo") == Path("demo")


def test_demo_has_no_revisions():
    with pytest.raises(ValueError, match="the model in this package"):
        find_folder("demo", revision="main")


def test_command_without_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a red circle moving left"]) == 0
    captured = capsys.readouterr()
    assert "demo model" in captured.err
    assert "does not know" not in captured.err
    name = "a-red-circle-moving-left_seed0.gif"
    assert captured.out == name + "\n"
    frames, _ = media.read_video(name)
    assert frames.shape == (8, 64, 64, 3)
    verdict = judge.judge(frames)
    assert (verdict.colour, verdict.shape, verdict.motion) == ("red", "circle", "moving left")
    assert media.read_metadata(name)["model"] == "demo"
    assert os.listdir() == [name]


def test_unknown_words(pipe):
    assert set(pipe.recommended.vocabulary) == set(world.vocabulary())
    with pytest.warns(UserWarning, match="does not know 'panda'; it knows .*circle"):
        frames = pipe("a blue panda", num_inference_steps=2).frames
    assert np.isfinite(frames).all()


def test_held_out_prompts(pipe):
    """Combinations that training never saw; the measured rates are on the model's card."""
    prompts = world.held_out_prompts(10)
    frames = pipe(prompts, seed=list(range(10))).frames
    right = [
        judge.judge(clip).agrees(world.attributes_of(prompt))
        for prompt, clip in zip(prompts, frames, strict=True)
    ]
    for name in world.ATTRIBUTES:
        assert sum(verdict[name] for verdict in right) >= 8, name
    assert sum(all(verdict.values()) for verdict in right) >= 6
