"""Pipelines without torch: what they return, take and refuse."""

import inspect
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    TextToVideoPipeline,
    UNet3DConditionModel,
    VideoToVideoPipeline,
)
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError, NonFiniteError
from mlx_unet3d.pipelines.video_to_video import as_pixels
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipe(folder):
    return TextToVideoPipeline.from_pretrained(folder)


@pytest.fixture
def video_pipe(folder):
    return VideoToVideoPipeline.from_pretrained(folder)


SHORT = dict(num_frames=3, num_inference_steps=2)


def test_output_types(pipe):
    frames = pipe("a cat", **SHORT).frames
    assert frames.shape == (1, 3, 32, 32, 3)  # the trained size, 4 * 8
    assert frames.dtype == np.float32
    assert 0 <= frames.min() < frames.max() <= 1
    array = pipe("a cat", output_type="mlx", **SHORT).frames
    assert isinstance(array, mx.array)
    assert np.array_equal(np.array(array), frames)
    images = pipe("a cat", output_type="pil", **SHORT).frames
    assert np.array_equal(np.asarray(images[0][1]), (frames[0, 1] * 255).round())
    latents = pipe("a cat", output_type="latent", **SHORT).frames
    assert latents.shape == (1, 4, 3, 4, 4)
    assert np.array_equal(pipe.decode(latents), frames)
    (same,) = pipe("a cat", return_dict=False, **SHORT)
    assert np.array_equal(same, frames)


def test_seeds(pipe):
    a, again, b = (pipe("a cat", seed=seed, **SHORT).frames for seed in (0, 0, 1))
    assert np.array_equal(a, again)
    assert not np.allclose(a, b, atol=1e-3)
    both = pipe(["a cat", "a cat"], seed=[0, 1], **SHORT).frames
    assert np.abs(both[0] - a[0]).max() < 1e-4
    assert np.abs(both[1] - b[0]).max() < 1e-4
    other = pipe("a cat", rng="mlx", **SHORT).frames
    assert np.array_equal(other, pipe("a cat", rng="mlx", **SHORT).frames)
    assert not np.allclose(other, a, atol=1e-3)


def test_seeds_of_an_ancestral_sampler(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    single = pipe("a cat", seed=1, **SHORT).frames
    both = pipe(["a cat", "a cat"], seed=[0, 1], **SHORT).frames
    assert np.abs(both[1] - single[0]).max() < 1e-4


def test_prompts_and_guidance_matter(pipe):
    base = pipe("a cat", guidance_scale=5, **SHORT).frames
    for change in (
        dict(prompt="a dog"),
        dict(negative_prompt="rain"),
        dict(guidance_scale=0),
        dict(guidance_scale=1.5),
        dict(clip_skip=1),
        dict(num_frames=4),
        dict(num_inference_steps=3),
        dict(eta=0.5),
    ):
        settings = {"prompt": "a cat", "guidance_scale": 5, **SHORT, **change}
        frames = pipe(**settings).frames
        assert frames.shape != base.shape or np.abs(frames - base).max() > 1e-4, change


def test_no_guidance_is_one_pass(pipe, monkeypatch):
    batches = []
    forward = UNet3DConditionModel.__call__

    def counting(self, sample, *args, **kwargs):
        batches.append(sample.shape[0])
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet3DConditionModel, "__call__", counting)
    pipe("a cat", guidance_scale=1, **SHORT)
    assert batches == [1, 1]
    pipe("a cat", guidance_scale=1.01, **SHORT)
    assert batches == [1, 1, 2, 2]


def test_step_records(pipe):
    states = pipe.encode_prompt("a cat")
    assert [embeds.shape for embeds in states] == [(1, 77, 12)] * 2
    records = list(pipe.steps(states, num_frames=3, num_inference_steps=4))
    assert [r.step for r in records] == [0, 1, 2, 3]
    assert {r.total for r in records} == {4}
    assert [r.timestep for r in records] == pipe.scheduler.laid_out(4).timesteps.tolist()
    assert pipe.scheduler.timesteps.tolist() == list(range(999, -1, -1))  # a run leaves it as it is
    assert all(r.latents.shape == r.denoised.shape == (1, 4, 3, 4, 4) for r in records)
    assert mx.array_equal(pipe("a cat", 32, 32, 3, 4, output_type="latent").frames, records[-1].latents)

    # A consumer may stop early, and the next run starts afresh.
    steps = pipe.steps(states, num_frames=3, num_inference_steps=4)
    next(steps)
    steps.close()
    again = list(pipe.steps(states, num_frames=3, num_inference_steps=4))
    assert mx.array_equal(again[-1].latents, records[-1].latents)


def test_encoded_prompts(pipe):
    """The pair of diffusers' pipelines: what is encoded once makes the video that the words make."""
    expected = pipe("a cat", negative_prompt="rain", **SHORT).frames
    positive, negative = pipe.encode_prompt("a cat", "rain")
    frames = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **SHORT).frames
    assert np.array_equal(frames, expected)
    assert pipe(prompt_embeds=pipe.encode_prompt(["a", "b"])[0], **SHORT).frames.shape[0] == 2
    alone, none = pipe.encode_prompt("a cat", guidance_scale=1)
    assert none is None
    assert np.array_equal(np.asarray(pipe.encode_prompt("a cat", guidance_scale=1)), np.array(positive)[None])
    assert np.asarray(pipe.encode_prompt("a cat"), np.float64).shape == (2, 1, 77, 12)
    assert mx.array_equal(alone, positive)
    with pytest.raises(TypeError, match=r"prompt_embeds is a TextStates; give an mx.array: of the pair"):
        pipe(prompt_embeds=pipe.encode_prompt("a cat"), **SHORT)
    with pytest.raises(TypeError, match="text states are a array; give the pair"):
        pipe.steps(positive, **SHORT)
    with pytest.raises(ValueError, match="guidance_scale=9 needs negative states"):
        pipe.steps((alone, none), **SHORT)
    assert len(list(pipe.steps((alone, none), guidance_scale=1, **SHORT))) == 2


def test_going_on_from_predictions(pipe):
    states = pipe.encode_prompt("a cat")
    settings = dict(num_frames=3, num_inference_steps=5, eta=0.7, seed=[3])
    whole = list(pipe.steps(states, **settings))
    start = [record.prediction for record in whole[:2]]
    again = list(pipe.steps(states, **settings, predictions=start))
    assert len(again) == 5
    assert mx.array_equal(again[-1].latents, whole[-1].latents)
    for wrong in ([p[:, :, :2] for p in start], [start[0]] * 6):
        with pytest.raises(ValueError, match="go on with the settings"):
            list(pipe.steps(states, **settings, predictions=wrong))


def test_callback(pipe):
    seen = []
    pipe("a cat", 32, 32, 2, 5, callback=lambda *record: seen.append(record), callback_steps=2)
    assert [step for step, _, _ in seen] == [0, 2, 4]
    assert all(latents.shape == (1, 4, 2, 4, 4) for _, _, latents in seen)


def test_latents_are_taken(pipe):
    start = mx.random.normal((1, 4, 3, 4, 4), key=mx.random.key(3))
    a = pipe("a cat", latents=start, **SHORT).frames
    assert np.array_equal(a, pipe("a cat", latents=start, seed=5, **SHORT).frames)
    with pytest.raises(ValueError, match="latents has shape"):
        pipe("a cat", latents=start[:, :, :2], **SHORT)


def test_overflow_stops_at_its_step(pipe):
    pipe.unet.conv_out.bias = mx.array([0.0, 0.0, float("inf"), 0.0])
    seen = []
    with pytest.raises(NonFiniteError, match=r"step 1 of 2.*--dtype float32"):
        pipe("a cat", callback=lambda *record: seen.append(record), **SHORT)
    assert not seen
    pipe.vae.decoder.conv_out.bias = mx.array([0.0, float("nan"), 0.0])
    with pytest.raises(NonFiniteError, match="vae-dtype"):
        pipe.decode(mx.zeros((1, 4, 2, 4, 4)))


def test_decoding_in_chunks_is_decoding_at_once(pipe, monkeypatch):
    latents = mx.random.normal((2, 4, 3, 4, 4), key=mx.random.key(1))
    expected = pipe.decode(latents)
    sizes = []
    decode = type(pipe.vae).decode

    def counting(self, z, **kwargs):
        sizes.append(z.shape[0])
        return decode(self, z, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", counting)
    monkeypatch.setattr(type(pipe.vae), "frames_per_chunk", lambda *_: 4)
    assert np.abs(pipe.decode(latents) - expected).max() < 1e-5
    assert sizes == [4, 2]
    pipe.vae.enable_slicing()
    assert np.abs(pipe.decode(latents) - expected).max() < 1e-5
    assert sizes == [4, 2] + [1] * 6


BAD_CALLS = {
    "height": (dict(height=30), ValueError, "height=30 must be a multiple of 8; use 24 or 32"),
    "small": (dict(width=4), ValueError, "use 8"),
    "no_frames": (dict(num_frames=0), ValueError, "num_frames=0"),
    "no_steps": (dict(num_inference_steps=0), ValueError, "num_inference_steps=0"),
    "many_steps": (dict(num_inference_steps=2000), ValueError, "2000"),
    "half_steps": (dict(num_inference_steps=2.5), ValueError, "num_inference_steps=2.5"),
    "guidance": (dict(guidance_scale=float("nan")), ValueError, "guidance_scale=nan"),
    "eta": (dict(eta=1.5), ValueError, "eta=1.5"),
    "output": (dict(output_type="tensor"), ValueError, "output_type='tensor'"),
    "no_prompt": (dict(prompt=None), ValueError, "either prompt or prompt_embeds"),
    "both": (dict(prompt_embeds=mx.zeros((1, 77, 12))), ValueError, "not both"),
    "embeds": (dict(prompt=None, prompt_embeds=mx.zeros((1, 77, 8))), ValueError, "prompt_embeds has"),
    "type": (dict(prompt=3), TypeError, "prompt=3"),
    "empty": (dict(prompt=[]), TypeError, "prompt="),
    "negatives": (dict(negative_prompt=["a", "b"]), ValueError, "one negative prompt"),
    "seed": (dict(seed=1.5), TypeError, "1.5"),
    "seeds": (dict(seed=[1, 2]), ValueError, "seed has 2 entries for 1 videos"),
    "rng": (dict(rng="cuda"), ValueError, "cuda"),
    "callback_steps": (dict(callback_steps=0), ValueError, "callback_steps=0"),
    "clip_skip": (dict(clip_skip=5), ValueError, "clip_skip"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(pipe, name):
    change, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        pipe(**{"prompt": "a cat", **SHORT, **change})


def test_eta_needs_ddim(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="means nothing to DPMSolverMultistepScheduler"):
        pipe("a cat", eta=0.5, **SHORT)


def test_parts_must_fit(pipe):
    wide = tiny.randomize(UNet3DConditionModel(**tiny.UNET | {"in_channels": 8}))
    with pytest.raises(ValueError, match="takes 8 and returns 4 channels"):
        TextToVideoPipeline(wide, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    other = tiny.randomize(UNet3DConditionModel(**tiny.UNET | {"cross_attention_dim": 16}))
    with pytest.raises(ValueError, match="attends to text of 16 channels"):
        TextToVideoPipeline(other, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


# Video to video.


def clip(frames=3, size=(32, 24)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def test_video_to_video(video_pipe):
    args = dict(prompt="a cat", num_inference_steps=4)
    frames = video_pipe(video=clip(), **args).frames
    assert frames.shape == (1, 3, 32, 24, 3)
    weak = video_pipe(video=clip(), strength=0.25, **args).frames
    assert not np.allclose(weak, frames, atol=1e-3)
    images = [Image.fromarray(image) for image in clip()]
    assert np.array_equal(video_pipe(video=images, **args).frames, frames)
    two = np.stack([clip(), clip()[::-1]])
    both = video_pipe(["a cat", "a cat"], two, num_inference_steps=4, seed=[0, 1]).frames
    assert np.abs(both[0] - frames[0]).max() < 1e-4


def test_video_to_video_runs_its_share_of_the_steps(video_pipe):
    states = video_pipe.encode_prompt("a cat")
    for strength, count in [(0.1, 1), (0.5, 5), (0.99, 9), (1, 10)]:
        records = list(video_pipe.steps(states, clip(), strength=strength, num_inference_steps=10))
        assert len(records) == count
        assert records[0].timestep == video_pipe.scheduler.laid_out(10).timesteps[10 - count]


BAD_VIDEOS = {
    "none": (None, ValueError, "video is None"),
    "empty": ([], ValueError, "empty list"),
    "grey": (clip()[..., 0], ValueError, "must be"),
    "text": ("clip.mp4", TypeError, "is a str"),
    "integers": (clip().astype(np.int32), TypeError, "must be uint8"),
    "range": (clip().astype(np.float32), ValueError, r"must lie in \[0, 1\]"),
    "nan": (np.full((2, 32, 24, 3), np.nan, np.float32), ValueError, r"must lie in \[0, 1\]"),
    "mixed": ([clip()[0], clip(size=(24, 24))[0]], ValueError, "differ in shape"),
    "latents": (mx.zeros((1, 5, 2, 4, 4)), ValueError, "must hold latents"),
    "two": (np.stack([clip(), clip()]), ValueError, "one a prompt"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos(video_pipe, name):
    video, error, message = BAD_VIDEOS[name]
    with pytest.raises(error, match=message):
        video_pipe("a cat", video, num_inference_steps=2)


@pytest.mark.parametrize("strength", [0, -1, 0.1, 1.5, float("nan")])
def test_bad_strength(video_pipe, strength):
    with pytest.raises(ValueError, match="leaves no step to run"):
        video_pipe("a cat", clip(), strength=strength, num_inference_steps=4)


def test_pixels_of_any_form():
    frames = clip()
    expected = frames[None].astype(np.float32) / 255
    for form in (frames, frames[None], list(frames), frames / 255, [Image.fromarray(f) for f in frames]):
        assert np.abs(as_pixels(form) - expected).max() < 1e-6


# Folders.


def test_recommended_settings(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    own = {"num_frames": 2, "num_inference_steps": 3, "guidance_scale": 4.5, "vocabulary": ["a", "cat"]}
    (copy / "model_index.json").write_text(json.dumps(index | {"_recommended": own}))
    pipe = TextToVideoPipeline.from_pretrained(copy)
    frames = pipe("a cat").frames
    assert frames.shape[1] == 2
    said = dict(num_frames=2, num_inference_steps=3, guidance_scale=4.5)
    assert np.array_equal(TextToVideoPipeline.from_pretrained(folder)("a cat", **said).frames, frames)
    assert pipe("a cat", num_frames=1).frames.shape[1] == 1
    with pytest.warns(UserWarning, match="does not know 'blue', 'dog'; it knows a, cat"):
        pipe("A blue dog, a cat", num_frames=1)
    video = VideoToVideoPipeline.from_pretrained(copy)
    assert video.guidance_scale() == 4.5
    assert VideoToVideoPipeline.from_pretrained(folder).guidance_scale() == 15
    pipe.save_pretrained(tmp_path / "saved")
    assert TextToVideoPipeline.from_pretrained(tmp_path / "saved").recommended == pipe.recommended


WRONG = {
    "no object": ([], r"_recommended is \[\]; it must be an object of num_frames, "),
    "unknown": ({"speed": 8}, "must be an object of"),
    "text for fps": ({"fps": "fast"}, "fps='fast': it must be a number"),
    "no rate": ({"fps": 0}, "fps=0: 0 must be above 0"),
    "truth for frames": ({"num_frames": True}, "num_frames=True: it must be a number"),
    "half a frame": ({"num_frames": 2.5}, r"num_frames=2\.5: it must be an integer"),
    "frames": ({"num_frames": 5000}, "num_frames=5000: 5000 must be at most 4096"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0: 0 must be at least 1"),
    "infinite": ({"guidance_scale": float("inf")}, "guidance_scale=inf: inf must be a finite number"),
    "list for size": ({"height": [8]}, r"height=\[8\]: it must be a number"),
    "size": (dict(num_frames=4096, height=8192, width=8192), "billion pixels"),
    "words": ({"vocabulary": "cat"}, "vocabulary='cat': it must be a list of at most"),
    "a word": ({"vocabulary": ["cat", 3]}, "vocabulary has 3: it must be text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_recommended_settings_of_strangers(folder, tmp_path, name, capsys):
    """Pipelines, `plan`, `generate` and `convert` refuse them in the same words, which name the file."""
    values, message = WRONG[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_recommended": values}))
    with pytest.raises(CheckpointError, match=message) as error:
        TextToVideoPipeline.from_pretrained(copy)
    assert str(error.value).startswith(f"{path}: _recommended")
    assert "correct it or download it again" in str(error.value)
    for command in (
        ["plan", "--model", str(copy)],
        ["generate", "a cat", "--model", str(copy), "-o", str(tmp_path / "out.gif")],
        ["convert", "--hf-path", str(copy), "--mlx-path", str(tmp_path / "out")],
    ):
        assert main(command) == 2
        assert f"mlx-unet3d: error: {error.value}\n" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_reload_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, layout="diffusers")
    again = TextToVideoPipeline.from_pretrained(tmp_path)
    assert np.array_equal(again("a cat", **SHORT).frames, pipe("a cat", **SHORT).frames)
    assert again.weights_checksum != pipe.weights_checksum  # other files


def test_half_precision(folder):
    pipe = TextToVideoPipeline.from_pretrained(folder, dtype=mx.float16)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (mx.float16,) * 2 + (mx.float32,)
    latents = pipe("a cat", output_type="latent", **SHORT).frames
    assert latents.dtype == mx.float32  # the sampler's arithmetic
    full = TextToVideoPipeline.from_pretrained(folder)("a cat", output_type="latent", **SHORT).frames
    # Guidance multiplies the rounding of the network.
    assert mx.abs(latents - full).max() < 0.02 * mx.abs(full).max()


def test_the_scheduler_is_that_of_the_index(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    asked = index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (copy / "model_index.json").write_text(json.dumps(asked))
    with pytest.warns(UserWarning, match="asks for EulerDiscreteScheduler, .* 'DDIMScheduler'"):
        pipe = TextToVideoPipeline.from_pretrained(copy)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    assert pipe.scheduler.config.beta_end == tiny.SCHEDULER["beta_end"]

    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["_class_name"]
    file.write_text(json.dumps(config))
    assert TextToVideoPipeline.from_pretrained(copy).scheduler.config == pipe.scheduler.config

    unknown = index | {"scheduler": ["diffusers", "KDPM2DiscreteScheduler"]}
    (copy / "model_index.json").write_text(json.dumps(unknown))
    nearest = r"scheduler_config\.json: .*'KDPM2DiscreteScheduler', .* nearest is HeunDiscreteScheduler"
    with pytest.raises(CheckpointError, match=nearest):
        TextToVideoPipeline.from_pretrained(copy)
    pipe = TextToVideoPipeline.from_pretrained(copy, scheduler="HeunDiscreteScheduler")
    assert isinstance(pipe.scheduler, HeunDiscreteScheduler)
    assert np.isfinite(pipe("a cat", **SHORT).frames).all()
    assert TextToVideoPipeline.from_pretrained(copy, scheduler=pipe.scheduler).scheduler is pipe.scheduler


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        TextToVideoPipeline.from_pretrained(folder / "unet")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="describes a 'StableDiffusionPipeline'"):
        TextToVideoPipeline.from_pretrained(copy)
    del index["vae"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no vae"):
        TextToVideoPipeline.from_pretrained(copy)


def test_failed_save_does_not_load(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        TextToVideoPipeline.from_pretrained(tmp_path)


# What diffusers' users type.


def test_generator_is_a_seed(pipe):
    expected = pipe("a cat", seed=5, **SHORT).frames
    assert np.array_equal(pipe("a cat", generator=5, **SHORT).frames, expected)
    both = pipe(["a cat", "a cat"], generator=[5, 6], **SHORT).frames
    assert np.abs(both[0] - expected[0]).max() < 1e-4
    with pytest.raises(TypeError, match="generator is a object; give seed=, a number or one a video"):
        pipe("a cat", generator=object(), **SHORT)


def test_several_videos_of_a_prompt(pipe, video_pipe):
    single = pipe(["a cat", "a dog"], seed=[0, 2], **SHORT).frames
    four = pipe(["a cat", "a dog"], num_videos_per_prompt=2, seed=[0, 1, 2, 3], **SHORT).frames
    assert np.abs(four[[0, 2]] - single).max() < 1e-4
    assert np.abs(four[1] - four[0]).max() > 1e-3
    args = dict(prompt="a cat", video=clip(), num_inference_steps=4)
    two = video_pipe(num_videos_per_prompt=2, seed=[0, 1], **args).frames
    assert np.abs(two[0] - video_pipe(seed=0, **args).frames[0]).max() < 1e-4
    with pytest.raises(ValueError, match="num_videos_per_prompt=0"):
        pipe("a cat", num_videos_per_prompt=0, **SHORT)


def test_callback_on_step_end(pipe):
    seen = []

    def keep(which, step, timestep, tensors):
        assert which is pipe
        seen.append((step, timestep, tensors["latents"]))
        return tensors

    frames = pipe("a cat", callback_on_step_end=keep, **SHORT).frames
    assert [step for step, _, _ in seen] == [0, 1]
    assert np.array_equal(frames, pipe("a cat", **SHORT).frames)
    zeros = pipe("a cat", callback_on_step_end=lambda *_: {"latents": mx.zeros((1, 4, 3, 4, 4))}, **SHORT)
    assert np.array_equal(zeros.frames, pipe.decode(mx.zeros((1, 4, 3, 4, 4))))
    half = pipe("a cat", callback_on_step_end=lambda *a: {"latents": a[3]["latents"] / 2}, **SHORT).frames
    assert not np.allclose(half, frames, atol=1e-3)
    with pytest.raises(ValueError, match=r"latents of a callback have shape \(1,\)"):
        pipe("a cat", callback_on_step_end=lambda *_: {"latents": mx.zeros(1)}, **SHORT)
    with pytest.raises(ValueError, match="has 'prompt_embeds'; a callback is given 'latents' alone"):
        pipe("a cat", callback_on_step_end_tensor_inputs=["prompt_embeds"], **SHORT)


def test_schedules_of_ones_own(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    states = pipe.encode_prompt("a cat")
    records = list(pipe.steps(states, num_frames=2, timesteps=[900, 500, 100]))
    assert [record.timestep for record in records] == [900, 500, 100]
    assert len(list(pipe.steps(states, num_frames=2, sigmas=[10.0, 1.0, 0.0]))) == 2
    with pytest.raises(ValueError, match="give one of"):
        pipe("a cat", timesteps=[900], sigmas=[1.0, 0.0])


def test_from_pipe_shares_the_weights(pipe, video_pipe):
    video = VideoToVideoPipeline.from_pipe(pipe)
    assert video.unet is pipe.unet
    args = dict(prompt="a cat", video=clip(), num_inference_steps=4)
    assert np.array_equal(video(**args).frames, video_pipe(**args).frames)
    other = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert VideoToVideoPipeline.from_pipe(pipe, scheduler=other).scheduler is other
    assert pipe.components.keys() == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    pipe.release("unet")
    with pytest.raises(ValueError, match="VideoToVideoPipeline needs unet, which this TextToVideoPipeline"):
        VideoToVideoPipeline.from_pipe(pipe)


def test_parts_in_place_of_the_folders(folder, pipe):
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET), 9)
    assert TextToVideoPipeline.from_pretrained(folder, unet=unet).unet is unet
    with pytest.raises(TypeError, match="unexpected keyword argument 'controlnet'; parts are unet, vae"):
        TextToVideoPipeline.from_pretrained(folder, controlnet=unet)
    with pytest.raises(TypeError, match="vae is a UNet3DConditionModel; give a AutoencoderKL"):
        TextToVideoPipeline(unet, unet, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)


def test_switches_that_have_nothing_to_do_say_so(pipe):
    with pytest.warns(UserWarning, match="to does nothing in mlx_unet3d: MLX computes on its default device"):
        assert pipe.to("mps") is pipe
    with pytest.raises(TypeError, match=r"choose the dtype when loading"):
        pipe.to(mx.float16)
    for name in ("enable_model_cpu_offload", "enable_xformers_memory_efficient_attention"):
        with pytest.warns(UserWarning, match=f"{name} does nothing"):
            getattr(pipe, name)()


def test_signatures_show_every_setting(pipe):
    for call in (TextToVideoPipeline.__call__, VideoToVideoPipeline.__call__):
        names = set(inspect.signature(call).parameters)
        assert {"seed", "rng", "cache_interval", "output_type", "progress", "generator"} <= names
        assert "options" not in names
    with pytest.raises(TypeError, match="'num_inference_step'; did you mean num_inference_steps"):
        pipe.sampling(num_inference_step=3)
