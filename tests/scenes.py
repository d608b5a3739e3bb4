"""A small clip, and what the tests of media share."""

import numpy as np
import pytest
from mlx_unet3d.media import mp4

HAS_FFMPEG = any("h264" in ffmpeg.codecs for ffmpeg in mp4.installed())
needs_ffmpeg = pytest.mark.skipif(
    not HAS_FFMPEG, reason="neither ffmpeg nor imageio-ffmpeg: MP4 is not tested"
)
PILLOW_NAMES = ["clip.gif", "clip.webp", "clip.png", "clip.apng", "clip"]
NAMES = [*PILLOW_NAMES, pytest.param("clip.mp4", marks=needs_ffmpeg)]

METADATA = {
    "prompt": "a “panda” surfing\n\ton a wave — 熊猫 🐼; key=value # 'quotes' \\ \"more\" \x00 %d $HOME",
    "negative_prompt": "",
    "seed": 2**63 + 1,
    "guidance_scale": 9.0,
    "eta": 1e-30,
    "vae_tiling": False,
    "sampler": None,
}


def moving_scene(count=6, height=48, width=64):
    """Smooth colours, faint grain and two lights on their way: some 10,000 colours."""
    y, x = np.mgrid[:height, :width]
    still = np.stack([60 + 120 * x / width, 80 + 100 * y / height, 200 - x - y], -1)
    still = still + np.random.default_rng(0).normal(0, 3, (height, width, 1))
    frames = []
    for i in range(count):
        frame = still
        for at_x, at_y, colour in [(10 + 4 * i, 20, (240, 60, 30)), (50 - 3 * i, 30, (30, 220, 90))]:
            light = np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / 120)[..., None]
            frame = frame * (1 - light) + np.array(colour) * light
        frames.append(frame)
    return np.clip(np.stack(frames), 0, 255).round().astype(np.uint8)


def mean_error(a, b):
    return np.abs(a.astype(np.float64) - b).mean()


def psnr(a, b):
    return 10 * np.log10(255**2 / ((a.astype(np.float64) - b) ** 2).mean())
