"""The demo model's clips against diffusers' from the same weights, prompt and seed."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import TextToVideoPipeline  # noqa: E402
from diffusers import TextToVideoSDPipeline  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def test_clips_equal_those_of_diffusers(tmp_path):
    ours = TextToVideoPipeline.from_pretrained("demo", dtype=mx.float32)
    ours.save_pretrained(tmp_path, layout="diffusers")
    theirs = TextToVideoSDPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    settings = dict(num_frames=8, num_inference_steps=25, guidance_scale=ours.guidance_scale())
    for seed, prompt in enumerate(
        ["a large red circle moving left on a dark background", "a green ring growing"]
    ):
        generator = torch.Generator().manual_seed(seed)
        expected = theirs(prompt, generator=generator, **settings).frames
        frames = ours(prompt, seed=seed, **settings).frames
        assert -10 * np.log10(np.square(frames - expected).mean()) >= 50
