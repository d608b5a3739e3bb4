"""What the command shows of frames: previews while they form, and their scale and codec in the file."""

import base64
import io
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
from contextlib import contextmanager
from fcntl import ioctl

import numpy as np
import pytest
import tiny
from mlx_unet3d import media
from mlx_unet3d.cli import main
from mlx_unet3d.cli.preview import Screen, protocol
from mlx_unet3d.media import mp4
from PIL import Image
from scenes import needs_ffmpeg


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_UNET3D_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("TERM_PROGRAM", "KITTY_WINDOW_ID", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


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


# --- previews -------------------------------------------------------------------------------------


@contextmanager
def terminal(rows=24, columns=80):
    """A terminal to write to, and a list that gets what was written once it is closed."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    written, parts = [], []

    def read():
        while select.select([master], [], [], 60)[0]:
            try:
                part = os.read(master, 2**16)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(slave, "w", encoding="utf-8")
    try:
        yield stream, written
    finally:
        stream.close()
        reader.join()
        os.close(master)
        written.append(b"".join(parts).decode().replace("\r\n", "\n"))


PICTURE = np.zeros((4, 8, 3), np.uint8)
PICTURE[:2] = (255, 0, 0)
PICTURE[2:] = (0, 0, 255)

PROTOCOLS = [
    (dict(TERM="xterm-256color"), "blocks"),
    (dict(TERM="xterm-kitty"), "kitty"),
    (dict(TERM="xterm", KITTY_WINDOW_ID="1"), "kitty"),
    (dict(TERM="xterm-256color", TERM_PROGRAM="iTerm.app"), "iterm2"),
    (dict(TERM="xterm-256color", TERM_PROGRAM="Apple_Terminal"), "blocks"),
    (dict(TERM="tmux-256color", KITTY_WINDOW_ID="1"), "blocks"),
    (dict(TERM="dumb"), None),
    (dict(), None),
]


@pytest.mark.parametrize(("environment", "how"), PROTOCOLS)
def test_protocol_of_a_terminal(environment, how, tmp_path):
    with terminal() as (stream, _):
        assert protocol(stream, environment) == how
    with open(tmp_path / "file", "w", encoding="utf-8") as file:
        assert protocol(file, environment) is None


def test_half_blocks_draw_the_picture(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((9, 24)))
    for bits, red, blue in ((24, "2;255;0;0", "2;0;0;255"), (8, "5;196", "5;21")):
        with terminal() as (stream, written):
            screen = Screen(stream, "blocks", bits)
            screen.show(PICTURE)
            screen.show(PICTURE)
            screen.close()
        cells = re.findall(r"\x1b\[38;([\d;]+);48;([\d;]+)m\u2580", written[0])
        assert cells == ([(red, red)] * 8 + [(blue, blue)] * 8) * 2
        moves = re.findall(r"\x1b\[(\d+)([AB])", written[0])
        assert moves == [("2", "A"), ("2", "B"), ("2", "A"), ("2", "B"), ("2", "A")]
        assert written[0].endswith("\x1b[J")


@pytest.mark.parametrize("how", ["kitty", "iterm2"])
def test_pictures_of_terminals(how):
    picture = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    with terminal() as (stream, written):
        screen = Screen(stream, how)
        screen.show(picture)
        screen.close()
    if how == "kitty":
        chunks = re.findall(r"\x1b_G(.*?)m=([01]);(.*?)\x1b\\", written[0])
        assert [more for _, more, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
        assert max(len(text) for *_, text in chunks) <= 4096
        assert "a=T,f=100,q=2," in chunks[0][0]
        assert "a=d,d=I" in written[0]
        data = "".join(text for *_, text in chunks)
    else:
        data = re.search(r"\x1b\]1337;File=inline=1;size=\d+;width=32;height=16.*?:(.*?)\x07", written[0])[1]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(image, picture.repeat(2, 0).repeat(2, 1))


def test_preview_changes_no_result(model, monkeypatch):
    assert generate(model, "-o", "plain.png") == 0
    with terminal() as (stream, written), monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        words = ["generate", "a cat", "--model", str(model), "--num-frames", "2", "--steps", "1"]
        assert main([*words, "--preview", "--preview-file", "guess.gif", "-o", "shown.png"]) == 0
    assert "\u2580" in written[0]
    np.testing.assert_array_equal(media.read_video("shown.png")[0], media.read_video("plain.png")[0])
    assert media.read_metadata("shown.png") == media.read_metadata("plain.png")


def test_quiet_shows_no_preview(model, monkeypatch):
    with terminal() as (stream, written), monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        assert generate(model, "-o", "out.png", "--preview") == 0
    assert written == [""]


@pytest.mark.parametrize("name", ["guess.gif", "guess.webp"])
def test_preview_file(model, name):
    """It shows the finished video at the end, and stays."""
    assert generate(model, "-o", "out.png", "--preview-file", name) == 0
    guess, video = media.read_video(name)[0], media.read_video("out.png")[0]
    assert guess.shape == (2, 128, 128, 3)
    assert len(video) == 2
    assert sorted(os.listdir()) == sorted(["cache", name, "out.png"])
    assert generate(model, "-o", "out.png", "--preview-file", name) == 2  # is there


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("guess.mp4", "must end in .gif or .webp"),
        ("./out.gif", "is the video itself"),
        ("none/guess.gif", "make that folder first"),
    ],
)
def test_preview_files_that_are_refused(model, capsys, path, message):
    assert generate(model, "-o", "out.gif", "--preview-file", path) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == []


def test_a_preview_that_fails_does_not_end_the_run(model, monkeypatch, capsys):
    def full(*_arguments):
        raise OSError("no space")

    monkeypatch.setattr("mlx_unet3d.cli.preview.Previews.__call__", full)
    words = ["generate", "a cat", "--model", str(model), "--num-frames", "2", "--steps", "2"]
    assert main([*words, "--preview-file", "guess.gif", "-o", "out.png"]) == 0
    assert capsys.readouterr().err.count("the run goes on without a preview: no space") == 1
