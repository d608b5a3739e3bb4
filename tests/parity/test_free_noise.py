"""FreeNoise against diffusers' own, live, in fp32: networks and pipelines."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin  # noqa: E402
from reference import relative_error  # noqa: E402
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
