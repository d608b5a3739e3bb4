"""FreeNoise against diffusers' own, live, in fp32: networks, noise and pipelines."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

pytest.importorskip("transformers")

import copy  # noqa: E402

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin  # noqa: E402
from mlx_unet3d.pipelines import ContextWindows  # noqa: E402
from reference import relative_error, to_mlx  # noqa: E402
from test_animatediff_pipelines import check, difference, folder, image_pipes, picture, pipes  # noqa: E402, F401
from video_networks import KINDS, ours_of, theirs_of  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MOTION = KINDS["motion"]


class FreeNoiseOf(AnimateDiffFreeNoiseMixin):
    """diffusers' switch, of a network alone."""

    def __init__(self, unet):
        self.unet, self.motion_adapter = unet, unet
        self.device, self.dtype = "cpu", torch.float32


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return MOTION.pair(tmp_path_factory.mktemp("motion"), motion_max_seq_length=8)


# Frames, context_length, context_stride, weighting_scheme.
CASES = [
    (12, 8, 4, "pyramid"),
    (12, 8, 2, "flat"),
    (12, 8, 4, "delayed_reverse_sawtooth"),
    (9, 5, 2, "pyramid"),
    (9, 5, 2, "flat"),
    (12, 4, 4, "pyramid"),
    (11, 4, 1, "delayed_reverse_sawtooth"),
    (8, 8, 4, "pyramid"),
    (13, 8, 4, "pyramid"),  # one frame is left over
    (13, 8, 4, "delayed_reverse_sawtooth"),
    (14, 8, 4, "flat"),  # two are
    (11, 4, 4, "flat"),
]


@pytest.mark.parametrize(("frames", "length", "stride", "scheme"), CASES)
def test_forward(pair, frames, length, stride, scheme):
    theirs, ours = pair
    inputs = MOTION.inputs(theirs.config, frames=frames, height=4, width=4)
    FreeNoiseOf(theirs).enable_free_noise(length, stride, scheme)
    ours.enable_free_noise(length, stride, scheme)
    expected = theirs_of(theirs, inputs)
    assert relative_error(ours_of(ours, inputs), expected) <= 1e-5
    if frames > length:
        ours.enable_free_noise(length, max(stride - 1, 1), "flat" if scheme == "pyramid" else "pyramid")
        assert relative_error(ours_of(ours, inputs), expected) > 1e-4


def test_batch_and_all_savings_at_once(pair):
    theirs, ours = pair
    inputs = MOTION.inputs(theirs.config, batch=2, frames=12, height=4, width=6)
    FreeNoiseOf(theirs).enable_free_noise(8, 2)
    ours.enable_free_noise(8, 2)
    ours.enable_frame_chunking(5)
    ours.enable_pixel_chunking(7)
    try:
        made = ours_of(ours, inputs)
    finally:
        ours.disable_frame_chunking()
        ours.disable_pixel_chunking()
    assert relative_error(made, theirs_of(theirs, inputs)) <= 1e-5
    assert made.dtype == mx.float32


@pytest.fixture
def long_pipes(pipes):  # noqa: F811
    """diffusers cannot go back to its own blocks once a network has no motion mid block, so it has a copy."""
    theirs, ours = copy.deepcopy(pipes[0]), pipes[1]
    yield theirs, ours
    ours.disable_free_noise()


LONG = dict(height=32, width=32, num_inference_steps=2)
TRAVEL = {0: "a fox", 5: "two moons", 9: "rain"}
# Arguments of enable_free_noise and of the call.
CALLS = {
    "shuffled": ((8, 4), dict(num_frames=28)),
    "shuffled_rest": ((8, 3), dict(num_frames=12)),
    "random": ((8, 4, "flat", "random"), dict(num_frames=14)),
    "reverse": ((8, 2, "delayed_reverse_sawtooth"), dict(num_frames=12, negative_prompt="rain")),
    "travel": ((8, 4), dict(num_frames=12, prompt=TRAVEL)),
    "travel_negative": ((8, 4), dict(num_frames=12, prompt=TRAVEL, negative_prompt={0: "rain", 11: "a cat"})),
    "travel_alone": ((8, 4), dict(num_frames=12, prompt=TRAVEL, guidance_scale=1.0, clip_skip=1)),
    "eta": ((8, 4), dict(num_frames=12, eta=0.5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_pipelines(long_pipes, name):
    options, args = CALLS[name]
    for pipe in long_pipes:
        pipe.enable_free_noise(*options)
    check(long_pipes, **LONG, **args)


def test_latents_of_one_window_are_repeated(long_pipes):
    latents = torch.randn(1, 4, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    for pipe in long_pipes:
        pipe.enable_free_noise(8, 4, noise_type="repeat_context")
    check(long_pipes, **LONG, num_frames=20, latents=latents)


def test_interpolation_of_prompts_by_a_function(long_pipes):
    theirs, ours = long_pipes

    def jump(repeat, concatenate):
        return lambda first, last, start, end: concatenate([repeat(start, last - first), end])

    their_jump = jump(lambda x, n: x.repeat(n, 1, 1), torch.cat)
    our_jump = jump(lambda x, n: mx.repeat(x, n, axis=0), mx.concatenate)
    theirs.enable_free_noise(8, 4, prompt_interpolation_callback=their_jump)
    ours.enable_free_noise(8, 4, prompt_interpolation_callback=our_jump)
    frames = check(long_pipes, **LONG, num_frames=12, prompt=TRAVEL)
    ours.enable_free_noise(8, 4)
    assert difference(ours(TRAVEL, seed=3, num_frames=12, **LONG).frames, frames) > 1e-3


def test_text_of_frames(long_pipes):
    theirs, ours = long_pipes
    theirs.enable_free_noise(8, 4)
    negative = {0: "rain", 3: "a cat"}
    with torch.no_grad():
        both, _ = theirs._encode_prompt_free_noise(TRAVEL, 12, "cpu", 1, True, negative)
    states = ours.encode_prompt(TRAVEL, negative, num_frames=12)
    assert states.prompt_embeds.shape == (1, 12, 77, 24)
    assert difference(np.concatenate(states[::-1]).reshape(24, 77, 24), both) <= 1e-5
    assert states.prompt_embeds.dtype == to_mlx(both).dtype


def test_images_beside_text_of_frames(image_pipes):  # noqa: F811
    made, *both = image_pipes
    for pipe in both:
        pipe.load_ip_adapter(str(made), subfolder="models", weight_name="plain.safetensors")
        pipe.enable_free_noise(8, 4)
    args = dict(num_frames=12, ip_adapter_image=picture())
    check(both, **LONG, **args, prompt=TRAVEL)
    windows = dict(context_windows=ContextWindows(12), seed=3)
    ours = both[1](TRAVEL, **LONG, **args, **windows).frames
    halves = both[1](TRAVEL, **LONG, **args, **windows | {"context_windows": ContextWindows(8)}).frames
    assert difference(ours, halves) > 1e-3
