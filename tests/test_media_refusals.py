"""What cannot be written or read is refused early, and nothing is left half-written."""

import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import atomic, media
from mlx_unet3d.errors import NonFiniteError
from mlx_unet3d.media import check_writable, mp4, read_metadata, read_video, to_uint8, write_video
from mlx_unet3d.media import frames as frames_module
from mlx_unet3d.media.ffmpeg import Ffmpeg
from PIL import Image
from scenes import HAS_FFMPEG, METADATA, PILLOW_NAMES, moving_scene, needs_ffmpeg

# --- to_uint8 and bad frames ----------------------------------------------------------------------


def test_to_uint8_rounds_to_the_nearest_level():
    levels = np.arange(256, dtype=np.float32) / 255
    for nudge in (-0.4 / 255, 0, 0.4 / 255):
        np.testing.assert_array_equal(to_uint8(levels + np.float32(nudge)), np.arange(256))
    assert to_uint8(np.array([0.5, 1.0, 0.0])).tolist() == [128, 255, 0]
    assert to_uint8(levels.astype(np.float64).reshape(2, 2, 64)).shape == (2, 2, 64)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_to_uint8_takes_mlx_arrays(dtype):
    assert to_uint8(mx.array([0.0, 0.25, 1.0], dtype)).tolist() == [0, 64, 255]


def test_to_uint8_refuses_what_is_no_picture():
    with pytest.raises(NonFiniteError, match="2 of 3"):
        to_uint8(np.array([0.5, np.nan, np.inf]))
    with pytest.raises(ValueError, match=r"\[-1, 0.5\].*x / 2 \+ 0.5"):
        to_uint8(np.array([-1.0, 0.5]))
    with pytest.raises(ValueError, match="255"):
        to_uint8(np.array([0.0, 255.0]))
    for other in (np.zeros(3, np.uint8), mx.zeros((3,), mx.uint8), [0.5], None):
        with pytest.raises(TypeError, match="floats in"):
            to_uint8(other)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), TypeError, r"float32.*to_uint8"),
        ([[0]], TypeError, "list"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"\(8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), ValueError, r"\(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, r"\(0, 8, 8, 3\)"),
    ],
)
def test_bad_frames(tmp_path, frames, error, message):
    with pytest.raises(error, match=message):
        write_video(tmp_path / "clip.gif", frames)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1000])
def test_bad_rates(tmp_path, fps):
    with pytest.raises(ValueError, match=r"fps=.*out of range"):
        check_writable(tmp_path / "clip.webp", fps=fps)


def test_rates_that_gif_cannot_show(tmp_path):
    check_writable(tmp_path / "clip.webp", fps=60)
    with pytest.raises(ValueError, match=r"fps=60 .* <= 50"):
        check_writable(tmp_path / "clip.gif", fps=60)
    with pytest.raises(TypeError, match="fps='8'"):
        check_writable(tmp_path / "clip.gif", fps="8")


# --- places ---------------------------------------------------------------------------------------


def test_unknown_suffix_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"'\.avi'; use \.gif, \.webp, \.png, \.apng, \.mp4"):
        check_writable(tmp_path / "clip.avi")


def test_suffix_in_capitals(tmp_path):
    path = write_video(tmp_path / "CLIP.GIF", moving_scene(2))
    assert path.read_bytes().startswith(b"GIF89a")
    assert len(read_video(path)[0]) == 2


def test_parent_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no is missing"):
        check_writable(tmp_path / "no" / "clip.gif")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_writable(tmp_path / "file" / "clip.gif")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="closed to writing"):
        check_writable(tmp_path / "clip.gif")


def test_relative_path_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("clip.gif", moving_scene(2))
    write_video("frames", moving_scene(2))
    assert sorted(os.listdir(tmp_path)) == ["clip.gif", "frames"]


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a:b.mp4", "-y.mp4", "100%d.mp4", "with space é.mp4"])
def test_names_that_ffmpeg_could_misread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, moving_scene(2))
    assert os.listdir(tmp_path) == [name]
    assert len(read_video(name)[0]) == 2


def test_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "clip.gif").mkdir()
    with pytest.raises(IsADirectoryError, match=r"clip\.gif is a folder"):
        check_writable(tmp_path / "clip.gif")
    check_writable(f"{tmp_path}/clip.gif/")  # with the slash it is meant


def test_file_with_the_name_of_a_folder(tmp_path):
    (tmp_path / "clip").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_writable(tmp_path / "clip")


@pytest.mark.parametrize("name", PILLOW_NAMES)
def test_overwriting(tmp_path, name):
    first, second = moving_scene(5), moving_scene(3, 32, 32)
    write_video(tmp_path / name, first, overwrite=False)
    with pytest.raises(FileExistsError, match="is there"):
        write_video(tmp_path / name, second, overwrite=False)
    assert len(read_video(tmp_path / name)[0]) == 5
    write_video(tmp_path / name, second)  # no frame of the longer clip stays in a folder
    assert read_video(tmp_path / name)[0].shape == second.shape
    assert os.listdir(tmp_path) == [name]


def test_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt.*empty or a new"):
        write_video(tmp_path, moving_scene(2))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_video(tmp_path / "link", moving_scene(2))
    assert (tmp_path / "link").is_symlink()
    assert len(os.listdir(tmp_path / "real")) == 2


# --- all or nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PILLOW_NAMES)
@pytest.mark.parametrize("existing", [False, True])
def test_failure_midway_leaves_what_was_there(tmp_path, monkeypatch, name, existing):
    frames = moving_scene(3)
    if existing:
        write_video(tmp_path / name, frames)
    save, calls = Image.Image.save, []

    def failing(self, file, *args, **options):
        calls.append(file)
        if name == "clip" and len(calls) < 3:
            return save(self, file, *args, **options)
        Path(file).write_bytes(b"half")
        assert len(os.listdir(tmp_path)) == 1 + existing
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        write_video(tmp_path / name, frames[:2] if name != "clip" else frames)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ([name] if existing else [])
    if existing:
        assert len(read_video(tmp_path / name)[0]) == 3


def test_failed_swap_of_folders_puts_the_old_one_back(tmp_path, monkeypatch):
    write_video(tmp_path / "clip", moving_scene(3))
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)  # as on a file system that cannot
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        write_video(tmp_path / "clip", moving_scene(2))
    assert os.listdir(tmp_path) == ["clip"]
    assert len(os.listdir(tmp_path / "clip")) == 3


def fake_ffmpeg(folder, body):
    """An executable that answers as ffmpeg with x264 does, then runs `body`."""
    folder.mkdir(exist_ok=True)
    script = folder / "ffmpeg"
    script.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if '-version' in sys.argv: print('ffmpeg version 0.1-fake of'); sys.exit()\n"
        "if '-encoders' in sys.argv: print(' V..... libx264  H.264'); sys.exit()\n" + body
    )
    script.chmod(0o755)
    return str(folder)


def test_errors_of_ffmpeg_are_shown(tmp_path, monkeypatch):
    body = (
        "open(sys.argv[-1].removeprefix('file:'), 'w').write('half')\n"
        "print('noise\\n' * 30 + 'No space left', file=sys.stderr); sys.exit(3)\n"
    )
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", body))
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match=r"status 3: (noise\n){9}No space left"):
        write_video(tmp_path / "out" / "clip.mp4", moving_scene(20, 64, 64))
    assert os.listdir(tmp_path / "out") == []


def test_ffmpeg_on_the_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", ""))
    assert mp4.find_encoder() == Ffmpeg(f"{tmp_path}/bin/ffmpeg", "0.1-fake", ("h264",))
    assert media.encoders()[".mp4"] == f"ffmpeg 0.1-fake ({tmp_path}/bin/ffmpeg): h264"


def test_no_encoder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r'brew install ffmpeg.*pip install "mlx-unet3d\[video\]"'):
        check_writable(tmp_path / "clip.mp4")
    assert media.encoders()[".mp4"] is None
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ValueError, match="needs ffmpeg"):
        read_video(tmp_path / "clip.mp4")


def test_ffmpeg_without_x264_is_named(tmp_path, monkeypatch):
    folder = fake_ffmpeg(tmp_path / "bin", "")
    script = Path(folder) / "ffmpeg"
    script.write_text(script.read_text().replace("libx264", "libx265"))
    monkeypatch.setenv("PATH", folder)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"no encoder of h264.*bin/ffmpeg lacks libx264 and can do hevc"):
        check_writable(tmp_path / "clip.mp4")


def test_encoders_of_this_machine():
    found = media.encoders()
    assert list(found) == [".gif", ".webp", ".png", ".mp4", ".mov"]
    assert found[".gif"].startswith("Pillow ")
    assert (found[".mp4"] is not None) == HAS_FFMPEG


@pytest.mark.parametrize(
    ("name", "codec", "message"),
    [
        ("clip.gif", "h264", r"a \.gif holds no h264; write \.mp4 or \.mov"),
        ("clip/", "hevc", "a folder holds no hevc"),
        ("clip.mp4", "prores", r"write \.mov, or choose h264 or hevc"),
        ("clip.mp4", "av1", "none of h264, hevc, prores"),
    ],
)
def test_codecs_that_a_file_does_not_hold(tmp_path, name, codec, message):
    with pytest.raises(ValueError, match=message):
        check_writable(f"{tmp_path}/{name}", codec=codec)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0, ValueError, "1 <= scale <= 64"),
        (65, ValueError, "1 <= scale <= 64"),
        (2.0, TypeError, "give an integer"),
        (64, ValueError, r"2 frames of 19200x128 pixels.*use scale <= 2"),
    ],
)
def test_scales_that_are_refused(tmp_path, monkeypatch, scale, error, message):
    monkeypatch.setattr(frames_module, "MAX_PIXELS", 2400)
    with pytest.raises(error, match=message):
        write_video(tmp_path / "clip.png", np.zeros((2, 2, 300, 3), np.uint8), scale=scale)
    assert os.listdir(tmp_path) == []


# --- reading what others wrote --------------------------------------------------------------------


def test_missing_and_unknown_files(tmp_path):
    for read in (read_video, read_metadata):
        with pytest.raises(FileNotFoundError, match=r"clip\.gif is missing"):
            read(tmp_path / "clip.gif")
        (tmp_path / "clip.txt").write_text("hello")
        with pytest.raises(ValueError, match=r"'\.txt'"):
            read(tmp_path / "clip.txt")
        with pytest.raises(ValueError, match=r"no \.png file"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
def test_damaged_images(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"not a picture at all")
    with pytest.raises(ValueError, match="no image that Pillow reads"):
        read_video(path)
    write_video(path, moving_scene())
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="is damaged"):
        read_video(path)


@needs_ffmpeg
def test_damaged_mp4(tmp_path):
    path = write_video(tmp_path / "clip.mp4", moving_scene(), metadata=METADATA)
    data = path.read_bytes()
    for bad in (b"", b"junk", b"\0" * 100, data[:200], data[data.index(b"mdat") :]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="no MP4 file, or cut off"):
            read_video(path)
        with pytest.raises(ValueError, match="no MP4 file, or cut off"):
            read_metadata(path)
    path.write_bytes(data.replace(b"avc1", b"????"))
    with pytest.raises(ValueError, match="ffmpeg cannot read"):
        read_video(path)
    path.write_bytes(data.replace(b"stts", b"????"))
    with pytest.raises(ValueError, match="no video track"):
        read_video(path)


def test_folder_of_others_in_the_order_of_numbers(tmp_path):
    for number in (10, 9, 1):
        Image.new("RGBA", (4, 4), (number, 0, 0, 255)).save(tmp_path / f"shot{number}.png")
    frames, fps = read_video(tmp_path)
    assert frames[:, 0, 0, 0].tolist() == [1, 9, 10]
    assert fps == 8.0
    Image.new("RGB", (5, 4)).save(tmp_path / "shot11.png")
    with pytest.raises(ValueError, match=r"4x4 and shot11\.png 5x4"):
        read_video(tmp_path)


def box(kind, *parts):
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def test_rate_of_uneven_and_long_mp4_tracks(tmp_path):
    def track(handler, version, timescale, *runs):
        times = bytes(16 if version else 8) + struct.pack(">I", timescale) + bytes(8)
        table = b"".join(struct.pack(">II", *run) for run in runs)
        table = box(b"stts", bytes(4), struct.pack(">I", len(runs)), table)
        return box(
            b"trak",
            box(
                b"mdia",
                box(b"mdhd", bytes([version, 0, 0, 0]), times),
                box(b"hdlr", bytes(8), handler, bytes(12)),
                box(b"minf", box(b"stbl", table)),
            ),
        )

    path = tmp_path / "clip.mov"
    sound = track(b"soun", 0, 48_000, (100, 1024))
    for version in (0, 1):
        picture = track(b"vide", version, 600, (3, 20), (1, 40))
        filler = struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + bytes(5)  # 64-bit size
        path.write_bytes(box(b"ftyp", b"qt  ") + filler + box(b"moov", sound, picture))
        assert mp4.video_rate(path) == Fraction(600 * 4, 100)
    path.write_bytes(box(b"moov", sound))
    with pytest.raises(ValueError, match="no video track"):
        mp4.video_rate(path)
    path.write_bytes(box(b"moov", box(b"trak", box(b"mdia", box(b"hdlr", bytes(8), b"vide")))))
    with pytest.raises(ValueError, match="no video track"):
        mp4.video_rate(path)


@needs_ffmpeg
def test_mov_of_another_program(tmp_path):
    frames = moving_scene(6)
    path = write_video(tmp_path / "clip.mp4", frames, fps=Fraction(24000, 1001))
    ffmpeg = mp4.find_encoder().executable
    mov = tmp_path / "clip.MOV"
    subprocess.run([ffmpeg, "-loglevel", "error", "-i", path, "-c", "copy", mov], check=True)
    back, fps = read_video(mov)
    assert back.shape == frames.shape
    assert fps == 24000 / 1001
