"""Long clips on the command line: windows, FreeNoise, FreeInit, prompts at frames."""

import json
import os
import shutil

import numpy as np
import pytest
import tiny
from mlx_unet3d import AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline, ContextWindows, media, memory
from mlx_unet3d.cli import keeping, main
from mlx_unet3d.models.motion_adapter import MotionAdapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of AnimateDiff, whose motion modules have 32 positions, and one of text to video."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_stable_diffusion(folder / "base", folder / "motion")
    motion = MotionAdapter.from_pretrained(folder / "motion")
    pipe = AnimateDiffPipeline.from_pretrained(folder / "base", motion_adapter=motion)
    pipe.save_pretrained(folder / "animate")
    tiny.write_pipeline(folder / "text")
    return folder


@pytest.fixture(scope="module")
def pipe(place):
    return AnimateDiffPipeline.from_pretrained(place / "animate")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(model, *words):
    return main(["generate", "a cat", "--model", str(model), *map(str, words)])


def frames_of(path):
    return media.read_video(path)[0]


SHORT = ["--num-frames", 7, "--steps", 2, "--memory", "off"]
WINDOWS = ["--context-frames", 4, "--context-overlap", 1]
# Flags, arguments of the call, and how to prepare the pipeline.
CASES = {
    "windows": (WINDOWS, dict(context_windows=ContextWindows(4, 1)), None),
    "strides": (
        [*WINDOWS, "--context-stride", 2, "--context-schedule", "looped_uniform", "--context-fuse", "flat"],
        dict(context_windows=ContextWindows(4, 1, 2, "looped_uniform", "flat")),
        None,
    ),
    "loop": (
        [*WINDOWS, "--context-closed-loop"],
        dict(context_windows=ContextWindows(4, 1, schedule="looped_uniform", closed_loop=True)),
        None,
    ),
    "free noise": (
        ["--free-noise", "--free-noise-length", 4, "--free-noise-stride", 2],
        {},
        lambda pipe: pipe.enable_free_noise(4, 2),
    ),
    "free init": (["--free-init", 2], {}, lambda pipe: pipe.enable_free_init(2)),
    "prompts": (
        ["--prompt-at", 5, "a dog", "--prompt-at", 2, "snow"],
        dict(prompt={0: "a cat", 2: "snow", 5: "a dog"}),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_flags_are_wired(place, pipe, name):
    flags, arguments, prepare = CASES[name]
    assert generate(place / "animate", *SHORT, *flags, "-o", "out.png") == 0
    plain = dict(prompt="a cat", num_frames=7, num_inference_steps=2)
    before = media.to_uint8(pipe(**plain).frames[0])
    if prepare is not None:
        prepare(pipe)
    expected = media.to_uint8(pipe(**plain | arguments).frames[0])
    pipe.disable_free_noise()
    pipe.disable_free_init()
    assert np.array_equal(frames_of("out.png"), expected)
    assert not np.array_equal(expected, before)


def test_all_at_once_replayed_changed_and_resumed(place, monkeypatch, capsys):
    shutil.copytree(place / "animate", "model")
    flags = [*WINDOWS, "--free-noise", "--free-noise-length", 3, "--free-init", 2, "--prompt-at", 4, "snow"]
    assert generate("./model", *SHORT, *flags, "-o", "one.png") == 0
    found = media.read_metadata("one.png")
    assert (found["context_frames"], found["free_noise"], found["free_init"]) == (4, True, 2)
    assert json.loads(found["prompt_at"]) == [[4, "snow"]]
    again = ["--from", "one.png", "--memory", "off", "-o"]
    assert main(["generate", *again, "two.png"]) == 0
    assert np.array_equal(frames_of("two.png"), frames_of("one.png"))
    off = ["--context-frames", "0", "--no-free-noise", "--free-init", "0", "--prompt-at", "4", "a cat"]
    assert main(["generate", *again, "three.png", "--num-frames", "6", *off]) == 0
    plain = [*SHORT, "--num-frames", 6, "--prompt-at", 4, "a cat"]
    assert generate("./model", *plain, "-o", "four.png") == 0
    assert np.array_equal(frames_of("three.png"), frames_of("four.png"))
    assert not np.array_equal(frames_of("three.png"), frames_of("one.png")[:6])
    # Another family takes the prompt along, and says what it leaves out.
    assert main(["generate", *again, "five.png", "--model", str(place / "text")]) == 0
    said = capsys.readouterr().err
    for flag in ("--free-noise", "--free-init", "--prompt-at"):
        assert f"{flag} of the replayed video means nothing to text-to-video models: left out" in said
    found = media.read_metadata("five.png")
    assert (found["context_frames"], found["free_noise"], found.get("prompt_at")) == (4, False, None)
    # Stopped in the second iteration of FreeInit.
    step = keeping.Keeper.step

    def interrupted(self, record):
        step(self, record)
        if record.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeping.Keeper, "step", interrupted)
        assert generate("./model", *SHORT, *flags, "-o", "six.png") == 130
    left = "six.png.latents.safetensors"
    assert main(["generate", "--resume", left, "--prompt-at", "3", "x"]) == 2
    assert "leave out --prompt-at" in capsys.readouterr().err
    assert main(["generate", "--resume", left, "--memory", "off"]) == 0
    assert np.array_equal(frames_of("six.png"), frames_of("one.png"))


def test_windows_of_other_families(place):
    words = ["--num-frames", 5, "--steps", 2, "--memory", "off", "-o"]
    assert generate(place / "text", *words, "all.png") == 0
    assert generate(place / "text", *words, "windows.png", *WINDOWS) == 0
    assert not np.array_equal(frames_of("all.png"), frames_of("windows.png"))


def test_video_to_video(place):
    video = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    media.write_video("in.png", video)
    words = ["--video", "in.png", "--steps", 4, "--memory", "auto", *WINDOWS]
    words += ["--free-init", 2, "--prompt-at", 3, "a dog", "-o", "out.png"]
    assert generate(place / "animate", *words) == 0
    theirs = AnimateDiffVideoToVideoPipeline.from_pretrained(place / "animate")
    theirs.enable_free_init(2)
    windows = ContextWindows(4, 1)
    made = theirs(video, {0: "a cat", 3: "a dog"}, num_inference_steps=4, context_windows=windows)
    assert np.array_equal(frames_of("out.png"), media.to_uint8(made.frames[0]))


LONG = ["--num-frames", "40"]
REFUSED = {
    "too long": ("animate", LONG, "num_frames=40 exceeds the motion module's 32 positions"),
    "its cure": ("animate", LONG, "on the command line --context-frames 16 or --free-noise"),
    "windows too long": ("animate", [*LONG, "--context-frames", 36], "length of context_windows=36 exceeds"),
    "free noise too long": (
        "animate",
        [*LONG, "--free-noise", "--free-noise-length", 33],
        "--free-noise-length 33 --free-noise-stride 4: 33 exceeds the motion module's 32 positions",
    ),
    "overlap": (
        "animate",
        [*WINDOWS, "--context-overlap", 4],
        "--context-frames 4: overlap=4 leaves windows of length=4",
    ),
    "overlap alone": (
        "animate",
        ["--context-overlap", 2],
        "--context-overlap means nothing without --context-f",
    ),
    "stride alone": ("animate", ["--free-noise-stride", 2], "means nothing without --free-noise; give both"),
    "frame 0": ("animate", ["--prompt-at", 0, "x"], "--prompt-at 0: give a frame from 1"),
    "no frame": ("animate", ["--prompt-at", "x", "x"], "--prompt-at x: give a frame from 1"),
    "twice": ("animate", ["--prompt-at", 2, "x", "--prompt-at", 2, "y"], "2 prompts for 1 frames"),
    "behind": ("animate", ["--prompt-at", 16, "x"], "--prompt-at 16: the video has 16 frames"),
    "cache": ("animate", [*WINDOWS, "--cache-interval", 2], "--cache-interval 2 keeps features"),
    "free noise": (
        "text",
        ["--free-noise"],
        "--free-noise means nothing to text-to-video models; it is for Anim",
    ),
    "free init": ("text", ["--free-init", 2], "AnimateDiff, AnimateDiff with --video, AnimateDiff on SDXL"),
    "prompts": ("text", ["--prompt-at", 2, "x"], "it is for AnimateDiff, AnimateDiff with --video: leave"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(place, capsys, name):
    model, words, message = REFUSED[name]
    memory = "auto" if name == "too long" else "off"
    assert generate(place / model, *words, "--memory", memory, "-o", "out.png") == 2
    assert message in capsys.readouterr().err
    assert not os.listdir()


def test_plan(place, monkeypatch, capsys):
    command = ["plan", "--model", str(place / "animate"), "--height", "64", "--width", "64"]
    plans, predict = [], memory.plan
    monkeypatch.setattr(memory, "plan", lambda *a, **k: plans.append(predict(*a, **k)) or plans[-1])

    def denoising(*words):
        assert main([*command, *map(str, words)]) == 0
        stage = plans[-1].stages[1]
        return stage.peak - stage.weights

    window, clip = denoising("--num-frames", 16), denoising("--num-frames", 32)
    assert clip > 1.5 * window
    assert window < denoising("--num-frames", 64, "--context-frames", 16) < 1.3 * window  # and latents
    assert denoising("--num-frames", 64, "--free-noise") > clip
    texts = ["--num-frames", 32, "--prompt-at", 16, "snow"]
    assert denoising(*texts) > clip
    assert main([*command, "--num-frames", "64"]) == 2
    assert "--context-frames 16" in capsys.readouterr().err
    assert main([*command, "--free-noise-length", "4"]) == 2
    assert "means nothing without --free-noise" in capsys.readouterr().err
    assert main(["plan", "--model", str(place / "text"), "--free-noise"]) == 2
    assert "--free-noise means nothing to text-to-video models" in capsys.readouterr().err
    step = ["--num-frames", "64", "--context-frames", "16", "--chip", "M2", "--memory", "16GB"]
    seconds = []
    for overlap in ("0", "8"):
        assert main([*command, *step, "--context-overlap", overlap]) == 0
        (line,) = (x for x in capsys.readouterr().out.splitlines() if "s a step" in x)
        seconds.append(float(line.split(": ")[1].split(" s a step")[0]))
    assert seconds[1] == pytest.approx(7 / 4 * seconds[0], rel=0.02)  # windows
