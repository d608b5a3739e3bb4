"""AnimateDiff on the command line."""

import numpy as np
import pytest
import tiny
from mlx_unet3d import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    CLIPTextModelWithProjection,
    DDIMScheduler,
    UNetMotionModel,
    load_pipeline,
    media,
)
from mlx_unet3d.cli import main
from PIL import Image


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write_stable_diffusion(folder / "base", folder / "motion")
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(*arguments):
    return main(["generate", "a cat", *map(str, arguments), "--steps", "2", "--memory", "off"])


SHORT = dict(num_frames=3, num_inference_steps=2)


def motion_sampler(pipe):
    """The schedule that motion modules were trained on, in place of the base's."""
    changes = dict(beta_schedule="linear", timestep_spacing="linspace", steps_offset=1, clip_sample=False)
    return DDIMScheduler.from_config(pipe.scheduler.config, **changes)


def test_stable_diffusion_with_a_motion_adapter(place, capsys):
    words = ["--model", place / "base", "--num-frames", 3, "--negative-prompt", "rain"]
    assert generate(*words, "--motion-adapter", place / "motion", "-o", "out.png") == 0
    pipe = load_pipeline(place / "base", motion_adapter=place / "motion")
    assert type(pipe) is AnimateDiffPipeline
    pipe.scheduler = motion_sampler(pipe)
    expected = pipe("a cat", negative_prompt="rain", **SHORT).frames
    assert np.array_equal(media.read_video("out.png")[0], media.to_uint8(expected[0]))
    assert media.read_metadata("out.png")["motion_adapter"] == "motion"
    again = ["generate", "--from", "out.png", "-o", "again.png", "--model", str(place / "base")]
    assert main(again) == 2
    assert "names the motion adapter motion, which is not in the current folder" in capsys.readouterr().err
    assert main([*again, "--motion-adapter", str(place / "motion")]) == 0
    assert np.array_equal(media.read_video("again.png")[0], media.read_video("out.png")[0])

    assert generate(*words, "-o", "none.png") == 2
    assert "--motion-adapter" in capsys.readouterr().err
    image = Image.new("RGB", (8, 8))
    image.save("in.png")
    assert generate(*words, "--ip-image", "in.png", "-o", "none.png") == 2
    assert "--ip-adapter and --ip-image go together" in capsys.readouterr().err


def test_a_video_with_a_motion_adapter(place):
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    media.write_video("in.png", video)
    words = ["--model", place / "base", "--motion-adapter", place / "motion", "--video", "in.png"]
    assert generate(*words, "-o", "out.png") == 0
    pipe = AnimateDiffVideoToVideoPipeline.from_pretrained(place / "base", motion_adapter=place / "motion")
    pipe.scheduler = motion_sampler(pipe)
    expected = pipe(list(video), "a cat", strength=0.6, num_inference_steps=2).frames
    assert np.abs(media.read_video("out.png")[0] / 255 - expected[0]).max() < 0.01


def test_sdxl(place, tmp_path):
    base = load_pipeline(place / "base", motion_adapter=place / "motion")
    size = dict(addition_time_embed_dim=2, projection_class_embeddings_input_dim=12 + 8)
    config = tiny.MOTION | size | {"addition_embed_type": "text_time", "cross_attention_dim": 24}
    words = base.text_encoder.config.vocab_size
    parts = base.components | {
        "unet": tiny.randomize(UNetMotionModel(**config), 4),
        "text_encoder_2": tiny.randomize(
            CLIPTextModelWithProjection(vocab_size=words, **tiny.TEXT, projection_dim=8), 5
        ),
        "tokenizer_2": base.tokenizer,
    }
    pipe = AnimateDiffSDXLPipeline(**parts)
    pipe.save_pretrained("xl")
    assert generate("--model", "xl", "--num-frames", 3, "-o", "out.png") == 0
    frames = media.to_uint8(pipe("a cat", **SHORT).frames[0])
    assert np.array_equal(media.read_video("out.png")[0], frames)

    guided = config | {"time_cond_proj_dim": 4}
    with pytest.raises(ValueError, match="takes guidance as an embedding"):
        AnimateDiffSDXLPipeline(**parts | {"unet": tiny.randomize(UNetMotionModel(**guided), 4)})
