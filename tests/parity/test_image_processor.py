"""Preprocessing of images against transformers' and diffusers' own, live."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import numpy as np  # noqa: E402
from mlx_unet3d import CLIPImageProcessor  # noqa: E402
from diffusers.image_processor import VaeImageProcessor  # noqa: E402
from diffusers.pipelines.deprecated.i2vgen_xl import pipeline_i2vgen_xl as i2v  # noqa: E402
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd  # noqa: E402
from diffusers.utils import load_image  # noqa: E402
from mlx_unet3d.image_processor import rgb_images, vae_pixels, vae_pixels_cropped  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-6

SIZES = {  # height, width
    "landscape": (90, 160),
    "portrait": (301, 97),
    "equal": (224, 224),
    "tiny": (2, 3),
    "huge": (1501, 2203),
    "strip": (3, 700),
}


def picture(height, width, mode="RGB", seed=0) -> Image.Image:
    """Noise over a ramp: something for each filter to get wrong."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    pixels = np.clip(ramp + rng.normal(0, 30, (height, width, channels)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode=None)


@pytest.fixture(params=SIZES, ids=str)
def image(request):
    return picture(*SIZES[request.param])


def difference(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(np.array(ours) - theirs).max())


def standard(processor, images):
    return processor(images=images, return_tensors="pt").pixel_values


CONFIGS = {
    "default": {},
    "bilinear": dict(resample=2, size={"shortest_edge": 61}, crop_size={"height": 40, "width": 56}),
    "square": dict(size={"height": 30, "width": 44}, do_center_crop=False),
    "border": dict(size={"shortest_edge": 20}, crop_size={"height": 33, "width": 400}),
    "old": dict(size=64, crop_size=64, resample=1, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]),
    "bare": dict(do_rescale=False, do_resize=False),
    "not-normalized": dict(do_normalize=False, rescale_factor=1 / 127.5, resample=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_standard(name, image, tmp_path):
    theirs = CLIPImageProcessorPil(**CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = CLIPImageProcessor.from_pretrained(tmp_path)
    assert difference(ours(image), standard(theirs, image)) <= TOLERANCE
    ours.save_pretrained(tmp_path / "ours")
    back = CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert difference(ours(image), standard(back, image)) <= TOLERANCE


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_modes(mode):
    images = [picture(40, 70, mode), picture(70, 40, mode, 1)]
    assert difference(CLIPImageProcessor()(images), standard(CLIPImageProcessorPil(), images)) <= TOLERANCE


def test_palette_with_transparency():
    image = picture(40, 70).convert("P")
    image.info["transparency"] = 7
    assert difference(CLIPImageProcessor()(image), standard(CLIPImageProcessorPil(), image)) <= TOLERANCE


def test_arrays():
    images = np.stack([np.asarray(picture(40, 70, seed=seed)) for seed in range(2)])
    assert (
        difference(CLIPImageProcessor()(images), standard(CLIPImageProcessorPil(), list(images))) <= TOLERANCE
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(orientation, tmp_path):
    """As diffusers' `load_image` turns them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 70).save(tmp_path / "photo.png", exif=exif)
    expected = load_image(str(tmp_path / "photo.png"))
    with Image.open(tmp_path / "photo.png") as photo:
        (turned,) = rgb_images(photo, exif_transpose=True)
        (plain,) = rgb_images(photo)
    np.testing.assert_array_equal(turned, expected)
    assert plain.size == (70, 40)


class Pipeline:
    """The parts of a pipeline that its `_encode_image` touches, with the pixels for an embedding."""

    def __init__(self, do_resize):
        self.video_processor = VaeImageProcessor(do_resize=do_resize)
        self.feature_extractor = CLIPImageProcessorPil()
        self.do_classifier_free_guidance = False
        self.image_encoder = self

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, pixels):
        self.pixels = pixels
        return type("Output", (), {"image_embeds": torch.zeros(1, 1)})


def test_antialiased(image):
    """Stable Video Diffusion's image for CLIP, by its own method."""
    pipe = Pipeline(do_resize=True)
    svd.StableVideoDiffusionPipeline._encode_image(pipe, image, "cpu", 1, False)
    # In units of the standard deviation, float32 at the far ends of the cubic: 4 of them
    assert difference(CLIPImageProcessor().antialiased(image), pipe.pixels) <= 4 * TOLERANCE


def test_box_cropped(image):
    """I2VGen-XL's image for CLIP, by its own functions and method."""
    for width in (64, 96):
        pipe = Pipeline(do_resize=False)
        cropped = i2v._resize_bilinear(i2v._center_crop_wide(image, (width, width)), (224, 224))
        i2v.I2VGenXLPipeline._encode_image(pipe, cropped, "cpu", 1)
        assert difference(CLIPImageProcessor().box_cropped(image, width=width), pipe.pixels) <= TOLERANCE


def test_vae_pixels(image):
    for height, width in ((64, 96), (75, 50)):
        expected = VaeImageProcessor(do_resize=True, vae_scale_factor=8).preprocess(image, height, width)
        assert difference(vae_pixels(image, height, width), expected) <= TOLERANCE


def test_vae_pixels_cropped(image):
    for height, width in ((64, 96), (88, 40)):
        cropped = i2v._center_crop_wide(image, (width, height))
        expected = VaeImageProcessor(do_resize=False).preprocess(cropped)
        assert difference(vae_pixels_cropped(image, height, width), expected) <= TOLERANCE
