"""AnimateDiff on the command line."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import original_files as original
import pytest
import tiny
from mlx_unet3d import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    DDIMScheduler,
    LCMScheduler,
    UNetMotionModel,
    load_pipeline,
    media,
)
from mlx_unet3d.cli import main
from mlx_unet3d.schedulers import scheduler_from_config
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
    video = np.random.default_rng(0).integers(0, 256, (3, 43, 50, 3), np.uint8)  # not the trained size
    media.write_video("in.png", video)
    words = ["--model", place / "base", "--motion-adapter", place / "motion", "--video", "in.png"]
    assert generate(*words, "-o", "out.png") == 0
    pipe = AnimateDiffVideoToVideoPipeline.from_pretrained(place / "base", motion_adapter=place / "motion")
    pipe.scheduler = motion_sampler(pipe)
    expected = pipe(video, "a cat", 40, 48, num_inference_steps=2).frames
    assert expected.shape == (1, 3, 40, 48, 3)
    assert np.array_equal(media.read_video("out.png")[0], media.to_uint8(expected[0]))
    assert media.read_metadata("out.png")["strength"] == 0.8


def test_motion_modules_bring_their_sampler_steps_and_guidance(place, capsys):
    shutil.copytree(place / "motion", "AnimateLCM")
    words = ["generate", "a cat", "--model", str(place / "base"), "--motion-adapter", "./AnimateLCM"]
    assert main([*words, "--num-frames", "2", "--memory", "off", "-o", "out.png"]) == 0
    assert "AnimateLCM's motion modules, sampled by LCMScheduler" in capsys.readouterr().err
    found = media.read_metadata("out.png")
    assert [found[name] for name in ("scheduler", "steps", "guidance")] == ["LCMScheduler", 6, 2.0]
    pipe = load_pipeline(place / "base", motion_adapter=place / "motion")
    pipe.save_pretrained("joined")  # its own sampler stays, whatever modules replace its own
    words = ["--model", "joined", "--motion-adapter", "AnimateLCM", "--num-frames", 2, "-o", "2.png"]
    assert generate(*words) == 0
    assert media.read_metadata("2.png")["scheduler"] == type(pipe.scheduler).__name__


def test_a_few_step_lora_on_the_schedule_of_the_motion_modules(place, capsys):
    pipe = load_pipeline(place / "base", motion_adapter=place / "motion")
    tensors = {
        f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{half}.weight": mx.ones((8, 8))
        / 8
        for half in "AB"
    }
    Path("lcm-lora").mkdir()
    mx.save_safetensors("lcm-lora/pytorch_lora_weights.safetensors", tensors)
    words = ["--model", str(place / "base"), "--motion-adapter", str(place / "motion"), "--num-frames", "3"]
    assert main(["generate", "a cat", *words, "--lora", "./lcm-lora", "-o", "out.png"]) == 0
    assert "LCM-LoRA, sampled by LCMScheduler, steps 4, guidance 1" in capsys.readouterr().err
    pipe.load_lora_weights("lcm-lora")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    expected = pipe("a cat", num_frames=3, num_inference_steps=4, guidance_scale=1.0).frames
    assert np.array_equal(media.read_video("out.png")[0], media.to_uint8(expected[0]))


def test_switches_of_video_to_video(place):
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    pipe = AnimateDiffVideoToVideoPipeline.from_pretrained(place / "base", motion_adapter=place / "motion")
    settings = dict(num_inference_steps=2, output_type="latent")
    plain = pipe(video, "a cat", **settings).frames
    travel = pipe(video, {0: "a cat", 2: "a dog"}, **settings).frames
    assert not mx.allclose(travel, plain, atol=1e-4)
    assert mx.allclose(pipe(video, {0: "a cat"}, **settings).frames, plain, atol=1e-4)
    with pytest.raises(ValueError, match="states are those of 2 frames"):
        pipe.steps(pipe.encode_prompt({0: "a cat"}, num_frames=2), video, num_inference_steps=2)
    pipe.enable_free_noise(2, 1)
    assert not mx.allclose(pipe(video, "a cat", **settings).frames, plain, atol=1e-4)
    pipe.disable_free_noise()
    pipe.enable_free_init(num_iters=2)
    with pytest.raises(ValueError, match=r"iteration 2 no step: each runs strength=0.6 of .*, 2, 1, 0;"):
        pipe(video, "a cat", strength=0.6, **settings | dict(num_inference_steps=4))
    states = pipe.encode_prompt("a cat")
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        pipe.scheduler = scheduler_from_config(pipe.scheduler.config, name)
        args = dict(num_inference_steps=8, strength=0.7)  # 5 steps without it, then 3 and 2
        records = list(pipe.steps(states, video, **args))
        evaluations = 2 if name.startswith("Heun") else 1
        assert {record.total for record in records} == {5 * evaluations - (evaluations - 1) * 2}
        done = [record.prediction for record in records[:4]]
        again = list(pipe.steps(states, video, **args, predictions=done))
        assert mx.array_equal(again[-1].latents, records[-1].latents)
        assert mx.abs(records[-1].latents).max() < 50  # noise went back to the level of its schedule
    with pytest.raises(ValueError, match="FreeInit divides num_inference_steps anew"):
        pipe(video, "a cat", timesteps=[900, 500])


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

    embedded = tiny.randomize(UNetMotionModel(**config, time_cond_proj_dim=4), 4)
    AnimateDiffSDXLPipeline(**parts | {"unet": embedded}).save_pretrained("embedded")
    one_pass = load_pipeline("embedded")
    assert not one_pass.is_guided(5.0)
    weak, strong = (one_pass("a cat", guidance_scale=w, **SHORT).frames for w in (2.0, 9.0))
    assert abs(weak - strong).max() > 1e-3


def test_ip_adapters_and_their_image_encoders(place, tmp_path, capsys):
    """The folders of the authors: an encoder beside the file, or that in `models` where it does not fit."""
    unet = load_pipeline(place / "base", motion_adapter=place / "motion").unet
    width, channels = unet.config.cross_attention_dim, tiny.VISION["projection_dim"]
    rng = np.random.default_rng(0)
    shapes = {"proj.weight": (4 * width, channels), "proj.bias": (4 * width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    tensors = {f"image_proj.{key}": rng.normal(size=shape) for key, shape in shapes.items()}
    for i, attn in enumerate(unet._image_attentions().values()):
        for letter in "kv":
            key = f"ip_adapter.{2 * i + 1}.to_{letter}_ip.weight"
            tensors[key] = rng.normal(size=(attn.query_dim, width))
    tensors = {key: array.astype(np.float32) for key, array in tensors.items()}
    files = tmp_path / "files"
    (files / "sdxl_models").mkdir(parents=True)
    mx.save_safetensors(
        str(files / "sdxl_models" / "ip.safetensors"), {key: mx.array(a) for key, a in tensors.items()}
    )
    original.write_pickle(files / "sdxl_models" / "ip.bin", tensors)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save("in.png")
    words = ["--model", place / "base", "--motion-adapter", place / "motion", "--num-frames", 2]
    words += ["--ip-image", "in.png"]

    assert generate(*words, "--ip-adapter", files / "sdxl_models" / "ip.bin", "-o", "none.png") == 2
    error = capsys.readouterr().err
    assert "ip.bin needs an image encoder of projection_dim=12, and there is none in " in error
    other = CLIPVisionModelWithProjection(**tiny.VISION | {"projection_dim": 20})
    other.save_pretrained(files / "sdxl_models" / "image_encoder")
    assert generate(*words, "--ip-adapter", files / "sdxl_models" / "ip.bin", "-o", "none.png") == 2
    assert (
        "sdxl_models/image_encoder has projection_dim=20; give the one that comes" in capsys.readouterr().err
    )
    encoder = tiny.randomize(CLIPVisionModelWithProjection(**tiny.VISION), 3)
    encoder.save_pretrained(files / "models" / "image_encoder")
    found = []
    for name in ("ip.bin", "ip.safetensors"):
        assert generate(*words, "--ip-adapter", files / "sdxl_models" / name, "-o", f"{name}.png") == 0
        found.append(media.read_video(f"{name}.png")[0])
    assert np.array_equal(*found)
    pipe = load_pipeline(place / "base", motion_adapter=place / "motion")
    pipe.load_ip_adapter(files, "sdxl_models", "ip.safetensors")
    pipe.scheduler = motion_sampler(pipe)
    picture = Image.open("in.png")
    frames = pipe("a cat", ip_adapter_image=picture, num_frames=2, num_inference_steps=2).frames
    assert np.array_equal(media.to_uint8(frames[0]), found[0])
    pipe.unload_ip_adapter()
    pipe.image_encoder = other
    with pytest.raises(ValueError, match="the pipeline's image encoder has projection_dim=20"):
        pipe.load_ip_adapter(files, "sdxl_models", "ip.safetensors")
    assert "encoder_hid_proj" not in pipe.unet
