"""The files that the command reads and leaves: names, places, owners, and more than one run at a time."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, VideoToVideoPipeline, atomic, media
from mlx_unet3d.atomic import claim, whole_file
from mlx_unet3d.cli import generate as generate_command
from mlx_unet3d.cli import keeping, main
from mlx_unet3d.cli.keeping import Keeper
from mlx_unet3d.errors import CheckpointError, printable
from mlx_unet3d.latents import load_latents, save_latents
from mlx_unet3d.models.autoencoder_kl import AutoencoderKL
from mlx_unet3d.pipelines import DenoisingStep
from mlx_unet3d.pipelines.video_to_video import as_pixels
from PIL import Image

LATENTS = "out.png.latents.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("secret_owner") / "tinymodel")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(model, *arguments):
    short = ["--num-frames", "2", "--steps", "2"]
    return main(["generate", "x", "--model", str(model), *short, *map(str, arguments)])


def kept(model, output="out.png", **changes):
    """A file of finished latents, as a run of `model` leaves it."""
    settings = dict(prompt="x", model=str(model), num_frames=2, height=32, width=32, steps=2, dtype="float32")
    latents = mx.random.normal((1, 4, 2, 4, 4), key=mx.random.key(0))
    save_latents(f"{output}.latents.safetensors", latents, settings | changes)


# Names of outputs.


def test_decode_overwrites_only_when_asked(model, capsys):
    kept(model)
    Path("out.png").write_text("thesis")
    arguments = ["decode", LATENTS, "--model", str(model)]
    assert main(arguments) == 2
    assert "out.png is there" in capsys.readouterr().err
    assert Path("out.png").read_text() == "thesis"
    assert main([*arguments, "--overwrite"]) == 0
    assert media.read_video("out.png")[0].shape == (2, 32, 32, 3)


@pytest.mark.parametrize("output", ["", " ", ".", "..", "/", "./"])
def test_outputs_that_name_nothing(model, capsys, output):
    """They used to write video.gif, or to take the place of the current folder."""
    kept(model)
    for command in (["decode", LATENTS], ["generate", "x"]):
        try:
            status = main([*command, "--model", str(model), "-o", output])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert "error: " in capsys.readouterr().err
    assert os.listdir() == [LATENTS]


def test_long_names(model, capsys):
    """200 bytes work, also for the latents and all temporary files; too many are refused before the work."""
    name = "x" * 196 + ".png"
    assert generate(model, "-o", name, "--keep-latents") == 0
    assert sorted(os.listdir()) == [name, f"{name}.latents.safetensors"]
    capsys.readouterr()
    for longer in (240, 260):
        assert generate(model, "-o", "x" * (longer - 4) + ".png") == 2
        error = capsys.readouterr().err
        assert "give a shorter one" in error
        assert "load" not in error
    assert len(os.listdir()) == 2


def test_place_that_cannot_be_written_is_found_before_the_work(model, monkeypatch, capsys):
    """As on a share that says one thing and does another."""
    write = Path.write_bytes

    def failing(self, data):
        if ".partial" in self.name:
            raise OSError(30, "Read-only file system")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    assert generate(model, "-o", "out.png") == 2
    error = capsys.readouterr().err
    assert "nothing can be written to" in error
    assert "Read-only file system" in error
    assert "denoise" not in error
    assert not os.listdir()


# Files of strangers.


def test_model_of_a_file_is_named_and_lies_in_the_current_folder(model, capsys):
    kept(model)
    media.write_video(
        "v.png", np.zeros((2, 8, 8, 3), np.uint8), metadata={"prompt": "x", "model": str(model)}
    )
    commands = (
        ["decode", LATENTS, "-o", "a.png"],
        ["generate", "--resume", LATENTS],
        ["generate", "--from", "v.png"],
    )
    for command in commands:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"names the model {model}, which is not in the current folder" in error
        assert "load" not in error
    Path("link").symlink_to(model)
    kept("link")
    assert main(["decode", LATENTS, "-o", "a.png"]) == 2  # links are followed
    os.unlink("link")
    os.symlink(model, "elsewhere")
    assert not Path("a.png").exists()
    tiny.write_pipeline(Path("here"))
    kept("here")
    assert main(["decode", LATENTS, "-o", "a.png"]) == 0
    error = capsys.readouterr().err
    assert error.index("model: here, named by out.png.latents.safetensors") < error.index("load: ")


def test_videos_carry_no_path(model, tmp_path):
    """Of the model, a LoRA and the input video only names and checksums; only the latents have paths."""
    pipe = TextToVideoPipeline.from_pretrained(model)
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("to_q"))
    outputs, inputs = layer.weight.shape
    key = f"unet.{name}.lora_"
    tensors = {f"{key}A.weight": mx.ones((1, inputs)), f"{key}B.weight": mx.ones((outputs, 1))}
    folder = tmp_path / "secret_folder"
    folder.mkdir()
    mx.save_safetensors(str(folder / "cat.safetensors"), tensors)
    media.write_video(folder / "in.png", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    arguments = ["--video", folder / "in.png", "--lora", folder / "cat.safetensors", "0.5"]
    for output in ("out.png", "out.gif", "out.webp", "frames/"):
        assert generate(model, "-o", output, "--keep-latents", *arguments) == 0
        found = media.read_metadata(output)
        assert (found["model"], found["video"]) == ("tinymodel", "in.png")
        assert json.loads(found["lora"]) == [["cat.safetensors", 0.5]]
        assert len(found["video_frames"]) == 16
        assert "secret" not in json.dumps(found)
        file = Path(output) / "00000.png" if output.endswith("/") else Path(output)
        assert b"secret" not in file.read_bytes()
        latents = Path(output.rstrip("/") + ".latents.safetensors")
        assert stat.S_IMODE(latents.stat().st_mode) == 0o600
        assert load_latents(latents)[1]["model"] == str(model)
    # Given again by hand, or found by name in the current folder, they make the same video.
    again = ["generate", "--from", "out.png", "-o", "again.png", "--model", str(model)]
    assert main([*again, *map(str, arguments)]) == 0
    assert np.array_equal(media.read_video("again.png")[0], media.read_video("out.png")[0])
    assert media.read_metadata("again.png") == media.read_metadata("out.png")
    for name in ("cat.safetensors", "in.png"):
        (folder / name).rename(name)
    assert main([*again, "--overwrite"]) == 0
    assert np.array_equal(media.read_video("again.png")[0], media.read_video("out.png")[0])


def test_another_input_video_is_noticed(model, capsys):
    for name, seed in (("in.png", 0), ("other.png", 1)):
        media.write_video(name, np.random.default_rng(seed).integers(0, 256, (2, 32, 32, 3), np.uint8))
    assert generate(model, "-o", "out.png", "--video", "in.png") == 0
    again = ["generate", "--from", "out.png", "--model", str(model), "-o", "again.png"]
    assert main([*again, "--video", "other.png"]) == 0
    assert "are not those of the replayed video" in capsys.readouterr().err


def test_names_of_files_are_escaped():
    assert printable("a\x1b[2J\n\u202e\ud800é ") == "a\\x1b[2J\\n\\u202e\\ud800é "
    assert str(CheckpointError("x\x07\ny\r")) == "x\\x07\ny\\r"


# More than one run at a time.


def test_two_runs_of_one_name(model, capsys):
    with claim(Path(LATENTS)):
        held = [
            sys.executable,
            "-c",
            "import sys; from mlx_unet3d.cli import main; sys.exit(main(sys.argv[1:]))",
            *("generate", "x", "--model", str(model), "-o", "out.png"),
        ]
        done = subprocess.run(held, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"another process is writing {LATENTS}" in done.stderr
    assert not os.listdir()
    assert generate(model, "-o", "out.png") == 0


def test_claims_end_with_their_process():
    """Also where it was killed and its lock file is still there."""
    script = (
        "import os; from pathlib import Path; from mlx_unet3d.atomic import claim\n"
        "with claim(Path('a')): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert os.listdir() == [".a.lock"]
    with claim(Path("a")):
        assert os.listdir() == [".a.lock"]
    assert not os.listdir()


def test_folders_change_places_in_one_step(monkeypatch):
    """Nothing is moved aside, where a reader or a kill would find no folder at all."""
    renamed = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: renamed.append(self.name) or rename(self, to))
    for text in ("old", "new"):
        with atomic.whole_folder(Path("out")) as partial:
            (partial / "a").write_text(text)
    assert Path("out/a").read_text() == "new"
    assert len(renamed) == 1  # the first, in whose place there was nothing
    assert os.listdir() == ["out"]


# Kept runs.


def record(i, total=4):
    array = mx.full((1, 4, 2, 4, 4), float(i))
    return DenoisingStep(i, total, 0.0, array, array, array)


def test_steps_are_kept_as_they_are_made(monkeypatch):
    monkeypatch.setattr(keeping, "EVERY_SECONDS", 0)
    monkeypatch.setattr(keeping, "_SHARE", 1e9)
    keeper = Keeper(Path(LATENTS), {"seed": 1})
    for i in range(3):
        keeper.step(record(i))
        latents, settings, predictions = load_latents(LATENTS)
        assert settings == {"seed": 1, "steps_done": i + 1}
        assert [p.max().item() for p in predictions] == list(range(i + 1))
        assert latents.max().item() == i
    keeper.finish(mx.zeros((1, 4, 2, 4, 4)))
    assert load_latents(LATENTS)[2] == []
    keeper.clear()
    assert not os.listdir()


def test_what_is_kept_never_becomes_less(monkeypatch):
    """A resumed run goes through the steps that it was given without writing them anew."""
    monkeypatch.setattr(keeping, "EVERY_SECONDS", 0)
    steps = [record(i) for i in range(3)]
    save_latents(LATENTS, steps[1].denoised, {"steps_done": 2}, [s.prediction for s in steps[:2]])
    before = Path(LATENTS).read_bytes()
    keeper = Keeper(Path(LATENTS), {}, [s.prediction for s in steps[:2]], Path(LATENTS))
    for step in steps[:2]:
        keeper.step(step)
        keeper.stop()
        assert Path(LATENTS).read_bytes() == before
    keeper.step(steps[2])
    keeper.stop()
    assert len(load_latents(LATENTS)[2]) == 3


def test_full_disk_does_not_end_a_run(monkeypatch, tmp_path, capsys):
    """The last file stays, and at the end the folder for temporary files is tried."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(keeping.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(keeping, "EVERY_SECONDS", 0)
    monkeypatch.setattr(keeping, "_SHARE", 1e9)
    keeper = Keeper(Path(LATENTS), {})
    keeper.step(record(0))
    save = keeping.save_latents

    def full(path, *rest):
        if Path(path).parent == Path():
            raise OSError(28, "No space left on device")
        save(path, *rest)

    monkeypatch.setattr(keeping, "save_latents", full)
    keeper.step(record(1))
    keeper.step(record(2))
    assert capsys.readouterr().err.count("the run goes on") == 1
    assert len(load_latents(LATENTS)[2]) == 1
    keeper.stop()
    assert f"--resume {tmp_path}/tmp/{LATENTS}" in capsys.readouterr().err
    assert len(load_latents(tmp_path / "tmp" / LATENTS)[2]) == 3


def test_resume_of_finished_latents_makes_the_video(model, monkeypatch):
    """After a kill of the decoder."""

    def fail(self, z, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "decode", fail)
        assert generate(model, "-o", "out.png", "--memory", "off") == 1
    assert os.listdir() == [LATENTS]
    assert main(["generate", "--resume", LATENTS, "--model", str(model)]) == 0
    assert os.listdir() == ["out.png"]
    assert generate(model, "-o", "right.png") == 0
    assert np.array_equal(media.read_video("out.png")[0], media.read_video("right.png")[0])


def test_private_file_is_private_from_the_start():
    with whole_file(Path("a"), private=True) as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600


# Sizes.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--width", "1000000", "--vae-tiling"],
        ["--num-frames", "100000"],
        ["--height", "16384", "--width", "16384", "--num-frames", "4096"],
        ["--steps", "9" * 30],
    ],
)
def test_absurd_sizes_are_refused_at_once(model, monkeypatch, capsys, arguments):
    monkeypatch.setattr(generate_command, "load", lambda *_: pytest.fail("it loads the model"))
    try:
        status = generate(model, *arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert "at most" in (error := capsys.readouterr().err) or "more than 2.1" in error


def test_videos_of_any_size(model, capsys):
    """The encoder leaves out what multiples of 8 leave over; the command says so, and replays it."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 43, 37, 3), np.uint8)
    media.write_video("in.png", frames)
    assert generate(model, "-o", "out.png", "--video", "in.png", "--steps", "4") == 0
    assert "in.png: frames of 37x43 become 32x40, multiples of 8" in capsys.readouterr().err
    made, _ = media.read_video("out.png")
    assert made.shape == (2, 40, 32, 3)
    pipe = VideoToVideoPipeline.from_pretrained(model)
    expected = media.to_uint8(pipe("x", frames, num_inference_steps=4).frames[0])
    assert np.array_equal(made, expected)
    again = ["generate", "--from", "out.png", "-o", "again.png", "--model", str(model)]
    assert main(again) == 0
    assert np.array_equal(media.read_video("again.png")[0], made)


# What diffusers takes.


def test_frames_in_any_form():
    array = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    images = [Image.fromarray(frame) for frame in array]
    forms = [
        array,
        array[None],
        list(array),
        images,
        tuple(images),
        [images],
        [array],
        [list(array)],
        [array[None]],
    ]
    for form in forms:
        np.testing.assert_array_equal(as_pixels(form), array[None].astype(np.float32) / 255)
    np.testing.assert_array_equal(as_pixels([images, images]), as_pixels(np.stack([array, array])))
    with pytest.raises(ValueError, match="differ in shape"):
        as_pixels([images, images[:2]])
    for form in (images, list(array)):
        media.write_video("out.png", form, fps=np.float32(5), metadata={"seed": np.int64(3)})
        np.testing.assert_array_equal(media.read_video("out.png")[0], array)
        assert media.read_metadata("out.png") == {"seed": 3}


def test_numbers_and_arrays_of_numpy(model):
    pipe = TextToVideoPipeline.from_pretrained(model)
    settings = dict(num_frames=2, num_inference_steps=2, guidance_scale=2.0, seed=3, eta=0.5, clip_skip=1)
    numpy = {
        name: (np.float32 if isinstance(value, float) else np.int64)(value)
        for name, value in settings.items()
    }
    latents = np.random.default_rng(0).normal(size=(1, 4, 2, 4, 4)).astype(np.float32)
    expected = pipe("x", latents=mx.array(latents), **settings).frames
    np.testing.assert_array_equal(pipe("x", latents=latents, **numpy).frames, expected)
    states = np.zeros((1, 5, 12), np.float32)
    plain = dict(num_frames=2, num_inference_steps=1, guidance_scale=1.0)
    expected = pipe(prompt_embeds=mx.array(states), **plain).frames
    np.testing.assert_array_equal(pipe(prompt_embeds=states, **plain).frames, expected)
    two = pipe(["x", "y"], seed=np.array([1, 2]), **plain).frames
    np.testing.assert_array_equal(two, pipe(["x", "y"], seed=[1, 2], **plain).frames)


def test_dtype_on_a_cpu_is_single(model, tmp_path):
    half = TextToVideoPipeline.from_pretrained(model, dtype=mx.float16)
    half.unet.save_pretrained(tmp_path / "half")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        os.symlink(model / name, tmp_path / "copy" / name)
    (tmp_path / "half").rename(tmp_path / "copy" / "unet")
    expected = mx.float32 if mx.default_device() == mx.cpu else mx.float16
    assert TextToVideoPipeline.from_pretrained(tmp_path / "copy").unet.dtype == expected


# No backend.


@pytest.mark.parametrize("arguments", [["--version"], ["doctor"], ["generate", "x"], ["convert"], ["--help"]])
@pytest.mark.parametrize("module", ["mlx_unet3d", "convert"])
def test_without_a_backend(tmp_path, module, arguments):
    """As after `pip install .` on Linux: mlx is there and cannot be imported."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(
        "raise ImportError('libmlx.so: cannot open shared object file')"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("mlx-unet3d: error: MLX cannot be loaded (libmlx.so")
    assert "pip install" in line
