"""Runs that are killed, or meet a full disk: resumed to the same pixels, or the old file is whole.

A child does the work and ends itself at a seeded event among all openings, renames and removals of files in
its folder, so that nothing here depends on time. MLX_UNET3D_KILLS says how often each command is ended, once
by default; from 2 on, all families are tried.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from mlx_unet3d import media
from mlx_unet3d.checkpoints import load_tensors
from mlx_unet3d.cli import main
from PIL import Image

KILLS = int(os.environ.get("MLX_UNET3D_KILLS", "1"))
ENDS = ["SIGKILL", "SIGTERM", "SIGHUP", "ENOSPC"]

CHILD = """
import errno, os, signal, sys
end, at = sys.argv[1], int(sys.argv[2])
import mlx_unet3d
from mlx_unet3d.cli import keeping, main
keeping.EVERY_SECONDS, keeping._SHARE = 0, 1e9
here = os.getcwd()
count, is_full = 0, False

def watch(event, arguments):
    global count, is_full
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") or not arguments:
        return
    path = arguments[0]
    if not isinstance(path, (str, bytes)) or not os.path.abspath(os.fsdecode(path)).startswith(here + os.sep):
        return
    count += 1
    writes = event == "os.mkdir" or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if is_full and writes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if count != at:
        return
    if end == "ENOSPC":
        is_full = True
    else:
        os.kill(os.getpid(), getattr(signal, end))

sys.addaudithook(watch)
status = main(sys.argv[3:])
print("events", count)
sys.exit(status)
"""


def child(end, at, *arguments):
    environment = os.environ | {"TMPDIR": os.getcwd() + "-tmp"}
    command = [sys.executable, "-c", CHILD, end, str(at), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def moments(command, kind):
    """Ends of a command, each as signal and number of the event."""
    done = child("none", -1, *command)
    assert done.returncode == 0, done.stderr
    total = int(done.stdout.rsplit("events", 1)[1])
    rng = random.Random(kind)
    picked = rng.sample(range(1, total + 1), min(KILLS, total))
    return [(ENDS[(i + rng.randrange(4)) % 4], at) for i, at in enumerate(picked)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of each family, and a picture and a video to start from."""
    place = tmp_path_factory.mktemp("inputs")
    tiny.write_pipeline(place / "text")
    tiny.write_stable_diffusion(place / "base", place / "motion")
    tiny.write_stable_video(place / "svd")
    tiny.write_i2vgen_xl(place / "i2v")
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    media.write_video(place / "in.gif", frames, fps=8)
    Image.fromarray(frames[0]).save(place / "in.png")
    return place


@pytest.fixture
def model(inputs):
    return inputs / "text"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Makes a folder anew and goes there; temporary files have one beside."""
    made = []

    def enter():
        path = tmp_path / f"work{len(made)}"
        path.mkdir()
        Path(f"{path}-tmp").mkdir()
        made.append(path)
        monkeypatch.chdir(path)

    return enter


def expected_status(done, end):
    numbers = {name: -getattr(signal, name) for name in ENDS[:1]}
    numbers |= {name: 128 + getattr(signal, name) for name in ENDS[1:3]}
    return done.returncode in (0, numbers.get(end, 2))


# The files of a command line, and the rest of it. The first sampler draws noise in each step.
FAMILIES = {
    "text": ({"model": "text"}, ["x", "--num-frames", "2", "--scheduler", "dpm++-sde"]),
    "video": ({"model": "text", "video": "in.gif"}, ["x"]),
    "motion": ({"model": "base", "motion-adapter": "motion"}, ["x", "--num-frames", "2"]),
    "motion-video": ({"model": "base", "motion-adapter": "motion", "video": "in.gif"}, ["x"]),
    "svd": ({"model": "svd", "image": "in.png"}, []),
    "i2v": ({"model": "i2v", "image": "in.png"}, ["x", "--scheduler", "euler-a"]),
}


@pytest.mark.parametrize("family", FAMILIES if KILLS > 1 else ("text", "svd"))
def test_generate(inputs, place, family):
    files, rest = FAMILIES[family]
    files = [word for name, file in files.items() for word in (f"--{name}", str(inputs / file))]
    command = ["generate", "-o", "out.png", "--steps", "5", "--seed", "3", *rest, *files]
    place()
    chosen = moments(command, f"generate {family}")
    assert os.listdir() == ["out.png"]
    right, _ = media.read_video("out.png")
    for end, at in chosen:
        place()
        done = child(end, at, *command)
        assert expected_status(done, end), done.stderr
        assert "Traceback" not in done.stderr
        left = sorted(Path(f"{os.getcwd()}-tmp").glob("*.safetensors"))
        left = [Path("out.png.latents.safetensors")] * Path("out.png.latents.safetensors").exists() or left
        if left and not Path("out.png").exists():
            resume = ["generate", "--resume", str(left[0]), "-o", "out.png", *files]
            assert main(resume) == 0, (end, at)
        elif not Path("out.png").exists():
            assert "stopped after" not in done.stderr
            assert main([*map(str, command), "--overwrite"]) == 0
        assert np.array_equal(media.read_video("out.png")[0], right), (end, at)
        if left:  # cut off after the video was written, the latents are left
            left[0].unlink(missing_ok=True)
        assert {name for name in os.listdir() if not name.endswith(".lock")} == {"out.png"}, (end, at)


def test_decode(model, place):
    settings = ["--num-frames", "2", "--steps", "2", "--model", str(model), "--keep-latents"]
    latents = "new.png.latents.safetensors"
    place()
    assert main(["generate", "x", "-o", "old.png", *settings]) == 0
    assert main(["generate", "x", "-o", "new.png", "--seed", "1", *settings]) == 0
    files = {name: Path(name).read_bytes() for name in ("old.png", "new.png", latents)}
    command = ["decode", latents, "-o", "out.png", "--overwrite", "--model", model]
    for end, at in moments(command, "decode"):
        place()
        Path(latents).write_bytes(files[latents])
        Path("out.png").write_bytes(files["old.png"])
        done = child(end, at, *command)
        assert expected_status(done, end), done.stderr
        assert Path("out.png").read_bytes() in (files["old.png"], files["new.png"]), (end, at)
        assert Path(latents).read_bytes() == files[latents]
        assert main([*map(str, command)]) == 0
        assert Path("out.png").read_bytes() == files["new.png"]
        assert sorted(os.listdir()) == [latents, "out.png"]


def test_convert(model, place):
    def weights(folder):
        found = {}
        for path in sorted(Path(folder).rglob("*.safetensors")):
            for name, array in load_tensors(path).items():
                found[f"{path.parent.name}/{name}"] = (str(array.dtype), np.array(array))
        return found

    def is_one_of(folder, *others):
        now = weights(folder)
        return any(
            now.keys() == other.keys()
            and all(now[k][0] == other[k][0] and np.array_equal(now[k][1], other[k][1]) for k in now)
            for other in others
        )

    command = ["convert", "--hf-path", str(model), "--mlx-path", "out"]
    place()
    assert main(command) == 0
    old = weights("out")
    again = [*command, "--dtype", "float16", "--force"]
    chosen = moments(again, "convert")
    new = weights("out")
    assert not is_one_of("out", old)
    for end, at in chosen:
        place()
        assert main(command) == 0
        done = child(end, at, *again)
        assert expected_status(done, end), done.stderr
        assert is_one_of("out", old, new), (end, at)
        assert main(again) == 0
        assert is_one_of("out", new)
        assert os.listdir() == ["out"]
