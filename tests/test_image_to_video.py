"""Pipelines and commands that begin with an image, without torch."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import (
    ContextWindows,
    I2VGenXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoPipeline,
    load_pipeline,
    media,
    memory,
)
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.latents import load_latents
from mlx_unet3d.pipelines.components import Recommended
from PIL import Image


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "svd": tiny.write_stable_video(folder / "svd"),
        "i2v": tiny.write_i2vgen_xl(folder / "i2v"),
        "text": tiny.write_pipeline(folder / "text"),
    }


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: load_pipeline(folder) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(width=60, height=40):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


SHORT = dict(num_inference_steps=2)
KINDS = ["svd", "i2v"]


def call(pipe, **settings):
    text = {} if isinstance(pipe, StableVideoDiffusionPipeline) else {"prompt": "a cat"}
    settings = dict(image=picture(), **SHORT) | text | settings
    return pipe(**settings).frames


def states_of(pipe):
    image = pipe.encode_image(picture())
    if isinstance(pipe, StableVideoDiffusionPipeline):
        return (image,)
    return pipe.encode_prompt("a cat", clip_skip=1), image


def test_load_pipeline_picks_the_class(pipes, folders, tmp_path):
    assert [type(pipe) for pipe in pipes.values()] == [
        StableVideoDiffusionPipeline,
        I2VGenXLPipeline,
        TextToVideoPipeline,
    ]
    with pytest.raises(CheckpointError, match="describes a 'StableVideoDiffusionPipeline'; I2VGenXLPipeline"):
        I2VGenXLPipeline.from_pretrained(folders["svd"])
    copy = shutil.copytree(folders["svd"], tmp_path / "copy")
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match="describes a 'FluxPipeline'; there are pipelines for Text"):
        load_pipeline(copy)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_images_and_output(pipes, kind):
    pipe, image = pipes[kind], picture()
    frames = call(pipe)
    assert frames.shape == (1, 3, 32, 48, 3)
    assert 0 <= frames.min() < frames.max() <= 1
    image.save("picture.png")
    for form in (
        "picture.png",
        np.asarray(image),
        np.asarray(image) / 255,
        [image],
        mx.array(np.asarray(image)),
    ):
        assert np.abs(call(pipe, image=form) - frames).max() < 1e-4
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save("turned.png", exif=exif)
    assert np.array_equal(call(pipe, image="turned.png"), frames)
    latents = call(pipe, output_type="latent")
    assert latents.shape == ((1, 3, 4, 4, 6) if kind == "svd" else (1, 4, 3, 4, 6))
    assert np.array_equal(pipe.decode(latents), frames)
    assert not np.allclose(call(pipe, seed=1), frames, atol=1e-3)
    both = call(pipe, num_videos_per_prompt=2, seed=[0, 1])
    assert np.abs(both[0] - frames[0]).max() < 1e-4
    assert np.abs(both[1] - call(pipe, seed=1)[0]).max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("svd", dict(fps=12)),
        ("svd", dict(motion_bucket_id=20)),
        ("svd", dict(noise_aug_strength=0.3)),
        ("svd", dict(min_guidance_scale=2.0)),
        ("svd", dict(max_guidance_scale=1.0)),
        ("svd", dict(decode_chunk_size=1)),
        ("i2v", dict(target_fps=4)),
        ("i2v", dict(clip_skip=None)),
        ("i2v", dict(negative_prompt="rain")),
        ("i2v", dict(guidance_scale=1.0)),
    ],
)
def test_settings_matter(pipes, kind, change):
    assert not np.array_equal(call(pipes[kind], **change), call(pipes[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_and_interleaving(pipes, kind):
    pipe = pipes[kind]
    states = states_of(pipe)
    settings = dict(num_frames=3, num_inference_steps=4, guidance_scale=3.0)
    alone = list(pipe.steps(*states, seed=3, **settings))
    again = list(pipe.steps(*states, seed=3, **settings, predictions=[r.prediction for r in alone[:2]]))
    assert mx.array_equal(again[-1].latents, alone[-1].latents)
    other = list(pipe.steps(*states, seed=4, **settings))
    runs = (pipe.steps(*states, seed=seed, **settings) for seed in (3, 4))
    pairs = list(zip(*runs, strict=True))
    for k, expected in enumerate((alone, other)):
        assert mx.array_equal(pairs[-1][k].latents, expected[-1].latents)
    assert alone[0].latents.shape == alone[0].denoised.shape == alone[0].prediction.shape


@pytest.mark.parametrize("kind", KINDS)
def test_context_windows(pipes, kind):
    """One window of all frames is none; smaller ones bite, and make the clip from the frames' own inputs."""
    settings = dict(num_frames=6, output_type="latent")
    whole = call(pipes[kind], **settings)
    assert mx.array_equal(call(pipes[kind], context_windows=ContextWindows(6), **settings), whole)
    windows = ContextWindows(3, 1, schedule="static_standard")
    parts = call(pipes[kind], context_windows=windows, **settings)
    assert parts.shape == whole.shape
    assert not mx.allclose(parts, whole, atol=1e-3)
    if kind == "svd":  # guidance rises over the clip, not anew in each window
        level = dict(min_guidance_scale=3.0, max_guidance_scale=3.0)
        steady = call(pipes[kind], context_windows=windows, **settings, **level)
        assert mx.abs(steady - parts)[:, 0].max() > mx.abs(steady - parts)[:, -1].max()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_two_passes(folders, pipes, kind):
    pipe = load_pipeline(folders[kind], dtype=mx.float16)
    assert pipe.unet.dtype == pipe.image_encoder.dtype == mx.float16
    assert pipe.vae.dtype == mx.float32
    half, full = call(pipe, output_type="latent"), call(pipes[kind], output_type="latent")
    assert half.dtype == mx.float32
    assert mx.abs(half - full).max() < 0.02 * mx.abs(full).max()
    pipe = load_pipeline(folders[kind])
    pipe.enable_sequential_guidance()
    assert mx.abs(call(pipe, output_type="latent") - full).max() < 1e-4 * mx.abs(full).max()


@pytest.mark.parametrize("kind", KINDS)
def test_reload_is_the_same(pipes, tmp_path, kind):
    pipes[kind].save_pretrained(tmp_path / "again", layout="diffusers")
    assert np.array_equal(call(load_pipeline(tmp_path / "again")), call(pipes[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_let_go(folders, kind):
    pipe = load_pipeline(folders[kind])
    pipe.enable_release()
    call(pipe)
    assert pipe.unet is pipe.image_encoder is None
    with pytest.raises(ValueError, match="was released"):
        call(pipe)


def test_bad_calls(pipes):
    svd, i2v = pipes["svd"], pipes["i2v"]
    with pytest.raises(ValueError, match="image is None"):
        call(svd, image=None)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist"):
        call(svd, image="none.jpg")
    with pytest.raises(ValueError, match="min_guidance_scale=4 must be at most max_guidance_scale=3"):
        call(svd, min_guidance_scale=4)
    with pytest.raises(ValueError, match="fps is nan"):
        call(svd, fps=float("nan"))
    with pytest.raises(ValueError, match="height=30 must be a multiple of 8"):
        call(svd, height=30)
    with pytest.raises(ValueError, match="there are 2 images for 1 prompts"):
        call(i2v, image=[picture(), picture()])
    with pytest.raises(TypeError, match="unexpected keyword argument 'motion_bucket'"):
        call(svd, motion_bucket=3)
    with pytest.raises(TypeError, match="'sede'; did you mean seed"):
        call(i2v, sede=3)
    parts = svd.components | {"unet": i2v.unet}
    with pytest.raises(TypeError, match="unet is a I2VGenXLUNet; give a UNetSpatioTemporalConditionModel"):
        StableVideoDiffusionPipeline(**parts)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_a_loaded_pipeline(pipes, kind):
    plan = memory.plan(memory.Networks.of(pipes[kind]), num_frames=3, height=32, width=48)
    assert "image" in [stage.name for stage in plan.stages]


# The command.


def generate(model, *arguments, prompt=()):
    words = [str(a) for a in arguments]
    short = ["--steps", "2", "--memory", "off"]
    return main(["generate", *prompt, "--model", str(model), *short, *words])


PROMPT = {"svd": (), "i2v": ("a cat",)}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_and_replay(folders, pipes, kind, capsys):
    picture().save("in.png")
    settings = ["--image", "in.png", "-o", "out.png", "--keep-latents"]
    assert generate(folders[kind], *settings, prompt=PROMPT[kind]) == 0
    assert "in.png: 60x40 pixels, " in capsys.readouterr().err
    frames, fps = media.read_video("out.png")
    expected = call(pipes[kind], **({"fps": 7} if kind == "svd" else {"target_fps": 16}))
    assert np.array_equal(frames, media.to_uint8(expected[0]))
    assert fps == pytest.approx({"svd": 7, "i2v": 16}[kind], rel=0.01)
    found = media.read_metadata("out.png")
    assert found["image"] == "in.png"
    assert load_latents("out.png.latents.safetensors")[0].shape == (1, 4, 3, 4, 6)

    again = ["generate", "--from", "out.png", "-o", "again.png", "--model", str(folders[kind])]
    assert main(again) == 0
    assert np.array_equal(media.read_video("again.png")[0], frames)
    assert media.read_metadata("again.png") == found
    assert main(["decode", "out.png.latents.safetensors", "-o", "d.png", "--model", str(folders[kind])]) == 0
    assert np.array_equal(media.read_video("d.png")[0], frames)
    picture(50, 50).save("in.png")
    capsys.readouterr()
    assert main([*again, "--overwrite"]) == 0
    assert "the pixels of in.png are not those of the replayed video" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_portrait_lies_on_its_side_unless_a_size_is_given(folders, kind, capsys):
    picture(40, 60).save("in.png")
    assert generate(folders[kind], "--image", "in.png", "-o", "out.png", prompt=PROMPT[kind]) == 0
    assert media.read_video("out.png")[0].shape == (3, 48, 32, 3)
    assert "40x60 pixels, " in (error := capsys.readouterr().err)
    assert "to 32x48" in error
    size = ["--height", "32", "--width", "32"]
    assert generate(folders[kind], "--image", "in.png", "-o", "2.png", *size, prompt=PROMPT[kind]) == 0
    assert media.read_video("2.png")[0].shape == (3, 32, 32, 3)


FLAGS = {
    "--motion-bucket": ("20", dict(motion_bucket_id=20.0)),
    "--noise-aug": ("0.3", dict(noise_aug_strength=0.3)),
    "--min-guidance": ("2", dict(min_guidance_scale=2.0)),
    "--decode-chunk-size": ("1", dict(decode_chunk_size=1)),
    "--guidance": ("1", dict(max_guidance_scale=1.0)),
    "--fps": ("12", dict(fps=12)),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_wired(folders, pipes, flag):
    value, settings = FLAGS[flag]
    picture().save("in.png")
    assert generate(folders["svd"], "--image", "in.png", "-o", "out.png", flag, value) == 0
    frames, _ = media.read_video("out.png")
    assert np.array_equal(frames, media.to_uint8(call(pipes["svd"], **settings)[0]))
    assert not np.array_equal(frames, media.to_uint8(call(pipes["svd"])[0]))


MEANINGLESS = {
    "text": [
        (["--motion-bucket", "3"], "--motion-bucket means nothing to text-to-video models; it is for Stable"),
        (["--image", "in.png"], "--image means nothing to text-to-video models; it is for Stable Video D"),
    ],
    "svd": [
        (["--negative-prompt", "x"], "--negative-prompt means nothing to Stable Video Diffusion models"),
        (["--video", "in.png"], "--video means nothing to Stable Video Diffusion models; it is for text"),
        ([], "there is no image; give one with --image"),
    ],
    "i2v": [
        (["--noise-aug", "1"], "--noise-aug means nothing to I2VGen-XL models"),
        (["--image", "in.png"], "there is no prompt; give one"),
    ],
}


@pytest.mark.parametrize("kind", MEANINGLESS)
def test_what_has_no_meaning_is_an_error(folders, kind, capsys):
    picture().save("in.png")
    for flags, message in MEANINGLESS[kind]:
        prompt = ("a cat",) if kind == "text" else ()
        assert generate(folders[kind], *flags, "-o", "out.png", prompt=prompt) == 2
        assert message in capsys.readouterr().err
    assert os.listdir() == ["in.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_is_finished(folders, kind, monkeypatch):
    """Interrupted after two steps, finished by --resume: the pixels of an uninterrupted run."""
    from mlx_unet3d.cli import keeping

    picture().save("in.png")
    settings = ["--image", "in.png", "--scheduler", "euler-a" if kind == "svd" else "ddim"]
    if kind == "svd":
        settings[-1] = "euler"
    arguments = [*settings, "--steps", "4"]
    assert generate(folders[kind], *arguments, "-o", "one.png", prompt=PROMPT[kind]) == 0
    step = keeping.Keeper.step

    def interrupted(self, record):
        step(self, record)
        if record.step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeping.Keeper, "step", interrupted)
        assert generate(folders[kind], *arguments, "-o", "out.png", prompt=PROMPT[kind]) == 130
    resume = ["generate", "--resume", "out.png.latents.safetensors", "--model", str(folders[kind])]
    assert main(resume) == 0
    assert np.array_equal(media.read_video("out.png")[0], media.read_video("one.png")[0])
    assert sorted(os.listdir()) == ["in.png", "one.png", "out.png"]


def test_decoding_fits_in_chunks_where_memory_is_short(folders, pipes, monkeypatch, capsys):
    networks = memory.Networks.of(pipes["svd"])
    size = dict(num_frames=8, height=96, width=96, dtype=mx.float32, backend="cpu")
    peaks = [memory.plan(networks, decode_chunk_size=n, **size).peak for n in (8, 4)]
    assert peaks[0] > 1.1 * peaks[1]
    monkeypatch.setattr(memory, "available", lambda: int(sum(peaks) / 2 / 0.9))
    picture().save("in.png")
    words = ["--num-frames", "8", "--height", "96", "--width", "96", "--steps", "1", "-o", "out.png"]
    command = ["generate", "--model", str(folders["svd"]), "--image", "in.png", *words]
    assert main(command) == 0
    assert "the decoder takes 4 frames together, to take less" in capsys.readouterr().err
    assert media.read_metadata("out.png")["decode_chunk_size"] == 4
    frames = media.read_video("out.png")[0]
    assert main([*command, "--memory", "off", "--decode-chunk-size", "4", "--overwrite"]) == 0
    assert np.array_equal(media.read_video("out.png")[0], frames)


def test_bench_of_a_model_with_an_image(folders, capsys):
    assert main(["bench", "--model", str(folders["svd"]), "--steps", "1"]) == 0
    assert "48x32x3, guided" in capsys.readouterr().out


def test_recommended_fps(folders, tmp_path, pipes):
    pipe = pipes["i2v"]
    recommended = Recommended(num_frames=2, height=32, width=32, fps=5)
    I2VGenXLPipeline(**pipe.components, recommended=recommended).save_pretrained(tmp_path / "model")
    picture().save("in.png")
    assert generate("model", "--image", "in.png", "-o", "out.png", prompt=("a cat",)) == 0
    frames, fps = media.read_video("out.png")
    assert frames.shape == (2, 32, 32, 3)
    assert fps == 5
