"""The demo model's clips against diffusers' from the same weights, prompt and seed."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import TextToVideoPipeline  # noqa: E402
from diffusers import TextToVideoSDPipeline  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo_model"))
import world  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Ours, and diffusers' on the same weights."""
    folder = tmp_path_factory.mktemp("demo")
    ours = TextToVideoPipeline.from_pretrained("demo", dtype=mx.float32)
    ours.save_pretrained(folder, layout="diffusers")
    theirs = TextToVideoSDPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


@pytest.mark.parametrize(("first", "count", "steps"), [(0, 16, 8), (16, 2, 25)])
def test_clips_equal_those_of_diffusers(pipes, first, count, steps):
    """Held-out prompts, each clip by itself: a seed of its own, 50 dB or more."""
    ours, theirs = pipes
    prompts = world.held_out_prompts(first + count)[first:]
    seeds = list(range(first, first + count))
    settings = dict(num_frames=8, num_inference_steps=steps, guidance_scale=ours.guidance_scale())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = theirs(prompts, generator=generators, **settings).frames
    frames = ours(prompts, seed=seeds, **settings).frames
    errors = np.square(frames - expected).mean(axis=(1, 2, 3, 4))
    assert errors.shape == (count,)
    assert (-10 * np.log10(errors)).min() >= 50
