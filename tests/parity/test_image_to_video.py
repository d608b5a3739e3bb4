"""Whole pipelines from images against diffusers' StableVideoDiffusionPipeline and I2VGenXLPipeline."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mlx_unet3d  # noqa: E402
import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import transformers  # noqa: E402
from mlx_unet3d.schedulers import scheduler_from_config  # noqa: E402
from PIL import Image  # noqa: E402
from reference import to_mlx  # noqa: E402
from tiny import write_tokenizer  # noqa: E402
from video_networks import I2V, SVD, randomize  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

EULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
    timestep_type="continuous",
    timestep_spacing="leading",
    steps_offset=1,
    interpolation_type="linear",
)
DDIM = dict(
    beta_schedule="squaredcos_cap_v2",
    rescale_betas_zero_snr=True,
    prediction_type="v_prediction",
    clip_sample=False,
    steps_offset=1,
)


def vision() -> transformers.CLIPVisionModelWithProjection:
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
        projection_dim=24,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture, as photographs are: noise alone would hide errors of a resize."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return rough.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(**SVD, num_frames=3)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=64,
    )
    encoder = vision()
    for model in (unet, vae, encoder):
        randomize(model.eval())
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae, encoder, unet, diffusers.EulerDiscreteScheduler(**EULER), transformers.CLIPImageProcessor()
    )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, mlx_unet3d.load_pipeline(folder)


SIZE = dict(height=64, width=48, num_inference_steps=3)


def svd_both(svd, seed=0, **settings):
    """Frames of both, float in [0, 1]."""
    theirs, ours = svd
    settings = SIZE | settings
    size = {name: settings[name] for name in ("height", "width")}
    assert all(side % 8 == 0 for side in size.values())
    given = {"latents": torch.tensor(np.array(settings["latents"]))} if "latents" in settings else {}
    # The global generator, as diffusers gives no other to the sampler
    generator = (
        torch.manual_seed(seed) if isinstance(seed, int) else [torch.Generator().manual_seed(s) for s in seed]
    )
    expected = theirs(**settings | given, generator=generator, output_type="np").frames
    return ours(**settings, seed=seed).frames, np.asarray(expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(seed=7, num_frames=14, num_inference_steps=2),
        dict(num_frames=25, num_inference_steps=2, decode_chunk_size=8),
        dict(min_guidance_scale=1.5, max_guidance_scale=4.0),
        dict(min_guidance_scale=2.0, max_guidance_scale=2.0),
        dict(max_guidance_scale=1.0),
        dict(fps=12, motion_bucket_id=180, noise_aug_strength=0.1),
        dict(noise_aug_strength=0.0, decode_chunk_size=1),
        dict(decode_chunk_size=2, image=[picture(96, 80), picture(96, 80, 1)]),
        dict(image=[picture(96, 80), picture(96, 80, 1)], seed=[3, 5]),
        dict(num_videos_per_prompt=2),
        dict(sigmas=[700.0, 54.5, 7.977, 0.981, 0.0]),
        dict(latents=np.random.default_rng(3).normal(size=(1, 3, 4, 8, 6)).astype(np.float32)),
        dict(image=picture(40, 600), height=48, width=80),
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_stable_video(svd, settings):
    settings = dict(image=picture(100, 80)) | settings
    if "latents" in settings:
        settings["latents"] = mx.array(settings["latents"])
    if "sigmas" in settings:  # diffusers' Karras spacing forbids a schedule of the caller's
        schedulers = [pipe.scheduler for pipe in svd]
        theirs = diffusers.EulerDiscreteScheduler(**EULER | {"use_karras_sigmas": False})
        svd[0].scheduler = theirs
        svd[1].scheduler = scheduler_from_config(
            dict(theirs.config) | {"_class_name": "EulerDiscreteScheduler"}
        )
        settings.pop("num_inference_steps", None)
    try:
        ours, theirs = svd_both(svd, **settings)
    finally:
        if "sigmas" in settings:
            for pipe, scheduler in zip(svd, schedulers, strict=True):
                pipe.scheduler = scheduler
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_stable_video_samplers_that_draw(svd, name):
    """Noise is drawn in the layout of diffusers, (B, F, C, h, w)."""
    before = [pipe.scheduler for pipe in svd]
    config = dict(beta_schedule="scaled_linear", prediction_type="v_prediction")
    svd[0].scheduler = getattr(diffusers, name)(**config)
    svd[1].scheduler = scheduler_from_config(dict(svd[0].scheduler.config) | {"_class_name": name})
    try:
        ours, theirs = svd_both(svd, image=picture(100, 80), num_inference_steps=4)
    finally:
        for pipe, scheduler in zip(svd, before, strict=True):
            pipe.scheduler = scheduler
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_stable_video_saved_and_read(svd, tmp_path, layout):
    _, ours = svd
    ours.save_pretrained(tmp_path, layout=layout)
    again = mlx_unet3d.load_pipeline(tmp_path)
    settings = dict(image=picture(100, 80), **SIZE)
    assert np.array_equal(again(**settings).frames, ours(**settings).frames)
    if layout == "diffusers":
        read = diffusers.StableVideoDiffusionPipeline.from_pretrained(tmp_path)
        read.set_progress_bar_config(disable=True)
        frames = read(**settings, generator=torch.Generator().manual_seed(0), output_type="np").frames
        assert np.abs(frames - ours(**settings).frames).max() < 1e-4


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2vgen_xl")
    write_tokenizer(folder / "tokenizer_source")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_source")
    torch.manual_seed(0)
    unet = diffusers.I2VGenXLUNet(**I2V)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu",
            eos_token_id=len(tokenizer) - 1,
        )
    )
    encoder = vision()
    for model in (unet, vae, text, encoder):
        randomize(model.eval())
    processor = transformers.CLIPImageProcessor()
    pipe = diffusers.I2VGenXLPipeline(
        vae, text, tokenizer, encoder, processor, unet, diffusers.DDIMScheduler(**DDIM)
    )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, mlx_unet3d.load_pipeline(folder)


@pytest.fixture(autouse=True)
def text_model(monkeypatch):
    """transformers 5 has no `text_model` in a CLIPTextModel, which diffusers asks for with clip_skip."""
    if not hasattr(transformers.CLIPTextModel, "text_model"):
        monkeypatch.setattr(
            transformers.CLIPTextModel, "text_model", property(lambda self: self), raising=False
        )


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(seed=7, num_frames=4, target_fps=8),
        dict(num_frames=1),
        dict(negative_prompt="rain", guidance_scale=4.0),
        dict(guidance_scale=1.0),
        dict(clip_skip=None, eta=0.5),
        dict(clip_skip=2),
        dict(
            prompt=["a cat", "a dog"],
            image=[picture(96, 80), picture(96, 80, 1)],
            negative_prompt=["rain", "snow"],
        ),
        dict(image=picture(40, 600), height=48, width=80),
        dict(image=picture(300, 64), decode_chunk_size=2),
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_i2vgen_xl(i2v, settings):
    theirs, ours = i2v
    settings = dict(prompt="a cat", image=picture(100, 80), num_frames=3, seed=0) | SIZE | settings
    seed = settings.pop("seed")
    expected = theirs(**settings, generator=torch.manual_seed(seed), output_type="np").frames
    frames = ours(**settings, seed=seed).frames
    assert frames.shape == np.asarray(expected).shape
    assert np.abs(frames - expected).max() < 1e-4


def test_i2vgen_xl_from_embeds_and_latents(i2v):
    theirs, ours = i2v
    latents = torch.randn(1, 4, 3, 8, 6, generator=torch.Generator().manual_seed(5))
    embeds, negative = (torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(s)) for s in (8, 9))
    settings = dict(image=picture(100, 80), num_frames=3, **SIZE)
    texts = dict(prompt_embeds=embeds, negative_prompt_embeds=negative, latents=latents)
    expected = theirs(**settings, **texts, generator=torch.manual_seed(2), output_type="np").frames
    frames = ours(**settings, **{name: to_mlx(x) for name, x in texts.items()}, seed=2).frames
    assert np.abs(frames - expected).max() < 1e-4


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_i2vgen_xl_saved_and_read(i2v, tmp_path, layout):
    _, ours = i2v
    ours.save_pretrained(tmp_path, layout=layout)
    settings = dict(prompt="a cat", image=picture(100, 80), num_frames=3, **SIZE)
    frames = ours(**settings).frames
    assert np.array_equal(mlx_unet3d.load_pipeline(tmp_path)(**settings).frames, frames)
    if layout == "diffusers":
        read = diffusers.I2VGenXLPipeline.from_pretrained(tmp_path)
        read.set_progress_bar_config(disable=True)
        theirs = read(**settings, generator=torch.manual_seed(0), output_type="np").frames
        assert np.abs(theirs - frames).max() < 1e-4
