"""FreeInit against diffusers' own, live, in fp32."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from mlx_unet3d.pipelines.free_init import FreeInit  # noqa: E402
from test_animatediff_pipelines import (  # noqa: E402, F401
    CLIP,
    check,
    difference,
    folder,
    pipes,
    video_pipes,
    with_scheduler,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SMALL = dict(height=32, width=48, num_frames=5, num_inference_steps=3)
SETTINGS = {
    "butterworth": dict(num_iters=2),
    "gaussian": dict(num_iters=2, method="gaussian", spatial_stop_frequency=0.4),
    "ideal": dict(num_iters=2, method="ideal", temporal_stop_frequency=0.6),
    "order": dict(num_iters=2, order=2, spatial_stop_frequency=0.7, temporal_stop_frequency=0.3),
    "fast": dict(num_iters=3, use_fast_sampling=True),
    "one": dict(num_iters=1),
}


@pytest.fixture
def free_pipes(pipes):  # noqa: F811
    yield pipes
    for pipe in pipes:
        pipe.disable_free_init()


def enable(pair, **options):
    for pipe in pair:
        pipe.enable_free_init(**options)
        assert pipe.free_init_enabled


@pytest.mark.parametrize("name", SETTINGS)
def test_calls(free_pipes, name):
    enable(free_pipes, **SETTINGS[name])
    check(free_pipes, **SMALL)


def test_batch_and_noise_of_the_steps(free_pipes):
    enable(free_pipes, num_iters=2)
    check(free_pipes, **SMALL, prompt=["a fox", "two moons"], eta=0.6)


# What diffusers runs, and brings back to the noise level of the schedule's beginning.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LCMScheduler", {}),
        ("DPMSolverMultistepScheduler", dict(timestep_spacing="linspace")),
        ("PNDMScheduler", dict(skip_prk_steps=True)),
    ],
)
def test_schedulers(pipes, name, options):  # noqa: F811
    made = with_scheduler(pipes, name, options)
    enable(made, num_iters=2)
    check(made, **SMALL)


def test_with_free_noise(free_pipes):
    enable(free_pipes, num_iters=2)
    for pipe in free_pipes:
        pipe.enable_free_noise(4, 2)
    try:
        check(free_pipes, **SMALL | {"num_frames": 8}, prompt={0: "a fox", 6: "rain"})
    finally:
        free_pipes[1].disable_free_noise()
        free_pipes[0].disable_free_noise()


VIDEOS = {
    "plain": ({}, {}),
    "fast": (dict(use_fast_sampling=True), dict(num_inference_steps=12)),
    "enforced": ({}, dict(enforce_inference_steps=True, strength=0.6)),
    "two": ({}, dict(prompt=["a fox", "two moons"], video=[CLIP, CLIP[::-1]], eta=0.5)),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_video_to_video(video_pipes, name):  # noqa: F811
    """Each iteration runs a share of the steps of the last."""
    options, args = VIDEOS[name]
    enable(video_pipes, **{"num_iters": 2, **options})
    check(video_pipes, **SMALL | {"video": CLIP, "num_inference_steps": 4} | args)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LCMScheduler", {}),
        ("DPMSolverMultistepScheduler", dict(timestep_spacing="linspace")),
        ("PNDMScheduler", dict(skip_prk_steps=True)),
    ],
)
def test_video_to_video_schedulers(video_pipes, name, options):  # noqa: F811
    made = with_scheduler(video_pipes, name, options)
    enable(made, num_iters=2)
    check(made, **SMALL | dict(video=CLIP, num_inference_steps=4, strength=0.9))


@pytest.mark.parametrize("shape", [(1, 4, 5, 6, 4), (2, 3, 1, 1, 7)])
@pytest.mark.parametrize("method", ["butterworth", "gaussian", "ideal"])
def test_mix(pipes, shape, method):  # noqa: F811
    theirs, generator = pipes[0], torch.Generator().manual_seed(1)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = theirs._get_free_init_freq_filter(shape, "cpu", method, 3, 0.5, 0.7)
    ours = FreeInit(method=method, order=3, spatial_stop_frequency=0.5, temporal_stop_frequency=0.7)
    mixed = ours.mix(mx.array(x.numpy()), mx.array(noise.numpy()))
    assert difference(mixed, theirs._apply_freq_filter(x, noise, mask)) <= 2e-6
    assert difference(ours.low_frequencies(*shape[2:]), mask[0, 0]) <= 1e-6
