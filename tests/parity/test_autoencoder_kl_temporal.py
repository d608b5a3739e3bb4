"""AutoencoderKLTemporalDecoder against diffusers' own, live, in fp32 on the same weights."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx_unet3d  # noqa: E402
import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
from reference import relative_error, to_mlx  # noqa: E402
from video_networks import draw, temporal_vae_pair  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-5

# config changes, latents (N, h, w), frames of a clip
CASES = {
    "tiny": ({}, (3, 4, 4), 3),
    "two_clips": ({}, (4, 3, 5), 2),
    "one_frame": ({}, (2, 4, 4), 1),
    "many_frames": ({}, (8, 2, 3), 8),
    "one_layer": (dict(layers_per_block=1), (4, 3, 5), 2),
    "three_layers": (dict(layers_per_block=3), (2, 4, 4), 2),
    "four_levels": (
        dict(block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4),
        (2, 2, 2),
        2,
    ),
    "channels": (dict(in_channels=4, out_channels=2, latent_channels=3), (3, 4, 4), 3),
}


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode(name, tmp_path):
    config, (n, height, width), frames = CASES[name]
    theirs, ours = temporal_vae_pair(tmp_path, **config)
    factor = ours.spatial_factor
    randn = draw()
    z = randn(n, theirs.config.latent_channels, height, width)
    x = randn(n, theirs.config.in_channels, height * factor, width * factor)
    with torch.no_grad():
        images = theirs.decode(z, num_frames=frames).sample
        moments = theirs.encode(x).latent_dist
    assert relative_error(ours.decode(to_mlx(z), frames), images) <= TOLERANCE
    found = ours.encode(to_mlx(x))
    assert relative_error(found.mode(), moments.mode()) <= TOLERANCE
    assert relative_error(found.logvar, moments.logvar) <= TOLERANCE
    ours.enable_frame_chunking(1)
    ours.enable_pixel_chunking(7)
    assert relative_error(ours.decode(to_mlx(z), frames), images) <= TOLERANCE


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return temporal_vae_pair(tmp_path_factory.mktemp("vae"))


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_frames_are_clips_of_their_own(pair, chunk):
    """As StableVideoDiffusionPipeline decodes with decode_chunk_size."""
    theirs, ours = pair
    z = draw()(7, 4, 4, 4)
    with torch.no_grad():
        parts = [theirs.decode(part, num_frames=len(part)).sample for part in z.split(chunk)]
    expected = torch.cat(parts)
    assert relative_error(ours.decode(to_mlx(z), 7, chunk_size=chunk), expected) <= TOLERANCE
    if chunk < 7:
        assert relative_error(ours.decode(to_mlx(z), 7), expected) > 1e-2


def test_saved_networks_load_on_both_sides(pair, tmp_path):
    theirs, ours = pair
    z = to_mlx(draw()(2, 4, 3, 3))
    ours.save_pretrained(tmp_path / "mlx")
    again = mlx_unet3d.AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "mlx")
    assert mx.array_equal(again.decode(z, 2), ours.decode(z, 2))
    ours.save_pretrained(tmp_path / "torch", layout="diffusers")
    back = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "torch").state_dict()
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert ours.num_parameters() == theirs.num_parameters()


def test_what_is_refused(pair):
    _, ours = pair
    z = mx.zeros((4, 4, 3, 3))
    with pytest.raises(ValueError, match="num_frames=3 must divide the 4 frames"):
        ours.decode(z, 3)
    with pytest.raises(ValueError, match="chunk_size=0"):
        ours.decode(z, 4, chunk_size=0)
    with pytest.raises(NotImplementedError, match="enable_frame_chunking"):
        ours.enable_tiling()
