"""Numbers of NumPy, and arrays of one, wherever one of Python's may stand."""

import json

import mlx_unet3d
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d.scalars import as_count, as_finite


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), np.array(2), mx.array(2)])
def test_counts(value):
    assert type(as_count("n", value)) is int


@pytest.mark.parametrize("value", [0, True, np.True_, 2.0, np.float32(2), "2", None, np.array([2, 2])])
def test_no_counts(value):
    with pytest.raises(ValueError, match="must be an integer of at least 1, or None"):
        as_count("n", value, also=", or None")


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.array([0.5]), mx.array([0.5])])
def test_finite_numbers(value):
    assert as_finite("the scale", value) == 0.5


@pytest.mark.parametrize("value", [np.nan, np.float32(np.inf), True, "0.5", None, np.ones(2)])
def test_no_finite_numbers(value):
    with pytest.raises(ValueError, match=r"the scale is .* must be a finite number"):
        as_finite("the scale", value)


def test_schedulers(tmp_path):
    scheduler = mlx_unet3d.DDIMScheduler(
        num_train_timesteps=np.int64(100), beta_start=np.float64(1e-4), clip_sample=np.False_
    )
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (config["num_train_timesteps"], config["beta_start"], config["clip_sample"]) == (100, 1e-4, False)
    one = mlx_unet3d.DDIMScheduler(num_train_timesteps=1, trained_betas=np.array([0.1]))
    assert one.config.trained_betas == (0.1,)


def test_networks():
    unet = mlx_unet3d.UNet3DConditionModel(**tiny.UNET)
    one, two = np.int64(1), np.int32(2)
    inputs = mx.ones((1, 4, 2, 6, 6)), 1, mx.ones((1, 5, 12))
    expected = unet(*inputs).sample
    unet.enable_forward_chunking(one)
    unet.set_attention_slice(two)
    unet.enable_frame_chunking(one)
    unet.enable_pixel_chunking(two)
    cache = mlx_unet3d.FeatureCache(two, one)
    found = unet(*inputs, cross_attention_kwargs={"scale": np.float32(1)}, feature_cache=cache).sample
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5 * float(mx.abs(expected).max()))
    vae = mlx_unet3d.AutoencoderKL(**tiny.VAE)
    assert vae.decode(mx.zeros((2, 4, 2, 2)), chunk_size=one).shape[0] == 2
