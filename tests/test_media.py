"""Every format is written, read back and compared: pixels, times, metadata."""

import os
import re
import subprocess

import numpy as np
import pytest
from mlx_unet3d.media import check_writable, mp4, read_metadata, read_video, write_video
from mlx_unet3d.media.frames import durations, even_rate
from mlx_unet3d.media.gif import quantize
from PIL import Image
from scenes import METADATA, NAMES, PILLOW_NAMES, mean_error, moving_scene, needs_ffmpeg, psnr

# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_frames_rate_and_metadata_come_back(tmp_path, name):
    frames = moving_scene()
    path = write_video(tmp_path / name, frames, fps=12.5, metadata=METADATA)
    assert path == tmp_path / name
    back, fps = read_video(path)
    assert back.dtype == np.uint8
    assert back.shape == frames.shape
    assert fps == 12.5
    back[0, 0, 0, 0] = 0  # own memory
    assert read_metadata(path) == METADATA
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["clip.png", "clip.apng", "clip", "frames.v2/"])
def test_png_is_exact(tmp_path, name):
    frames = moving_scene(height=47, width=63)
    back, _ = read_video(write_video(f"{tmp_path}/{name}", frames))
    np.testing.assert_array_equal(back, frames)


def test_webp_is_near(tmp_path):
    frames = moving_scene()
    back, _ = read_video(write_video(tmp_path / "clip.webp", frames))
    assert psnr(back, frames) > 34


def test_gif_is_near_and_stands_still(tmp_path):
    frames = moving_scene()
    back, _ = read_video(write_video(tmp_path / "clip.gif", frames))
    assert mean_error(back, frames) < 5

    def blurred(x):
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (4, 4), (1, 2))
        return windows.mean((-1, -2))

    assert mean_error(blurred(back), blurred(frames)) < 2
    unchanged = (frames[1:] == frames[:-1]).all(-1)
    assert unchanged.sum() > 1000
    assert (back[1:] == back[:-1]).all(-1)[unchanged].all()


def test_gif_has_one_palette(tmp_path):
    data = write_video(tmp_path / "clip.gif", moving_scene()).read_bytes()
    assert data[10] & 0x87 == 0x87  # a table for the whole file, 256 colours
    at, images = 13 + 3 * 256, 0
    while data[at] != 0x3B:  # the end
        if data[at] == 0x2C:  # an image
            images += 1
            assert not data[at + 9] & 0x80  # no table of its own
            at += 11
        else:
            assert data[at] == 0x21  # an extension
            at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1
    assert images == 6


@pytest.mark.parametrize("count", [1, 3, 255, 256])
def test_gif_of_few_colours_is_exact(tmp_path, count):
    colours = np.random.default_rng(1).integers(0, 256, (count, 3), dtype=np.uint8)
    frames = colours[np.random.default_rng(2).integers(0, count, (5, 40, 30))]
    frames[:, :9, :9] = colours[0]
    back, _ = read_video(write_video(tmp_path / "clip.gif", frames))
    np.testing.assert_array_equal(back, frames if count > 1 else frames[:1])  # one still picture


def test_quantize_keeps_indices_below_256_colours():
    frames = moving_scene(2)
    palette, indices = quantize(frames)
    assert palette.shape == (256, 3)
    assert indices.shape == frames.shape[:3]
    assert len(np.unique(indices)) > 200  # the palette is used


def ffmpeg(*arguments):
    return subprocess.run([mp4.find_encoder().executable, "-hide_banner", *arguments], capture_output=True)


KINDS = [
    ("clip.mp4", "h264", "h264 (High) (avc1", "yuv420p(tv, bt709, progressive)"),
    ("clip.mov", "h264", "h264 (High) (avc1", "yuv420p(tv, bt709, progressive)"),
    ("clip.mp4", "hevc", "hevc (Main) (hvc1", "yuv420p(tv, bt709, progressive)"),
    ("clip.mov", "prores", "prores (HQ) (apch", "yuv422p10le(tv, bt709, progressive)"),
]


@needs_ffmpeg
@pytest.mark.parametrize(("name", "codec", "kind", "tags"), KINDS)
def test_colours_are_tagged_and_do_not_shift(tmp_path, name, codec, kind, tags):
    """Primaries, transfer and matrix are all declared, and the pixels are converted by that matrix."""
    if codec not in mp4.find_encoder().codecs:
        pytest.skip(f"this ffmpeg has no {codec}")
    colours = np.array(
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0), (200, 100, 50)]
    )
    frames = moving_scene(8)
    frames[1:] = colours[:, None, None]
    path = write_video(tmp_path / name, frames, metadata=METADATA | {"long": "x" * 70_000}, codec=codec)
    assert read_metadata(path)["long"] == "x" * 70_000
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert re.search(rb"colrncl[xc](\x00\x01){3}", data)  # QuickTime reads this and not the stream
    shown = ffmpeg("-i", path).stderr.decode()
    assert kind in shown
    assert tags in shown
    back, _ = read_video(path)
    assert psnr(back[0], frames[0]) > 30
    assert abs(back[1:].astype(int) - frames[1:]).max() <= 3
    assert mean_error(back[1:], frames[1:]) < 0.6
    planes = np.frombuffer(ffmpeg("-i", path, "-pix_fmt", "yuv444p", "-f", "rawvideo", "-").stdout, np.uint8)
    luma = planes.reshape(8, 3, 48, 64)[1:, 0, 20, 20]
    np.testing.assert_allclose(luma, 16 + 219 / 255 * colours @ [0.2126, 0.7152, 0.0722], atol=1.5)


@pytest.mark.parametrize("name", [*PILLOW_NAMES, pytest.param("clip.mov", marks=needs_ffmpeg)])
def test_scale_repeats_pixels(tmp_path, name):
    frames = moving_scene(2, 16, 20)
    path = write_video(tmp_path / name, frames, metadata={"width": 20}, scale=3)
    back, _ = read_video(path)
    assert back.shape == (2, 48, 60, 3)
    assert read_metadata(path) == {"width": 20}
    if name in ("clip.png", "clip.apng", "clip"):
        np.testing.assert_array_equal(back, np.kron(frames, np.ones((1, 3, 3, 1), np.uint8)))
    else:
        assert psnr(back[:, 1::3, 1::3], frames) > 28


@needs_ffmpeg
def test_hevc_of_few_pixels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use at least 16x16, for example by a scale"):
        write_video(tmp_path / "clip.mp4", moving_scene(2, 8, 8), codec="hevc")
    assert os.listdir(tmp_path) == []


@needs_ffmpeg
def test_mp4_cuts_odd_sizes_with_a_warning(tmp_path):
    frames = moving_scene(height=47, width=63)
    with pytest.warns(UserWarning, match="63x47 is cut to 62x46") as caught:
        path = write_video(tmp_path / "clip.mp4", frames)
    assert caught[0].filename == __file__
    back, _ = read_video(path)
    assert back.shape == (6, 46, 62, 3)
    assert psnr(back, frames[:, :46, :62]) > 30
    with pytest.raises(ValueError, match=r"1x47 pixels are too few for \.mp4 in H\.264; use at least 2x2"):
        write_video(tmp_path / "thin.mp4", frames[:, :, :1])
    assert os.listdir(tmp_path) == ["clip.mp4"]


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 7, 24, 30, 48, 0.5, 29.97, 12.5, 50])
@pytest.mark.parametrize("name", NAMES)
def test_rates(tmp_path, name, fps):
    frames = moving_scene(9, 16, 16)
    back, measured = read_video(write_video(tmp_path / name, frames, fps=fps))
    assert len(back) == 9
    unit = {"clip.gif": 0.010, "clip.mp4": 0, "clip": 0}.get(name, 0.001)
    assert abs(9 / measured - 9 / fps) <= unit / 2 + 1e-6
    if name == "clip.gif":
        with Image.open(tmp_path / name) as image:
            image.seek(5)
            assert image.info["duration"] >= 20


def test_gif_of_8_frames_a_second_alternates():
    assert durations(4, 8, 10) == [130, 120, 130, 120]
    assert sum(durations(24, 24, 10)) == 1000
    assert durations(3, 8, 1) == [125, 125, 125]


@pytest.mark.parametrize("unit", [1, 10])
@pytest.mark.parametrize("fps", [1, 7, 8, 24, 30, 33.3, 40, 50])
def test_merged_frames_are_repeated(fps, unit):
    times = durations(12, fps, unit)
    merged = [*times[:3], times[3] + times[4], *times[5:8], sum(times[8:11]), times[11]]
    repeats, rate = even_rate(merged, unit)
    assert repeats == [1, 1, 1, 2, 1, 1, 1, 3, 1]
    assert rate == pytest.approx(12_000 / sum(times))


def test_files_without_times_have_the_default_rate():
    assert even_rate([0, 0], 10) == ([1, 1], 8.0)
    assert even_rate([0, 200], 10) == ([1, 2], 10.0)


@pytest.mark.parametrize("name", NAMES)
def test_equal_neighbours_come_back(tmp_path, name):
    frames = moving_scene(7, 32, 32)
    frames[3] = frames[2]
    frames[5] = frames[6]
    back, fps = read_video(write_video(tmp_path / name, frames, fps=10))
    assert len(back) == 7
    assert fps == pytest.approx(10)
    assert mean_error(back[3], back[2]) < 1
    assert mean_error(back[4], back[3]) > 1


@pytest.mark.parametrize("name", NAMES)
def test_one_frame(tmp_path, name):
    frames = moving_scene(1)
    path = write_video(tmp_path / name, frames, metadata=METADATA)
    assert read_video(path)[0].shape == frames.shape
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
@pytest.mark.parametrize("loop", [0, 1, 3])
def test_loop(tmp_path, name, loop):
    path = write_video(tmp_path / name, moving_scene(2), loop=loop)
    with Image.open(path) as image:
        if name == "clip.gif":  # counts the repeats after the first showing, none at all for one
            assert image.info.get("loop", "once") == {0: 0, 1: "once", 3: 2}[loop]
        else:
            assert image.info["loop"] == loop


@pytest.mark.parametrize("name", ["clip.mp4", "clip"])
def test_loop_is_refused_where_nothing_holds_it(tmp_path, name):
    with pytest.raises(ValueError, match=r"loop=2.*\.gif"):
        write_video(tmp_path / name, moving_scene(2), loop=2)


# --- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", ["x" * 5000, "熊" * 5000, "🐼 " * 2500, "\ud800", "'" * 300])
def test_long_and_odd_prompts(tmp_path, name, prompt):
    path = write_video(tmp_path / name, moving_scene(2, 16, 16), metadata={"prompt": prompt})
    assert read_metadata(path) == {"prompt": prompt}


@pytest.mark.parametrize("name", NAMES)
def test_empty_metadata_is_not_none(tmp_path, name):
    write_video(tmp_path / name, moving_scene(2, 16, 16), metadata={})
    assert read_metadata(tmp_path / name) == {}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_others_have_no_settings(tmp_path, name):
    path = write_video(tmp_path / name, moving_scene(2, 16, 16))
    with pytest.raises(ValueError, match="not made by this program"):
        read_metadata(path)


def test_comments_of_others_are_no_settings(tmp_path):
    path = tmp_path / "clip.gif"
    Image.new("RGB", (4, 4)).save(path, comment=b"made with love")
    with pytest.raises(ValueError, match="not made by this program"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"seeds": [1, 2]}, TypeError, r"metadata\['seeds'\] is a list"),
        ({1: "x"}, TypeError, "keys are strings"),
        ({"eta": float("nan")}, ValueError, r"metadata\['eta'\] is nan"),
        ({"a": 1, "prompt": "x" * 120_000}, ValueError, "shorten 'prompt'"),
    ],
)
def test_bad_metadata_is_refused_early(tmp_path, metadata, error, message):
    with pytest.raises(error, match=message):
        check_writable(tmp_path / "clip.gif", metadata=metadata)
