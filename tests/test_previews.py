"""The linear map from latents to colours: what it fits, and how it is kept."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import AutoencoderKL, AutoencoderKLTemporalDecoder
from mlx_unet3d.pipelines import previews
from mlx_unet3d.pipelines.previews import LatentColours, Previews, fit_colours, latent_colours

MATRIX = np.array([[0.5, 0.1, 0.0], [0.0, 0.4, 0.1], [0.2, 0.0, 0.6], [0.0, 0.0, 0.0]])


class LinearVAE(AutoencoderKL):
    """A VAE that is linear: the first three of its four channels are colours, mixed, 8 pixels each way."""

    def encode(self, x, chunk_size=None):
        n, c, height, width = x.shape
        mean = x.reshape(n, c, height // 8, 8, width // 8, 8).mean((3, 5))
        mixed = mx.einsum("nchw,cd->ndhw", mean, mx.array(np.linalg.inv(MATRIX[:3]).astype(np.float32)))
        mixed = mx.concatenate([mixed, mx.zeros_like(mixed[:, :1])], axis=1)
        return type("Distribution", (), {"mode": staticmethod(lambda: mixed)})

    def decode(self, z, chunk_size=None):
        colours = mx.einsum("nchw,cd->ndhw", z, mx.array(MATRIX.astype(np.float32)))
        return mx.repeat(mx.repeat(colours, 8, 2), 8, 3)


@pytest.fixture
def vae():
    return tiny.randomize(AutoencoderKL(**tiny.VAE), 1)


def test_a_linear_decoder_is_found():
    vae = LinearVAE(**tiny.VAE)
    found = fit_colours(vae)
    # From latents of a run to [0, 1], not to the decoder's [-1, 1].
    np.testing.assert_allclose(np.array(found.weights), MATRIX / 2 / vae.config.scaling_factor, atol=0.02)
    np.testing.assert_allclose(found.bias, 0.5, atol=0.02)
    assert found.error < 0.1
    rng = np.random.default_rng(0)
    latents = rng.uniform(-0.1, 0.1, (2, 4, 3, 2, 5)).astype(np.float32)
    frames = found(mx.array(latents))
    assert frames.shape == (2, 3, 2, 5, 3)
    decoded = np.array(vae.decode(vae.unscale_latents(mx.array(latents[1, :, 2][None]))))
    expected = (decoded[0, :, ::8, ::8].transpose(1, 2, 0) / 2 + 0.5) * 255
    np.testing.assert_allclose(frames[1, 2], expected, atol=3)
    swapped = found(mx.array(latents.transpose(0, 2, 1, 3, 4)), frames_axis=1)
    np.testing.assert_array_equal(swapped, frames)


def test_wrong_channels_are_refused():
    colours = LatentColours(((0.1,) * 3,) * 4, (0.5,) * 3, 0.0)
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 4, 4\); give .* of C = 4 channels"):
        colours(mx.zeros((1, 3, 2, 4, 4)))
    assert (colours(mx.full((1, 4, 1, 1, 1), float("nan"))) == 0).all()


@pytest.mark.parametrize("damage", ["{", "[]", '{"weights": 1, "bias": 2, "error": 3}', "\0", None])
def test_cache(vae, tmp_path, monkeypatch, damage):
    """One file a VAE; a damaged one is made anew, and another VAE does not take it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    first = LatentColours(((0.1, 0.2, 0.3),) * 4, (0.5, 0.5, 0.5), 0.25)
    monkeypatch.setattr(previews, "fit_colours", lambda vae: calls.append(vae) or first)
    assert latent_colours(vae) == latent_colours(vae) == first
    assert len(calls) == 1
    (path,) = previews.cache_folder().iterdir()
    assert path.is_relative_to(tmp_path)
    good = path.read_text()
    text = json.dumps(json.loads(good) | {"bias": [1, 2, float("nan")]}) if damage is None else damage
    path.write_text(text)
    assert latent_colours(vae) == first
    assert len(calls) == 2
    assert path.read_text() == good
    latent_colours(tiny.randomize(AutoencoderKL(**tiny.VAE), 2))
    assert len(calls) == 3
    assert len(list(previews.cache_folder().iterdir())) == 2


def test_no_cache_can_be_written(vae, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(previews, "fit_colours", lambda vae: LatentColours(((0.1,) * 3,) * 4, (0.5,) * 3, 0))
    assert latent_colours(vae).error == 0


@pytest.mark.parametrize("temporal", [False, True])
def test_previews_decode_what_is_not_linear(monkeypatch, temporal):
    """A VAE that is small and poorly fitted is run itself, any other is not."""
    kind = AutoencoderKLTemporalDecoder if temporal else AutoencoderKL
    vae = tiny.randomize(kind(**(tiny.TEMPORAL_VAE if temporal else tiny.VAE)), 1)
    axis = 1 if temporal else 2
    latents = mx.random.normal((1, 2, 4, 3, 3) if temporal else (1, 4, 2, 3, 3))
    for error, side in ((0.2, 3), (1.5, 24)):
        colours = LatentColours(((0.1,) * 3,) * 4, (0.5,) * 3, error)
        monkeypatch.setattr(previews, "fit_colours", lambda vae, colours=colours: colours)
        show = Previews(vae, axis, cache=False)
        frames = show(latents)
        assert frames.shape == (2, side, side, 3)
        assert frames.dtype == np.uint8
        assert show(latents, 1).shape == (1, side, side, 3)
        if error < 1 or not temporal:
            np.testing.assert_allclose(show(latents, 1)[0].astype(int), frames[1], atol=1)


def test_fit_of_a_temporal_decoder():
    found = fit_colours(tiny.randomize(AutoencoderKLTemporalDecoder(**tiny.TEMPORAL_VAE), 1))
    assert np.isfinite(np.array(found.weights)).all()
    assert len(found.weights) == 4
