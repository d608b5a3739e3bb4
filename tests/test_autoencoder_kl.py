"""AutoencoderKL without torch: goldens, chunks, tiles, memory rules, errors."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_unet3d.layers.vae_blocks import blend
from mlx_unet3d.models.autoencoder_kl import AutoencoderKL, DiagonalGaussian
from mlx_unet3d.noise import noise_source

GOLDEN = Path(__file__).parent / "goldens" / "vae"

STABLE_DIFFUSION = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)


@pytest.fixture
def vae():
    return AutoencoderKL.from_pretrained(GOLDEN)


@pytest.fixture
def cases():
    return mx.load(str(GOLDEN / "cases.safetensors"))


@pytest.fixture
def large():
    """Stable Diffusion's autoencoder, of which nothing is ever computed."""
    return AutoencoderKL(**STABLE_DIFFUSION)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["plain", "odd", "tiled"])
def test_golden(vae, cases, case):
    """Outputs of diffusers, dumped by tests/goldens/make_autoencoder_kl.py."""
    if case == "tiled":
        vae.enable_tiling()
    latents = vae.encode(cases[f"{case}.x"])
    close(latents.mean, cases[f"{case}.mean"])
    close(latents.logvar, cases[f"{case}.logvar"])
    close(latents.sample(noise_source(7)), cases[f"{case}.sample"])
    close(vae.decode(cases[f"{case}.z"]), cases[f"{case}.images"])


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_chunks_change_nothing(vae, cases, chunk_size):
    x, z = cases["plain.x"], cases["plain.z"]
    close(vae.encode(x, chunk_size=chunk_size).mean, cases["plain.mean"])
    close(vae.decode(z, chunk_size=chunk_size), cases["plain.images"])


def recorded(module, calls):
    """The class of `module`, with the frames of each call written down."""

    class Recording(type(module)):
        def __call__(self, x):
            calls.append(x.shape[0])
            return super().__call__(x)

    return Recording


def test_chunks_are_evaluated_one_by_one(vae):
    calls = []
    vae.decoder.__class__ = recorded(vae.decoder, calls)
    z = mx.zeros((5, 4, 2, 2))
    vae.decode(z, chunk_size=2)
    vae.decode(z)
    vae.enable_slicing()
    vae.decode(z)
    vae.decode(z, chunk_size=3)
    vae.disable_slicing()
    vae.decode(z)
    assert calls == [2, 2, 1, 5, 1, 1, 1, 1, 1, 3, 2, 5]


def test_gradients_pass_where_all_frames_are_one_chunk(vae, cases):
    z = cases["plain.z"]
    gradient = mx.grad(lambda z: vae.decode(z, chunk_size=3).sum())(z)
    assert mx.abs(gradient).max().item() > 0


def test_frames_do_not_touch_each_other(vae, cases):
    whole = vae.decode(cases["plain.z"])
    close(vae.decode(cases["plain.z"][1:2]), whole[1:2])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("given", [mx.float32, mx.float16])
def test_the_dtype_is_that_of_the_weights(dtype, given, cases):
    vae = AutoencoderKL.from_pretrained(GOLDEN, dtype=dtype)
    latents = vae.encode(cases["plain.x"].astype(given))
    for array in (latents.mean, latents.logvar, latents.std, latents.sample(noise_source(0))):
        assert array.dtype == dtype
    assert vae.decode(cases["plain.z"].astype(given)).dtype == dtype


def test_tiling(vae, cases):
    x, z = cases["tiled.x"], cases["tiled.z"]
    whole = vae.decode(z)
    vae.enable_tiling()
    tiled = vae.decode(z)
    assert tiled.shape == whole.shape == (1, 3, 28, 22)
    assert mx.abs(tiled - whole).max().item() > 1e-3
    assert vae.encode(x).mean.shape == (1, 4, 14, 11)
    vae.disable_tiling()
    assert mx.array_equal(vae.decode(z), whole)


def test_tiles_are_one_frame_of_tile_size(vae):
    shapes = []

    class Recording(type(vae.decoder)):
        def __call__(self, z):
            shapes.append(z.shape)
            return super().__call__(z)

    vae.decoder.__class__ = Recording
    vae.enable_tiling()
    vae.decode(mx.zeros((2, 4, 9, 8)), chunk_size=1)
    # tiles of 8 every 6: rows 0-8 and 6-9, columns 0-8 and 6-8
    tiles = [(1, 8, 8, 4), (1, 8, 2, 4), (1, 3, 8, 4), (1, 3, 2, 4)]
    assert shapes == tiles * 2


@pytest.mark.parametrize("axis", [1, 2])
def test_blend(axis):
    before, tile = mx.zeros((1, 6, 6, 2)), mx.ones((1, 5, 5, 2))
    before, tile = (mx.take(x, mx.arange(5), axis=3 - axis) for x in (before, tile))
    faded = np.array(blend(before, tile, 4, axis))[0, ..., 0]
    line = faded[:, 2] if axis == 1 else faded[2]
    np.testing.assert_allclose(line, [0, 0.25, 0.5, 0.75, 1])


def test_blend_is_cut_to_the_smaller():
    line = blend(mx.zeros((1, 3, 1, 1)), mx.ones((1, 2, 1, 1)), 4, axis=1)
    np.testing.assert_allclose(line.flatten(), [0, 0.5])
    tile = mx.ones((1, 2, 1, 1))
    assert blend(mx.zeros((1, 3, 1, 1)), tile, 0, axis=1) is tile


def test_clamped_log_variance():
    moments = mx.array([0.0, 0.0, -100.0, 100.0]).reshape(1, 4, 1, 1)
    latents = DiagonalGaussian.from_moments(moments)
    np.testing.assert_allclose(latents.logvar.flatten(), [-30, 20])
    np.testing.assert_allclose(latents.std.flatten(), [np.exp(-15), np.exp(10)], rtol=1e-6)
    assert latents.mode() is latents.mean


def test_scaling(vae):
    z = mx.array([1.0, -2.0])
    np.testing.assert_allclose(vae.scale_latents(z), [0.18215, -0.3643], rtol=1e-6)
    np.testing.assert_allclose(vae.unscale_latents(vae.scale_latents(z)), z, rtol=1e-6)
    shifted = AutoencoderKL(scaling_factor=0.5, shift_factor=0.25)
    np.testing.assert_allclose(shifted.scale_latents(z), [0.375, -1.125], rtol=1e-6)
    np.testing.assert_allclose(shifted.unscale_latents(shifted.scale_latents(z)), z, rtol=1e-6)
    assert shifted.scale_latents(z.astype(mx.float16)).dtype == mx.float16


# Memory, by arithmetic alone.


def test_parameters_of_stable_diffusion(large):
    assert large.num_parameters() == 83_653_863
    assert len(tree_flatten(large.parameters())) == 248


@pytest.mark.parametrize(
    ("height", "width", "frames"),
    [(64, 64, 16), (128, 128, 4), (256, 256, 1), (320, 576, 1), (576, 1024, 1)],
)
def test_frames_per_chunk(large, height, width, frames):
    """The largest activation is the last level's input: 256 channels at full size."""
    assert large.frames_per_chunk(height, width) == frames
    if frames > 1:
        assert frames * 256 * height * width == 2**24


def test_no_array_reaches_two_to_the_31(large, monkeypatch):
    z = mx.zeros((200, 4, 72, 128))  # of 1024x576: 256 * 1024 * 576 elements a frame, 14 frames
    with pytest.raises(ValueError, match=r"chunk_size=15 frames of 1024x576 .* use at most 14"):
        large.decode(z, chunk_size=15)
    with pytest.raises(ValueError, match=r"chunk_size=15 frames of 1024x576"):
        large.encode(mx.zeros((20, 3, 576, 1024)), chunk_size=15)
    taken = []
    monkeypatch.setattr(large, "_decode_chunk", lambda z: (taken.append(z.shape), z)[1])
    large.decode(z[:14], chunk_size=14)
    assert taken == [(14, 4, 72, 128)]


def test_a_frame_that_is_too_large_needs_tiles(large):
    z = mx.zeros((1, 4, 256, 256))  # scores of 65536 x 65536
    with pytest.raises(ValueError, match=r"one frame of 2048x2048 .* enable_tiling\(\), or .* --vae-tiling"):
        large.decode(z)
    large.enable_tiling()
    assert large.frames_per_chunk(2048, 2048) == large.frames_per_chunk(512, 512) == 1


# Names of old files, and errors.


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("encoder.mid_block.attentions.0.query.weight", "to_q.weight"),
        ("decoder.mid_block.attentions.0.key.bias", "to_k.bias"),
        ("decoder.mid_block.attentions.0.value.weight", "to_v.weight"),
        ("decoder.mid_block.attentions.0.proj_attn.bias", "to_out.0.bias"),
    ],
)
def test_legacy_names(key, name):
    renamed = AutoencoderKL.rename_key(key, ())
    assert renamed == f"{key.split('.0.')[0]}.0.{name}"
    assert AutoencoderKL.rename_key(renamed, ()) == renamed


@pytest.mark.parametrize(
    "key",
    [
        "decoder.mid_block.attentions.0.group_norm.weight",
        "decoder.mid_block.attentions.0.query_norm.weight",
        "decoder.up_blocks.0.query.weight",
        "post_quant_conv.weight",
        "key",
    ],
)
def test_other_names_stay(key):
    assert AutoencoderKL.rename_key(key, ()) == key


@pytest.mark.parametrize("convolutions", [False, True])
def test_legacy_files_load(tmp_path, vae, cases, convolutions):
    weights = {}
    for key, value in mx.load(str(GOLDEN / "diffusion_pytorch_model.safetensors")).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{old}.")
                if convolutions and value.ndim == 2:
                    value = value[:, :, None, None]
        weights[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in weights
    mx.save_safetensors(
        str(tmp_path / "diffusion_pytorch_model.safetensors"), weights, metadata={"format": "pt"}
    )
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    old = AutoencoderKL.from_pretrained(tmp_path)
    assert mx.array_equal(old.decode(cases["plain.z"]), vae.decode(cases["plain.z"]))


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_save_and_load(tmp_path, vae, cases, layout):
    vae.save_pretrained(tmp_path, layout=layout)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert again.config == vae.config
    assert mx.array_equal(again.decode(cases["plain.z"]), vae.decode(cases["plain.z"]))


def test_optional_parts_are_absent():
    vae = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    names = [name for name, _ in tree_flatten(vae.parameters())]
    assert not any("quant_conv" in name or "attentions" in name for name in names)
    assert vae.decode(vae.encode(mx.zeros((1, 3, 8, 8))).mode()).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("AttnDownEncoderBlock2D",)}, "supports 'DownEncoderBlock2D' only"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types has 'UpBlock2D'"),
        ({"block_out_channels": (64, 64)}, "one entry for each of block_out_channels"),
        ({"latents_mean": (0.0,) * 4}, "channel by channel"),
        ({"norm_num_groups": 0}, "norm_num_groups=0"),
        ({"norm_num_groups": 24}, "norm_num_groups=24 does not divide 64"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"act_fn": "tanhh"}, "act_fn='tanhh'"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**change)


def test_wrong_inputs(vae):
    with pytest.raises(ValueError, match=r"x has shape .*\(frames, 3, height, width\)"):
        vae.encode(mx.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"z has shape .*\(frames, 4, height, width\)"):
        vae.decode(mx.zeros((1, 4, 2, 8, 8)))
    with pytest.raises(ValueError, match="not empty"):
        vae.decode(mx.zeros((0, 4, 8, 8)))
    with pytest.raises(ValueError, match="floating"):
        vae.encode(mx.zeros((1, 3, 8, 8), dtype=mx.uint8))
    with pytest.raises(ValueError, match="x is 8x1; an image needs at least 2x2"):
        vae.encode(mx.zeros((1, 3, 1, 8)))
    for chunk_size in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"chunk_size={chunk_size}"):
            vae.decode(mx.zeros((1, 4, 8, 8)), chunk_size=chunk_size)


def test_a_last_tile_of_one_pixel_is_refused(vae):
    vae.enable_tiling()
    with pytest.raises(ValueError, match="the last tile is 16x1 pixels"):
        vae.encode(mx.zeros((1, 3, 25, 16)))
