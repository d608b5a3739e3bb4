"""What the command makes of finished frames: their scale and codec in the file."""

import json

import numpy as np
import pytest
import tiny
from mlx_unet3d import media
from mlx_unet3d.cli import main
from mlx_unet3d.media import mp4
from scenes import needs_ffmpeg


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_UNET3D_CONFIG", str(tmp_path / "config.toml"))


def generate(model, *arguments):
    short = ["--num-frames", "2", "--steps", "1", "--memory", "off", "--quiet"]
    return main(["generate", "a cat", "--model", str(model), *short, *arguments])


def test_scale_is_replayed_and_the_size_stays_true(model):
    assert generate(model, "-o", "plain.png") == 0
    assert generate(model, "-o", "large.png", "--scale", "3", "--keep-latents") == 0
    assert main(["generate", "--from", "large.png", "-o", "again.png", "--model", str(model), "--quiet"]) == 0
    latents = "large.png.latents.safetensors"
    words = ["--model", str(model), "--quiet", "-o", "decoded.png", "--scale", "2"]
    assert main(["decode", latents, *words]) == 0
    plain = media.read_video("plain.png")[0]
    for name, scale in (("large.png", 3), ("again.png", 3), ("decoded.png", 2)):
        expected = np.kron(plain, np.ones((1, scale, scale, 1), np.uint8))
        np.testing.assert_array_equal(media.read_video(name)[0], expected)
        found = media.read_metadata(name)
        assert [found[key] for key in ("scale", "height", "width")] == [scale, 32, 32]


def test_too_large_a_scale_is_refused_before_the_work(model, monkeypatch, capsys):
    monkeypatch.setattr(media.frames, "MAX_PIXELS", 100 * 100)
    assert generate(model, "-o", "out.png", "--scale", "4") == 2
    assert "use scale <= 3" in capsys.readouterr().err


@needs_ffmpeg
def test_codec_names_the_file_and_is_replayed(model, capsys):
    """Without -o in a file that holds it; a replay into a file that does not hold it leaves it out."""
    able = mp4.find_encoder().codecs
    for codec, suffix in (("h264", "mp4"), ("hevc", "mp4"), ("prores", "mov")):
        if codec not in able:
            continue
        assert generate(model, "--codec", codec, "--json") == 0
        made = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert made["output"].endswith(suffix)
        assert media.read_metadata(made["output"])["codec"] == codec
        words = ["generate", "--from", made["output"], "--model", str(model), "--quiet"]
        assert main([*words, "-o", f"{codec}.gif"]) == 0
        assert media.read_metadata(f"{codec}.gif")["codec"] is None
        assert main([*words, "-o", "again.mov", "--overwrite"]) == 0
        assert media.read_metadata("again.mov")["codec"] == codec


def test_codec_that_a_file_does_not_hold(model, capsys):
    assert generate(model, "--codec", "h264", "-o", "out.gif") == 2
    assert "a .gif holds no h264; write .mp4 or .mov" in capsys.readouterr().err
