"""The command as a person meets it: names of videos, preferences, how much is said, errors with a cure."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from mlx_unet3d import media
from mlx_unet3d.atomic import claim
from mlx_unet3d.cli import build_parser, main
from mlx_unet3d.cli.outputs import title


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MLX_UNET3D_CONFIG", str(tmp_path / "config" / "config.toml"))


SHORT = ["--num-frames", "2", "--steps", "1", "--memory", "off", "--quiet"]


def generate(model, *arguments):
    return main(["generate", *arguments, "--model", str(model), *SHORT])


def test_unnamed_videos_get_free_names(model, capsys):
    """Never refused, never overwritten: neither files, nor what runs left, nor names that other runs hold."""
    for _ in range(2):
        assert generate(model, "A cat, running!") == 0
    Path("a-cat-running_seed0_3.gif.latents.safetensors").write_bytes(b"left")
    with claim(Path("a-cat-running_seed0_4.gif.latents.safetensors")):
        assert generate(model, "a cat running") == 0
    assert generate(model, "a cat running", "--num-videos", "2", "--seed", "6") == 0
    names = [f"a-cat-running_seed{end}.gif" for end in ("0", "0_2", "0_5", "6", "7")]
    assert capsys.readouterr().out.split() == names
    assert sorted(os.listdir()) == sorted([*names, "a-cat-running_seed0_3.gif.latents.safetensors"])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(prompt="../../etc/passwd"), "etc-passwd"),
        (dict(prompt="Ein Bär \u00fcber-quert"), "ein-bär-über-quert"),
        (dict(prompt="word " * 40), "-".join(["word"] * 12)),
        (dict(prompt="\u7334" * 99), "\u7334" * 15),
        (dict(prompt="!?", image=None), "video"),
        (dict(prompt=None, image="/a b/photo one.jpg"), "photo-one"),
        (dict(prompt=None, image=None, video="cat.mp4"), "cat"),
    ],
)
def test_names_are_of_letters_and_digits(settings, name):
    assert title(dict.fromkeys(("prompt", "image", "video")) | settings) == name


def test_an_existing_output_is_refused_with_the_cure(model, capsys):
    Path("out.gif").write_bytes(b"mine")
    assert generate(model, "a cat", "-o", "out.gif") == 2
    assert "with -o, or replace it with --overwrite" in capsys.readouterr().err
    assert Path("out.gif").read_bytes() == b"mine"


def test_preferences(model, tmp_path, monkeypatch, capsys):
    """The command line goes before the environment, and that before the file."""
    (tmp_path / "films").mkdir()
    for name, value in (("model", str(model)), ("format", "png"), ("folder", str(tmp_path / "films"))):
        assert main(["config", name, value]) == 0
    assert main(["generate", "a cat", *SHORT]) == 0
    made = tmp_path / "films" / "a-cat_seed0.png"
    assert capsys.readouterr().out == f"{made}\n"
    assert media.read_metadata(made)["model"] == model.name
    monkeypatch.setenv("MLX_UNET3D_FORMAT", "webp")
    assert main(["generate", "a cat", *SHORT]) == 0
    assert generate(model, "a cat", "-o", "own.gif") == 0
    assert main(["config", "format"]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "films" / "a-cat_seed0.webp"),
        "own.gif",
        "webp",
    ]
    assert main(["config"]) == 0
    shown = capsys.readouterr().out
    assert "webp (MLX_UNET3D_FORMAT)" in shown
    assert f"{model} ({tmp_path / 'config' / 'config.toml'})" in shown
    monkeypatch.delenv("MLX_UNET3D_FORMAT")
    assert main(["config", "--unset", "format"]) == main(["config", "format"]) == 0
    assert capsys.readouterr().out == "gif\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = ", "is no TOML"),
        ("format = 3", "must be text in quotes"),
        ('format = "avi"', "none of gif, webp, png, mp4"),
        ('folder = "/nowhere/films"', "make it first"),
        ('model = ""', "names nothing"),
        ("modle = 'x'", "it can set model, folder, format"),
    ],
)
def test_damaged_preferences(tmp_path, capsys, text, message):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(text)
    assert main(["config"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "config.toml" in error


def test_config_keeps_what_else_is_in_the_file(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text("# mine\nformat = 'png' # small\n")
    assert main(["config", "model", "demo"]) == 0
    assert (tmp_path / "config" / "config.toml").read_text() == (
        "# mine\nformat = 'png' # small\nmodel = \"demo\"\n"
    )


def test_prompt_of_a_file_and_of_a_pipe(model, monkeypatch, capsys):
    Path("prompt.txt").write_text("a cat\n")
    assert generate(model, "--prompt-file", "prompt.txt") == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a dog\n")))
    assert generate(model, "--prompt-file", "-") == 0
    names = capsys.readouterr().out.split()
    assert names == ["a-cat_seed0.gif", "a-dog_seed0.gif"]
    assert [media.read_metadata(name)["prompt"] for name in names] == ["a cat", "a dog"]


def test_json(model, capsys):
    assert generate(model, "a cat", "--json", "--num-videos", "2", "--keep-latents") == 0
    assert main(["decode", "a-cat_seed1.gif.latents.safetensors", "--json", "--quiet", "-o", "o.png"]) == 2
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["output"] for one in made] == ["a-cat_seed0.gif", "a-cat_seed1.gif"]
    assert made[1]["settings"] == media.read_metadata("a-cat_seed1.gif")
    assert set(made[0]["stages"]) == {"load", "encode", "denoise", "decode"}
    assert all(
        stage["seconds"] >= 0 and stage["peak_memory_bytes"] > 0 for stage in made[0]["stages"].values()
    )
    latents = "a-cat_seed1.gif.latents.safetensors"
    assert main(["decode", latents, "--json", "--quiet", "-o", "o.png", "--model", str(model)]) == 0
    (decoded,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert decoded["output"] == "o.png"
    assert media.read_video("o.png")[0].shape == media.read_video("a-cat_seed1.gif")[0].shape


def test_how_much_is_said(model, capfd):
    said = {}
    for loudness in ("--quiet", "--verbose", None):
        words = [word for word in (*SHORT[:4], loudness) if word]
        assert main(["generate", "a cat", "--model", str(model), *words]) == 0
        said[loudness] = capfd.readouterr().err
    assert said["--quiet"] == ""
    assert all(word in said[None] for word in ("load: ", "denoise"))
    assert "largest buffer" in said["--verbose"]  # the plan
    assert "guidance_from: 0.0" in said["--verbose"]
    assert "largest buffer" not in said[None]
    assert "guidance_from" not in said[None]


def test_a_quiet_run_that_stops_says_how_to_go_on(model, monkeypatch, capsys):
    def interrupted(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "write_video", interrupted)
    assert generate(model, "a cat") == 130
    assert "mlx-unet3d decode" in capsys.readouterr().err


def test_a_local_model_is_preferred_from_everywhere(model, capsys):
    shutil.copytree(model, "mine")
    assert main(["config", "model", "mine"]) == main(["config", "model"]) == 0
    assert capsys.readouterr().out == f"{Path('mine').absolute()}\n"


def test_motion_lora_is_another_name_of_lora():
    words = ["generate", "x", "--lora", "style", "--motion-lora", "pan", "0.8"]
    assert build_parser().parse_args(words).lora == [["style"], ["pan", "0.8"]]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--negative-prompt" in script
    assert "doctor" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", "-c", script], check=True)


def test_every_help_has_examples_that_parse(capsys):
    """Each example is a command line that the parser takes."""
    with pytest.raises(SystemExit):
        main([])
    with pytest.raises(SystemExit):
        main(["none"])
    choices = re.search(r"choose from (.*)\)", capsys.readouterr().err)[1]
    commands = re.findall(r"\w+", choices)
    assert len(commands) >= 9
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert text.startswith(f"usage: mlx-unet3d {command}")
        examples = text.partition("\nexamples:\n")[2].splitlines()
        assert examples
        for line in examples:
            words = shlex.split(line.partition(" > ")[0])
            assert words[0] == "mlx-unet3d"
            build_parser().parse_args(words[1:])


GENERATE = ["generate", "a cat", "--model", "demo"]
WRONG = {
    "command": (["genrate", "x"], "did you mean generate?"),
    "no command": ([], "COMMAND"),
    "option": ([*GENERATE, "--stesp", "3"], "did you mean --steps?"),
    "option of another name": ([*GENERATE, "--negativ_prompt", "x"], "did you mean --negative-prompt?"),
    "option of nothing": ([*GENERATE, "--qqqq"], "leave it out"),
    "option before the command": (["--steps", "3", "generate", "x"], "COMMAND"),
    "words without quotes": (["generate", "a", "red", "circle"], "in quotes"),
    "choice": ([*GENERATE, "--rng", "torhc"], "did you mean torch?"),
    "no value": ([*GENERATE, "--steps"], "write a value after it"),
    "no number": ([*GENERATE, "--steps", "many"], "'many' must be an integer"),
    "half a step": ([*GENERATE, "--steps", "2.5"], "'2.5' must be an integer"),
    "no steps": ([*GENERATE, "--steps", "0"], "at least 1"),
    "guidance": ([*GENERATE, "--guidance", "strong"], "'strong' must be a number"),
    "infinite guidance": ([*GENERATE, "--guidance", "inf"], "finite"),
    "frames": ([*GENERATE, "--num-frames", "100000"], "at most 4096"),
    "width": ([*GENERATE, "--width", "60"], "must be a multiple of 8"),
    "huge": ([*GENERATE, "--width", "1000000"], "at most"),
    "fps": ([*GENERATE, "--fps", "-1"], "above 0"),
    "seed": ([*GENERATE, "--seed", "x"], "must be an integer"),
    "large seed": ([*GENERATE, "--seed", str(2**70)], "2**64"),
    "sampler": ([*GENERATE, "--scheduler", "eulr"], "euler"),
    "suffix": ([*GENERATE, "-o", "out.avi"], ".gif"),
    "folder of the output": ([*GENERATE, "-o", "none/out.gif"], "make that folder first"),
    "empty output": ([*GENERATE, "-o", ""], "names nothing"),
    "model": (["generate", "x", "--model", "./nothing"], "nothing"),
    "memory": ([*GENERATE, "--memory", "lots"], "16GB"),
    "strength without a video": ([*GENERATE, "--strength", "0.5"], "give --video too"),
    "option of another family": ([*GENERATE, "--motion-bucket", "3"], "Stable Video Diffusion"),
    "image for a model of prompts": ([*GENERATE, "--image", "x.png"], "leave it out, or give another"),
    "video": ([*GENERATE, "--video", "none.mp4"], "none.mp4"),
    "lora": ([*GENERATE, "--lora", "none.safetensors"], "none.safetensors"),
    "weight of a lora": ([*GENERATE, "--lora", "x", "much"], "finite number"),
    "no prompt": (["generate", "--model", "demo"], "give one"),
    "replay of nothing": (["generate", "--from", "none.gif"], "none.gif"),
    "resume of nothing": (["generate", "--resume", "none.latents.safetensors"], "none.latents"),
    "two prompts": ([*GENERATE, "--prompt-file", "-"], "leave one out"),
    "no prompt file": (["generate", "--prompt-file", "none.txt"], "cannot be read"),
    "shares": ([*GENERATE, "--guidance-from", "0.9", "--guidance-to", "0.1"], "the first below"),
    "ip image": ([*GENERATE, "--ip-image", "x.png"], "AnimateDiff"),
    "quiet and verbose": ([*GENERATE, "--quiet", "--verbose"], "not allowed with"),
    "chip": (["plan", "--chip", "M9"], "M4"),
    "latents": (["decode", "none.latents.safetensors"], "none.latents"),
    "preference": (["config", "modle"], "did you mean model?"),
    "format": (["config", "format", "avi"], "gif, webp, png, mp4"),
    "shell": (["completion", "fish"], "bash"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, capsys):
    """Two lines at most, exit status 2, the cure in them, and nothing written."""
    words, cure = WRONG[name]
    try:
        status = main(words)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("no --model")]
    assert status == 2
    assert captured.out == ""
    assert "error: " in lines[0]
    assert len(lines) <= 2
    assert cure in captured.err
    assert "Traceback" not in captured.err
    assert os.listdir() == []
