"""Preprocessing of images without torch: goldens of transformers and diffusers, forms of input, errors."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import CLIPImageProcessor
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.image_processor import (
    crop_wide,
    resize_antialiased,
    rgb_images,
    vae_pixels,
    vae_pixels_cropped,
)
from PIL import Image

GOLDEN = Path(__file__).parent / "goldens" / "clip_vision"


@pytest.fixture
def cases():
    return mx.load(str(GOLDEN / "cases.safetensors"))


def test_golden_of_the_standard_way(cases):
    """Of an image with transparency; the crop is smaller than it one way and larger the other."""
    processor = CLIPImageProcessor.from_pretrained(GOLDEN)
    np.testing.assert_allclose(processor(cases["image"]), cases["standard"], rtol=0, atol=1e-6)


def test_golden_of_the_antialiased_way(cases):
    """The blur takes one axis together, and leaves the other, which grows."""
    resized = resize_antialiased(np.array(cases["image"])[..., :3], 7, 40) / 255
    np.testing.assert_allclose(resized.transpose(2, 0, 1)[None], cases["antialiased"], rtol=0, atol=1e-6)
    processor = CLIPImageProcessor(image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    pixels = processor.antialiased(cases["image"][..., :3], height=7, width=40)
    np.testing.assert_allclose(pixels, (cases["antialiased"] - 0.5) / 0.25, rtol=0, atol=4e-6)


def test_golden_of_the_box_filter(cases):
    image = Image.fromarray(np.array(cases["image"])[..., :3])
    np.testing.assert_array_equal(crop_wide(image, 12, 16), cases["cropped"])
    pixels = vae_pixels_cropped(image, height=16, width=12)
    expected = np.array(cases["cropped"]).transpose(2, 0, 1)[None] / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


def test_the_square_before_the_bilinear_filter(cases):
    processor = CLIPImageProcessor(crop_size=(4, 5), image_mean=(0,) * 3, image_std=(1,) * 3)
    image = Image.fromarray(np.array(cases["image"])[..., :3])
    pixels = np.array(processor.box_cropped(image, width=12))
    square = crop_wide(image, 12, 12).resize((5, 4), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0) * 255, square, atol=1e-4)
    rows = Image.fromarray(np.array(cases["cropped"])).resize((5, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(rows, cases["bilinear"])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3)])
def test_an_even_image_stays_even(size):
    """At all sizes, those where torch has no pixels to mirror included."""
    image = np.full((*size, 3), 51, np.uint8)
    processor = CLIPImageProcessor(image_mean=(0.1,) * 3, image_std=(0.5,) * 3)
    for pixels in (processor(image), processor.antialiased(image)):
        assert pixels.shape == (1, 3, 224, 224)
        np.testing.assert_allclose(pixels, np.full(pixels.shape, 0.2), rtol=0, atol=1e-6)
    np.testing.assert_allclose(vae_pixels(image, 16, 24), np.full((1, 3, 16, 24), -0.6), atol=1e-6)


def test_multiples_of_eight():
    assert vae_pixels(np.zeros((9, 9), np.uint8), 31, 40).shape == (1, 3, 24, 40)
    with pytest.raises(ValueError, match="height=7 and width=40 must be at least 8"):
        vae_pixels(np.zeros((9, 9), np.uint8), 7, 40)


def test_forms_of_one_image():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    floats = (pixels / 255).astype(np.float32)
    forms = [
        Image.fromarray(pixels),
        pixels,
        floats,
        mx.array(pixels),
        mx.array(floats),
        pixels[None],
        [pixels],
    ]
    for form in forms:
        (image,) = rgb_images(form)
        np.testing.assert_array_equal(image, pixels)
    assert len(rgb_images([pixels, Image.new("L", (3, 4))])) == 2


def test_grey_and_transparent_images():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for form in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(rgb_images(form)[0], np.repeat(grey[..., None], 3, axis=-1))
    clear = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    np.testing.assert_array_equal(rgb_images(clear)[0], [[[255] * 3, [10, 20, 30], [204] * 3]])


def test_exif_is_obeyed_where_asked_for():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    image.getexif()[0x0112] = 6  # a camera turned clockwise
    turned = rgb_images(image, exif_transpose=True)[0]
    np.testing.assert_array_equal(np.array(turned)[..., 0], [[3, 0], [4, 1], [5, 2]])
    assert rgb_images(image)[0].size == (3, 2)
    assert rgb_images(turned, exif_transpose=True)[0].size == (2, 3)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("cat.png", TypeError, "an image is a str"),
        ([], ValueError, "images is empty"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"shape \(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 3\)"),
        (np.zeros((3, 4, 3), np.int64), TypeError, "array of int64; give uint8"),
        (np.full((3, 4, 3), 2.0), ValueError, r"pixel values span \[2, 2\]"),
        (Image.fromarray(np.zeros((3, 4), np.uint16)), ValueError, "mode 'I;16'.*8 bits"),
        (Image.new("RGB", (0, 3)), ValueError, r"size \(0, 3\)"),
    ],
)
def test_what_is_no_image(images, error, message):
    with pytest.raises(error, match=message):
        CLIPImageProcessor()(images)


def test_images_of_several_sizes():
    images = [Image.new("RGB", (4, 6)), Image.new("RGB", (6, 4))]
    assert CLIPImageProcessor()(images).shape == (2, 3, 224, 224)
    with pytest.raises(ValueError, match="come out in the sizes 336x224, 224x336"):
        CLIPImageProcessor(do_center_crop=False)(images)


def test_config_files(tmp_path):
    """Integers of old files, null, and keys of transformers itself."""
    content = {
        "size": 64,
        "crop_size": 48,
        "resample": None,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert processor.config.size == 64
    assert processor.crop == (48, 48)
    path = processor.save_pretrained(tmp_path / "saved")
    saved = json.loads(path.read_text())
    assert saved["size"] == {"shortest_edge": 64}
    assert saved["crop_size"] == {"height": 48, "width": 48}
    again = CLIPImageProcessor.from_pretrained(tmp_path / "saved")
    assert again.crop == (48, 48)
    assert again.config.resample == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": {"longest_edge": 3}}, "size={'longest_edge': 3} must have"),
        ({"size": 0}, "size=0 must be"),
        ({"resample": 99}, "resample=99 must be 0 to"),
        ({"image_std": [0, 1, 1]}, "image_std=.* must not have a zero"),
        ({"image_mean": [1, 2]}, "image_mean=.* must be"),
        ({"crop_size": "large"}, "crop_size='large' must be"),
    ],
)
def test_wrong_config_files(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {message}"):
        CLIPImageProcessor.from_pretrained(tmp_path)
