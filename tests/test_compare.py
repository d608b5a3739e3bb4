"""Two videos held against each other: the numbers, the pictures, and what is refused."""

import math
import os
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from mlx_unet3d import media
from mlx_unet3d.cli import main
from mlx_unet3d.media.comparing import plot
from scenes import moving_scene


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pair(count=3, height=20, width=24):
    a = moving_scene(count, height, width)
    noise = np.random.default_rng(1).normal(0, 12, a.shape)
    b = (a + noise).clip(0, 255).round().astype(np.uint8)
    b[0] = a[0]
    return a, b


def reference_ssim(x, y):
    """The formula of the paper, place by place, on one channel."""
    weights = np.array(
        [[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    )
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = (z[i : i + 11, j : j + 11].astype(float) for z in (x, y))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_psnr_and_ssim():
    a, b = pair()
    error = ((a[1].astype(float) - b[1]) ** 2).mean()
    decibels, similarities = media.psnr(a, b), media.ssim(a, b)
    assert decibels[0] == math.inf
    assert decibels[1] == pytest.approx(20 * math.log10(255 / math.sqrt(error)))
    assert similarities[0] == pytest.approx(1, abs=1e-12)
    expected = np.mean([reference_ssim(a[1, ..., c], b[1, ..., c]) for c in range(3)])
    assert similarities[1] == pytest.approx(expected, abs=1e-9)
    assert expected < 0.9


def test_a_video_of_both():
    a, b = pair()
    side = media.compared(a, b)
    assert side.shape == (3, 20, 52, 3)
    np.testing.assert_array_equal(side[:, :, :24], a)
    np.testing.assert_array_equal(side[:, :, 28:], b)
    flicker = media.compared(a, b, "flicker")
    np.testing.assert_array_equal(flicker[::2], a)
    np.testing.assert_array_equal(flicker[1::2], b)
    difference = media.compared(a, b, "difference", gain=3)
    expected = (3 * abs(a.astype(int) - b)).clip(0, 255)
    np.testing.assert_array_equal(difference, expected)
    with pytest.raises(ValueError, match="none of side, difference, flicker"):
        media.compared(a, b, "blink")


def test_command(capsys):
    a, b = pair()
    media.write_video("a.png", a, fps=10)
    media.write_video("b.png", b, fps=10)
    for mode, rate in (("side", 10), ("difference", 10), ("flicker", 20)):
        words = ["-o", f"{mode}.png", "--mode", mode, "--scale", "2", "--plot", f"{mode}.svg"]
        assert main(["compare", "a.png", "b.png", *words]) == 0
        shown, fps = media.read_video(f"{mode}.png")
        np.testing.assert_array_equal(shown[:, ::2, ::2], media.compared(a, b, mode))
        assert fps == pytest.approx(rate)
    lines = capsys.readouterr().out.splitlines()[:7]
    assert lines[0].split() == ["frame", "PSNR", "dB", "SSIM"]
    assert lines[1].split() == ["0", "inf", "1.0000"]
    assert lines[2].split() == ["1", f"{media.psnr(a, b)[1]:.2f}", f"{media.ssim(a, b)[1]:.4f}"]
    whole = 10 * math.log10(255**2 / ((a.astype(float) - b) ** 2).mean())
    assert lines[4].split() == ["all", f"{whole:.2f}", f"{media.ssim(a, b).mean():.4f}"]
    assert lines[5:] == ["side.png", "side.svg"]
    assert len(ET.parse("side.svg").findall(".//{*}circle")) == 6


def test_equal_videos(capsys):
    media.write_video("a.png", pair()[0])
    assert main(["compare", "a.png", "a.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "inf", "1.0000"]
    assert os.listdir() == ["a.png"]


def test_plot_of_one_frame_and_of_equal_frames():
    for decibels in ([math.inf], [math.inf] * 3, [30.0, math.inf]):
        root = ET.fromstring(plot(decibels, [1.0] * len(decibels)))
        heights = [float(dot.get("cy")) for dot in root.findall(".//{*}circle")]
        assert len(heights) == 2 * len(decibels)
        assert all(0 < height < 300 for height in heights)


WRONG = {
    "length": (["a.png", "short.png"], "--num-frames"),
    "size": (["a.png", "wide.png"], "a.png has 3 frames of 24x20 pixels, wide.png has 3 frames of 48x20"),
    "tiny": (["tiny.png", "tiny.png"], "too small for SSIM"),
    "missing": (["a.png", "none.png"], "none.png is missing"),
    "no video": (["a.png", "x.svg"], "unknown suffix"),
    "more frames than there are": (["a.png", "a.png", "--num-frames", "9"], "only 3 frames"),
    "output is an input": (["a.png", "b.png", "-o", "./a.png", "--overwrite"], "one of the videos"),
    "output is there": (["a.png", "a.png", "-o", "short.png"], "--overwrite"),
    "output": (["a.png", "a.png", "-o", "out.avi"], ".gif"),
    "plot": (["a.png", "a.png", "--plot", "out.png"], "must end in .svg"),
    "mode": (["a.png", "a.png", "-o", "out.png", "--mode", "flikcer"], "did you mean flicker?"),
    "mode of nothing": (["a.png", "a.png", "--mode", "side"], "give that too"),
    "gain of no difference": (["a.png", "a.png", "-o", "out.png", "--gain", "2"], "--mode difference"),
    "one video": (["a.png"], "B"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, capsys):
    a, _ = pair()
    media.write_video("a.png", a)
    media.write_video("short.png", a[:2])
    media.write_video("wide.png", a.repeat(2, 2))
    media.write_video("tiny.png", a[:, :8, :8])
    open("x.svg", "w").close()
    before = sorted(os.listdir())
    words, cure = WRONG[name]
    try:
        status = main(["compare", *words])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert cure in captured.err
    assert "Traceback" not in captured.err
    assert sorted(os.listdir()) == before
