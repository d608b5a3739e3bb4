"""AutoencoderKL against diffusers' own, live, in fp32 on the same weights."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from diffusers import AutoencoderKL as ReferenceVAE  # noqa: E402
from mlx_unet3d.models.autoencoder_kl import AutoencoderKL  # noqa: E402
from mlx_unet3d.noise import noise_source  # noqa: E402
from reference import randomize_constants, relative_error, to_mlx  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-5


def levels(*widths, **config) -> dict:
    return dict(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **{"norm_num_groups": 8, "sample_size": 16, **config},
    )


TINY = levels(16, 32)

CASES = {
    "tiny": TINY,
    "one level": levels(16),
    "stable diffusion": levels(32, 64, 64, 64, layers_per_block=2, norm_num_groups=32),
    "narrowing": levels(32, 16, 48, norm_num_groups=16),
    "no attention": {**TINY, "mid_block_add_attention": False},
    "no quant convs": {**TINY, "use_quant_conv": False, "use_post_quant_conv": False},
    "other channels": {**TINY, "in_channels": 4, "out_channels": 2, "latent_channels": 5},
    "gelu": {**TINY, "act_fn": "gelu"},
    "shift": {**TINY, "shift_factor": 0.1, "scaling_factor": 0.36, "force_upcast": False},
}


def pair(folder, config) -> tuple[ReferenceVAE, AutoencoderKL]:
    torch.manual_seed(0)
    theirs = ReferenceVAE(**config).eval()
    randomize_constants(theirs)
    theirs.save_pretrained(folder)
    return theirs, AutoencoderKL.from_pretrained(folder)


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(theirs, ours, height, width, frames=2, **keywords) -> None:
    """Mean, log-variance, draw and mode of images, and images of latents."""
    factor = ours.spatial_factor
    x = randn(frames, ours.config.in_channels, height, width).clamp(-1, 1)
    z = randn(frames, ours.config.latent_channels, height // factor, width // factor)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
        images = theirs.decode(z).sample
    latents = ours.encode(to_mlx(x), **keywords)
    assert relative_error(latents.mean, expected.mean) <= TOLERANCE
    assert relative_error(latents.logvar, expected.logvar) <= TOLERANCE
    assert relative_error(latents.std, expected.std) <= TOLERANCE
    assert relative_error(latents.mode(), expected.mode()) <= TOLERANCE
    draw = expected.sample(torch.Generator("cpu").manual_seed(3))
    assert relative_error(latents.sample(noise_source(3)), draw) <= TOLERANCE
    assert relative_error(ours.decode(to_mlx(z), **keywords), images) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode(tmp_path, case):
    compare(*pair(tmp_path, CASES[case]), 24, 16)


@pytest.mark.parametrize("size", [(17, 23), (2, 2), (3, 9), (32, 2)])
def test_odd_sizes(tmp_path, size):
    compare(*pair(tmp_path, TINY), *size)


def test_slicing_and_chunks(tmp_path):
    theirs, ours = pair(tmp_path, TINY)
    compare(theirs, ours, 16, 16, frames=5, chunk_size=2)
    theirs.enable_slicing()
    ours.enable_slicing()
    compare(theirs, ours, 16, 16, frames=3)


@pytest.mark.parametrize(
    "size",
    [(40, 24), (16, 20), (28, 34), (33, 18), (12, 53)],
    ids=["both", "just over", "both ragged", "odd", "wide only"],
)
@pytest.mark.parametrize("case", ["tiny", "no quant convs", "narrowing"])
def test_tiling(tmp_path, size, case):
    theirs, ours = pair(tmp_path, CASES[case])
    whole = np.array(ours.encode(mx.ones((1, 3, *size))).mean)
    theirs.enable_tiling()
    ours.enable_tiling()
    assert not np.allclose(whole, ours.encode(mx.ones((1, 3, *size))).mean, atol=1e-4)
    x = randn(2, 3, *size).clamp(-1, 1)
    z = randn(2, 4, *size, seed=2)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
        images = theirs.decode(z).sample
    for chunk_size in (None, 1):
        latents = ours.encode(to_mlx(x), chunk_size=chunk_size)
        assert relative_error(latents.mean, expected.mean) <= TOLERANCE
        assert relative_error(latents.logvar, expected.logvar) <= TOLERANCE
        assert relative_error(ours.decode(to_mlx(z), chunk_size=chunk_size), images) <= TOLERANCE


def test_tiling_leaves_small_frames_alone(tmp_path):
    theirs, ours = pair(tmp_path, TINY)
    theirs.enable_tiling()
    ours.enable_tiling()
    compare(theirs, ours, 16, 16)


def test_other_tile_sizes(tmp_path):
    theirs, ours = pair(tmp_path, TINY)
    for vae in (theirs, ours):
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 12, 6
    compare(theirs, ours, 29, 22)


LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolutions", [False, True])
def test_legacy_attention(tmp_path, convolutions):
    """Names from before mid-2023, and still older files with the matrices as 1x1 convolutions."""
    _, ours = pair(tmp_path, TINY)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {}
    for key, value in load_file(path).items():
        for new, old in LEGACY.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        if convolutions and any(f".{old}.weight" in key for old in LEGACY.values()):
            value = value[:, :, None, None].contiguous()
        state[key] = value
    assert any(".proj_attn." in key for key in state)
    save_file(state, path, metadata={"format": "pt"})
    x = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32))
    old = AutoencoderKL.from_pretrained(tmp_path)
    np.testing.assert_array_equal(old.encode(x).mean, ours.encode(x).mean)
    z = mx.tile(x[:, :1, :8, :8], (1, 4, 1, 1))
    np.testing.assert_array_equal(old.decode(z), ours.decode(z))
    if not convolutions:
        compare(ReferenceVAE.from_pretrained(tmp_path).eval(), old, 16, 16)


def test_saved_folder_loads_in_diffusers(tmp_path):
    theirs, ours = pair(tmp_path / "a", CASES["shift"])
    ours.save_pretrained(tmp_path / "b", layout="diffusers")
    again = ReferenceVAE.from_pretrained(tmp_path / "b").eval()
    assert dict(again.config)["shift_factor"] == 0.1
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_default_parameters():
    """The autoencoder of Stable Diffusion and ModelScope: names, shapes and count, unallocated."""
    config = levels(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32, sample_size=512)
    assert AutoencoderKL(**config).num_parameters() == 83_653_863


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 1e-1)])
def test_half_precision(tmp_path, dtype, tolerance):
    theirs, ours = pair(tmp_path, CASES["stable diffusion"])
    z = randn(1, 4, 4, 4)
    with torch.no_grad():
        images = theirs.decode(z).sample
    ours.set_dtype(getattr(mx, dtype))
    out = ours.decode(to_mlx(z))
    assert out.dtype == getattr(mx, dtype)
    assert relative_error(out.astype(mx.float32), images) <= tolerance
