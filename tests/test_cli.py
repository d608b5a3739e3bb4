"""The command: what it makes, prints, refuses, and leaves behind."""

import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, UNet3DConditionModel, media
from mlx_unet3d.cli import main
from mlx_unet3d.latents import load_latents, save_latents
from mlx_unet3d.models import autoencoder_kl
from mlx_unet3d.models.autoencoder_kl import AutoencoderKL
from mlx_unet3d.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    scheduler_from_config,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(model, *arguments, prompt="a cat"):
    words = [str(a) for a in arguments]
    short = ["--num-frames", "3", "--steps", "2", "--memory", "off"]
    return main(["generate", prompt, "--model", str(model), *short, *words])


@cache
def pipeline(model):
    return TextToVideoPipeline.from_pretrained(model)


@cache
def api_frames(model, **settings):
    settings = dict(num_frames=3, num_inference_steps=2) | settings
    return media.to_uint8(pipeline(model)("a cat", **settings).frames[0])


def test_generate(model, capsys):
    assert generate(model, "-o", "out.png", "--memory", "auto") == 0
    captured = capsys.readouterr()
    assert captured.out == "out.png\n"
    assert "peak memory" in captured.err
    frames, fps = media.read_video("out.png")
    assert np.array_equal(frames, api_frames(model))
    assert fps == 8
    assert os.listdir() == ["out.png"]  # no latents, no temporary file


FLAGS = {
    "--num-frames": ("4", dict(num_frames=4)),
    "--height": ("40", dict(height=40)),
    "--width": ("24", dict(width=24)),
    "--steps": ("3", dict(num_inference_steps=3)),
    "--guidance": ("0", dict(guidance_scale=0.0)),
    "--negative-prompt": ("rain", dict(negative_prompt="rain")),
    "--seed": ("0", dict(seed=0)),
    "--rng": ("mlx", dict(rng="mlx")),
    "--eta": ("0.5", dict(eta=0.5)),
    "--clip-skip": ("1", dict(clip_skip=1)),
    "--cache-interval": ("2", dict(cache_interval=2)),
    "--guidance-from": ("0.5", dict(guidance_interval=(0.5, 1.0))),
    "--guidance-to": ("0.5", dict(guidance_interval=(0.0, 0.5))),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_wired(model, flag):
    value, settings = FLAGS[flag]
    assert generate(model, "-o", "out.png", flag, value) == 0
    frames, _ = media.read_video("out.png")
    assert np.array_equal(frames, api_frames(model, **settings))
    if flag != "--seed":
        base = api_frames(model)
        assert frames.shape != base.shape or not np.array_equal(frames, base)


def test_cache_depth(model):
    settings = ["--cache-interval", "2", "--cache-depth", "2"]
    assert generate(model, "-o", "out.png", *settings) == 0
    frames, _ = media.read_video("out.png")
    assert np.array_equal(frames, api_frames(model, cache_interval=2, cache_depth=2))
    assert not np.array_equal(frames, api_frames(model, cache_interval=2))


def test_convolution(model, monkeypatch):
    modes = []
    monkeypatch.setattr(UNet3DConditionModel, "set_convolution", lambda self, mode: modes.append(mode))
    assert generate(model, "-o", "out.png", "--convolution", "precise") == 0
    assert main(["generate", "--from", "out.png", "-o", "again.png", "--model", str(model)]) == 0
    assert generate(model, "-o", "fast.png") == 0
    assert modes == ["precise", "precise", "auto"]


def test_tiling(model, tmp_path, monkeypatch):
    """On the command line, of a replayed video, and of latents."""
    tiled = Path(shutil.copytree(model, tmp_path / "tiled"))
    config = json.loads((tiled / "vae" / "config.json").read_text())
    (tiled / "vae" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    assert generate(tiled, "-o", "whole.png", "--keep-latents") == 0
    assert generate(tiled, "-o", "tiles.png", "--vae-tiling") == 0
    whole, tiles = (media.read_video(name)[0] for name in ("whole.png", "tiles.png"))
    assert np.array_equal(whole, api_frames(model))
    assert not np.array_equal(tiles, whole)
    assert main(["generate", "--from", "tiles.png", "-o", "again.png", "--model", str(tiled)]) == 0
    assert np.array_equal(media.read_video("again.png")[0], tiles)
    assert (
        main(["generate", "--from", "tiles.png", "--no-vae-tiling", "-o", "plain.png", "--model", str(tiled)])
        == 0
    )
    assert np.array_equal(media.read_video("plain.png")[0], whole)
    latents = "whole.png.latents.safetensors"
    assert main(["decode", latents, "--vae-tiling", "-o", "decoded.png", "--model", str(tiled)]) == 0
    assert np.array_equal(media.read_video("decoded.png")[0], tiles)


def test_frame_that_is_too_large_is_refused_before_the_work(model, monkeypatch, capsys):
    monkeypatch.setattr(autoencoder_kl, "_MAX_ELEMENTS", 4_000)
    for memory in ("auto", "off"):
        assert generate(model, "-o", "out.png", "--memory", memory) == 2
        captured = capsys.readouterr().err
        assert "one frame of 32x32 needs an array of" in captured
        assert "--vae-tiling" in captured
        assert "denoise" not in captured
    assert not os.listdir()


def test_scheduler_and_dtypes(model):
    base = api_frames(model)
    for flag, value in [("--scheduler", "euler"), ("--dtype", "float16"), ("--vae-dtype", "bfloat16")]:
        assert generate(model, "-o", "out.png", flag, value, "--overwrite") == 0
        frames, _ = media.read_video("out.png")
        assert frames.shape == base.shape
        assert not np.array_equal(frames, base), flag
        key = flag[2:].replace("-", "_")
        assert media.read_metadata("out.png")[key].lower().startswith(value[:5])


@pytest.mark.parametrize("output", ["out.gif", "out.webp", "out.png", "frames/", "out.mp4"])
def test_formats_and_replay(model, output):
    if output.endswith("mp4") and media.encoders()[".mp4"] is None:
        pytest.skip("nothing here writes mp4: install ffmpeg or the [video] extra")
    assert generate(model, "-o", output, "--fps", "5", "--seed", "3", "--guidance", "4.5") == 0
    frames, fps = media.read_video(output)
    assert frames.shape == (3, 32, 32, 3)
    assert fps == pytest.approx(5)
    found = media.read_metadata(output)
    expected = dict(prompt="a cat", seed=3, guidance=4.5, steps=2, num_frames=3, height=32, width=32, fps=5)
    assert {key: found[key] for key in expected} == expected
    assert len(found["weights"]) == 16
    assert found["program"].startswith("mlx-unet3d ")
    assert found["model"] == model.name  # and no path of this machine

    assert main(["generate", "--from", output, "-o", "again.png", "--model", str(model)]) == 0
    again, _ = media.read_video("again.png")
    assert np.array_equal(again, api_frames(model, seed=3, guidance_scale=4.5))
    assert media.read_metadata("again.png") == found
    # The command line wins over the file.
    assert (
        main(["generate", "--from", output, "-o", "more.png", "--seed", "4", "a dog", "--model", str(model)])
        == 0
    )
    assert media.read_metadata("more.png") == found | {"seed": 4, "prompt": "a dog"}


def test_replay_with_other_weights(model, tmp_path, capsys):
    assert generate(model, "-o", "out.png") == 0
    other = shutil.copytree(model, tmp_path / "other")
    tiny.randomize(UNet3DConditionModel(**tiny.UNET), 5).save_pretrained(other / "unet")
    assert main(["generate", "--from", "out.png", "-o", "again.png", "--model", str(other)]) == 0
    assert "weights are not those of the replayed video" in capsys.readouterr().err
    assert "replayed_weights" not in media.read_metadata("again.png")


def test_several_videos(model, capsys):
    assert generate(model, "-o", "out.png", "--num-videos", "2", "--seed", "5") == 0
    assert capsys.readouterr().out.split() == ["out_seed5.png", "out_seed6.png"]
    for seed in (5, 6):
        frames, _ = media.read_video(f"out_seed{seed}.png")
        assert np.array_equal(frames, api_frames(model, seed=seed))
        assert media.read_metadata(f"out_seed{seed}.png")["seed"] == seed


def test_video_to_video(model):
    assert generate(model, "-o", "in.png") == 0
    for strength in ("0.5", "1"):
        arguments = ["--video", "in.png", "--strength", strength, "--steps", "4"]
        assert generate(model, "-o", f"{strength}.png", *arguments) == 0
    half, full = (media.read_video(f"{strength}.png")[0] for strength in ("0.5", "1"))
    assert half.shape == full.shape == (3, 32, 32, 3)
    assert not np.array_equal(half, full)
    found = media.read_metadata("1.png")
    assert (found["guidance"], found["strength"]) == (15.0, 1.0)
    resized = ["--video", "in.png", "--height", "40", "--width", "48"]
    assert generate(model, "-o", "big.png", *resized) == 0
    assert media.read_video("big.png")[0].shape == (3, 40, 48, 3)
    # All frames of the input, or the first of them.
    for frames in ([], ["--num-frames", "2"]):
        arguments = ["a cat", "--video", "in.png", "--steps", "2", "--model", str(model), *frames]
        assert main(["generate", *arguments, "-o", "cut.png", "--overwrite"]) == 0
        assert len(media.read_video("cut.png")[0]) == (2 if frames else 3)


def test_latents_before_decoding(model, monkeypatch, capsys):
    """A crash in the decoder loses nothing."""

    def fail(self, z, **kwargs):
        assert os.path.exists("out.gif.latents.safetensors")
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "decode", fail)
        assert generate(model, "-o", "out.gif", "--memory", "off") == 1
    error = capsys.readouterr().err
    assert "out of memory" in error
    assert "mlx-unet3d decode out.gif.latents.safetensors" in error
    assert os.listdir() == ["out.gif.latents.safetensors"]
    assert main(["decode", "out.gif.latents.safetensors", "-o", "out.png", "--model", str(model)]) == 0
    assert np.array_equal(media.read_video("out.png")[0], api_frames(model))
    assert main(["decode", "out.gif.latents.safetensors", "--fps", "4", "--model", str(model)]) == 0
    assert media.read_video("out.gif")[1] == pytest.approx(4)
    assert media.read_metadata("out.gif")["prompt"] == "a cat"


def test_keep_latents(model):
    assert generate(model, "-o", "out.png", "--keep-latents") == 0
    latents, settings, predictions = load_latents("out.png.latents.safetensors")
    assert not predictions
    assert latents.shape == (1, 4, 3, 4, 4)
    assert settings["prompt"] == "a cat"


@contextmanager
def cut_off(monkeypatch, scheduler, step_number, error):
    """The sampler fails at one step."""
    step = scheduler.step
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step_number:
            raise error
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "step", failing)
        yield


def test_interruption_leaves_latents(model, monkeypatch, capsys):
    with cut_off(monkeypatch, DDIMScheduler, 3, KeyboardInterrupt()):
        assert generate(model, "-o", "out.png", "--steps", "5") == 130
    error = capsys.readouterr().err
    assert "stopped after step 2 of 5" in error
    assert "mlx-unet3d decode out.png.latents.safetensors" in error
    assert main(["decode", "out.png.latents.safetensors", "--model", str(model)]) == 0
    assert media.read_video("out.png")[0].shape == (3, 32, 32, 3)
    assert media.read_metadata("out.png")["steps_done"] == 2


RESUMED = {
    "ddim": (DDIMScheduler, ["--eta", "0.8"]),
    "dpm++": (DPMSolverMultistepScheduler, []),
    "dpm++-sde": (DPMSolverMultistepScheduler, []),
    "unipc": (UniPCMultistepScheduler, []),
    "pndm": (PNDMScheduler, []),
    "euler-a": (EulerAncestralDiscreteScheduler, []),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_the_uninterrupted_one(model, monkeypatch, capsys, name):
    """Whatever the sampler remembers and draws; and stopped twice."""
    scheduler, extra = RESUMED[name]
    arguments = ["--steps", "6", "--scheduler", name, "--seed", "4", *extra]
    assert generate(model, "-o", "whole.png", *arguments) == 0
    with cut_off(monkeypatch, scheduler, 3, KeyboardInterrupt()):
        assert generate(model, "-o", "out.png", *arguments) == 130
    file = "out.png.latents.safetensors"
    assert f"mlx-unet3d generate --resume {file}" in capsys.readouterr().err
    forwards = []
    forward = UNet3DConditionModel.__call__

    def counting(self, *args, **kwargs):
        forwards.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet3DConditionModel, "__call__", counting)
    with cut_off(monkeypatch, scheduler, 5, RuntimeError("GPU timeout")):
        assert main(["generate", "--resume", file, "--memory", "off", "--model", str(model)]) == 1
    assert main(["generate", "--resume", file, "--memory", "off", "--model", str(model)]) == 0
    assert set(os.listdir()) == {"whole.png", "out.png"}
    assert np.array_equal(media.read_video("out.png")[0], media.read_video("whole.png")[0])
    assert media.read_metadata("out.png") == media.read_metadata("whole.png")
    # Steps 3 to 5 (the last cut off in the sampler), then 5 to the end: none of the first two again.
    sampler = TextToVideoPipeline.from_pretrained(model).scheduler
    sampler = scheduler_from_config(sampler.config, name)
    sampler.set_timesteps(6)
    assert len(forwards) == 3 + len(sampler.timesteps) - 4


def test_what_a_run_left_is_not_overwritten_unasked(model, monkeypatch, capsys):
    with cut_off(monkeypatch, DDIMScheduler, 2, KeyboardInterrupt()):
        assert generate(model, "-o", "out.png") == 130
    file = Path("out.png.latents.safetensors")
    before = file.read_bytes()
    assert generate(model, "-o", "out.png") == 2
    assert "finish it with --resume" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert generate(model, "-o", "out.png", "--overwrite") == 0
    assert os.listdir() == ["out.png"]


def test_what_resume_refuses(model, tmp_path, monkeypatch, capsys):
    with cut_off(monkeypatch, DDIMScheduler, 2, KeyboardInterrupt()):
        assert generate(model, "-o", "out.png", "--steps", "3") == 130
    file = "out.png.latents.safetensors"
    for arguments, message in [
        (["a dog"], "leave out the prompt"),
        (["--steps", "4"], "leave out --steps"),
        (["--num-videos", "2"], "leave out --num-videos"),
        (["--from", file], "leave out --from"),
        (["-o", "missing/out.png", "--model", str(model)], "missing"),
        ([], f"names the model {model}, which is not in the current folder"),
    ]:
        assert main(["generate", "--resume", file, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", "--resume", "missing.latents.safetensors", "--model", str(model)]) == 2
    tiny.randomize(UNet3DConditionModel(**tiny.UNET), 5).save_pretrained(tmp_path / "unet")
    other = shutil.copytree(model, tmp_path / "other")
    shutil.rmtree(other / "unet")
    shutil.move(tmp_path / "unet", other / "unet")
    latents, settings, predictions = load_latents(file)
    save_latents(file, latents, settings, predictions)
    assert main(["generate", "--resume", file, "--model", str(other)]) == 2
    assert "are not those of the run" in capsys.readouterr().err


def test_interrupted_later_video_keeps_the_earlier(model, monkeypatch, capsys):
    with cut_off(monkeypatch, DDIMScheduler, 4, KeyboardInterrupt()):
        assert generate(model, "-o", "out.png", "--num-videos", "2") == 130
    error = capsys.readouterr().err
    assert "mlx-unet3d decode out_seed0.png.latents.safetensors" in error
    assert "mlx-unet3d generate --resume out_seed1.png.latents.safetensors" in error
    assert main(["decode", "out_seed0.png.latents.safetensors", "--model", str(model)]) == 0
    assert main(["generate", "--resume", "out_seed1.png.latents.safetensors", "--model", str(model)]) == 0
    for seed in (0, 1):
        assert np.array_equal(media.read_video(f"out_seed{seed}.png")[0], api_frames(model, seed=seed))


def test_variant_and_decoder_dtype_are_remembered(model, tmp_path):
    half = shutil.copytree(model, tmp_path / "half")
    pipe = TextToVideoPipeline.from_pretrained(model)
    for name in ("unet", "vae", "text_encoder"):
        shutil.rmtree(half / name)
        getattr(pipe, name).save_pretrained(half / name, variant="fp16")
    arguments = ["--variant", "fp16", "--vae-dtype", "bfloat16", "--keep-latents"]
    assert generate(half, "-o", "out.png", *arguments) == 0
    assert main(["generate", "--from", "out.png", "-o", "again.png", "--model", str(half)]) == 0
    assert main(["decode", "out.png.latents.safetensors", "-o", "decoded.png", "--model", str(half)]) == 0
    frames, _ = media.read_video("out.png")
    for name in ("again.png", "decoded.png"):
        assert np.array_equal(media.read_video(name)[0], frames)
    # Another model has files of its own.
    assert main(["generate", "--from", "out.png", "-o", "other.png", "--model", str(model)]) == 0
    assert main(["decode", "out.png.latents.safetensors", "-o", "more.png", "--model", str(model)]) == 0


def test_overflow_is_no_black_video(model, tmp_path, capsys):
    bad = shutil.copytree(model, tmp_path / "bad")
    unet = UNet3DConditionModel.from_pretrained(bad / "unet")
    unet.conv_out.bias = unet.conv_out.bias + float("inf")
    unet.save_pretrained(bad / "unet")
    assert generate(bad, "-o", "out.gif") == 1
    assert "--dtype float32" in capsys.readouterr().err
    assert not os.path.exists("out.gif")


def test_networks_are_dropped_when_done(model, monkeypatch):
    """The decoder runs without the text encoder and the UNet in memory."""
    seen = []
    decode = TextToVideoPipeline.decode

    def watching(self, latents, **kwargs):
        seen.append((self.text_encoder, self.unet))
        return decode(self, latents, **kwargs)

    monkeypatch.setattr(TextToVideoPipeline, "decode", watching)
    assert generate(model, "-o", "out.png") == 0
    assert seen == [(None, None)]


def test_info(model, capsys):
    assert main(["info", str(model)]) == 0
    out = capsys.readouterr().out
    pipe = TextToVideoPipeline.from_pretrained(model)
    for part in ("unet", "vae", "text_encoder"):
        (line,) = (line for line in out.splitlines() if line.startswith(part))
        assert f"{getattr(pipe, part).num_parameters():,} parameters" in line
        assert "F32" in line
        assert "mlx layout" in line
    assert "DDIMScheduler, epsilon" in out
    assert main(["info", str(model / "unet")]) == 0
    assert "UNet3DConditionModel" in capsys.readouterr().out


def test_doctor(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for fact in ("MLX", "chip", "memory", "system", "Python", "GFLOP/s", ".mp4"):
        assert fact in out
    assert out.count("  ok ") == 10
    from mlx_unet3d import selftest

    real = selftest.OPERATIONS["temporal convolution"]
    monkeypatch.setitem(
        selftest.OPERATIONS, "temporal convolution", lambda dtype: (real(dtype)[0] * 0, real(dtype)[1])
    )
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("WRONG") == 2
    assert "update MLX" in captured.err


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "mlx_unet3d", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("mlx-unet3d 0.")


# Bad input: an error that names it, exit status 2, and no output file.


def header(text):
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(data)) + data


def replace_weights(folder, content):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)


def edit_json(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def cut_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_a_pickle(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04 a pickle")


def missing_shard(folder):
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    index = {
        "metadata": {},
        "weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"},
    }
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


BROKEN_MODELS = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "bad model_index": (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
    "another pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        "describes a 'FluxPipeline'",
    ),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet"),
    "no unet config": (lambda f: (f / "unet" / "config.json").unlink(), "config.json"),
    "unknown class": (
        lambda f: edit_json(f / "unet" / "config.json", _class_name="UNet2DConditionModel"),
        "UNet2DConditionModel",
    ),
    "truncated weights": (cut_weights, "safetensors"),
    "empty weights": (lambda f: replace_weights(f, b""), "empty"),
    "html weights": (lambda f: replace_weights(f, b"<!DOCTYPE html><html>"), "web page"),
    "lfs pointer": (
        lambda f: replace_weights(f, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "git-lfs",
    ),
    "overlapping tensors": (
        lambda f: replace_weights(
            f, header({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}) + bytes(12)
        ),
        "safetensors",
    ),
    "lying sizes": (
        lambda f: replace_weights(f, header({"a": tensor([2**30, 2**30, 4], [0, 0])})),
        "safetensors",
    ),
    "negative shape": (
        lambda f: replace_weights(f, header({"a": tensor([-2, -2], [0, 16])}) + bytes(16)),
        "safetensors",
    ),
    "unknown names": (
        lambda f: replace_weights(f, header({"a": tensor([2], [0, 8])}) + bytes(8)),
        "conv_in",
    ),
    "only a pickle": (only_a_pickle, "pickle"),
    "missing shard": (missing_shard, "00001-of-00002"),
    "wrong widths": (
        lambda f: edit_json(f / "unet" / "config.json", block_out_channels=[8, 24]),
        "must be (24,)",
    ),
    "wrong channels": (
        lambda f: tiny.randomize(UNet3DConditionModel(**tiny.UNET | {"in_channels": 5})).save_pretrained(
            f / "unet"
        ),
        "takes 5 and returns 4 channels",
    ),
    "bad block name": (
        lambda f: edit_json(f / "unet" / "config.json", down_block_types=["DownBlock2D", "DownBlock3D"]),
        "DownBlock2D",
    ),
    "corrupt tokenizer": (lambda f: (f / "tokenizer" / "vocab.json").write_text("[1, 2"), "vocab.json"),
    "no merges": (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "merges.txt"),
    "unknown scheduler class": (
        lambda f: edit_json(f / "model_index.json", scheduler=["diffusers", "KDPM2DiscreteScheduler"]),
        "--scheduler HeunDiscreteScheduler",
    ),
    "bad scheduler value": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="cubic"),
        "cubic",
    ),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models(model, tmp_path, capsys, name):
    damage, message = BROKEN_MODELS[name]
    folder = shutil.copytree(model, tmp_path / "broken")
    damage(folder)
    assert generate(folder, "-o", "out.gif") == 2
    error = capsys.readouterr().err
    assert "mlx-unet3d: error: " in error
    assert message in error
    assert "Traceback" not in error
    assert os.listdir() == ["broken"]


BAD_ARGUMENTS = {
    "no folder": (["--model", "/no/such/folder"], "/no/such/folder"),
    "unknown id": (["--model", "nobody/no-such-model", "--local-files-only"], "nobody/no-such-model"),
    "no id": (["--model", "nosuchmodel"], "nosuchmodel"),
    "missing variant": (["--variant", "fp8"], "fp8"),
    "height": (["--height", "30"], "multiple of 8"),
    "guidance": (["--guidance", "nan"], "guidance"),
    "text guidance": (["--guidance", "much"], "guidance"),
    "no frames": (["--num-frames", "0"], "at least 1"),
    "negative steps": (["--steps", "-3"], "at least 1"),
    "too many steps": (["--steps", "5000"], "5000"),
    "scheduler": (["--scheduler", "fastest"], "fastest"),
    "eta": (["--eta", "0.5", "--scheduler", "unipc"], "eta=0.5"),
    "seed": (["--seed", "1.5"], "seed"),
    "huge seed": (["--seed", str(2**70)], "64 bits"),
    "fps": (["--fps", "0"], "above 0"),
    "dtype": (["--dtype", "int8"], "int8"),
    "unknown file type": (["-o", "out.avi"], ".avi"),
    "no parent folder": (["-o", "missing/out.gif"], "missing"),
    "clip skip": (["--clip-skip", "9"], "clip_skip"),
    "no video": (["--video", "missing.gif"], "missing.gif"),
    "strength alone": (["--strength", "0.5"], "give --video too"),
    "guidance shares": (
        ["--guidance-from", "0.5", "--guidance-to", "0.2"],
        "--guidance-from 0.5 --guidance-to 0.2",
    ),
    "replay": (["--from", "missing.gif"], "missing.gif"),
    "unknown flag": (["--fast"], "--fast"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(model, capsys, name):
    arguments, message = BAD_ARGUMENTS[name]
    try:
        status = generate(model, *arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not os.listdir()


def test_existing_output_is_kept(model, capsys):
    assert generate(model, "-o", "out.png") == 0
    before = Path("out.png").read_bytes()
    assert generate(model, "-o", "out.png", "--seed", "1") == 2
    assert "out.png" in capsys.readouterr().err
    assert Path("out.png").read_bytes() == before
    assert generate(model, "-o", "out.png", "--seed", "1", "--overwrite") == 0
    assert Path("out.png").read_bytes() != before


def test_no_prompt(model, capsys):
    assert main(["generate", "--model", str(model)]) == 2
    assert "there is no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"GIF89a", header({"a": tensor([2], [0, 8])}) + bytes(8)])
def test_bad_latents(tmp_path, capsys, content):
    (tmp_path / "x.gif.latents.safetensors").write_bytes(content)
    assert main(["decode", "x.gif.latents.safetensors"]) == 2
    assert "x.gif.latents.safetensors" in capsys.readouterr().err
    assert main(["decode", "missing.gif.latents.safetensors"]) == 2
    assert not os.path.exists("x.gif")


def test_info_of_nothing(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "neither model_index.json" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "missing")]) == 2
    assert "missing does not exist" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["info", str(tmp_path / "file")]) == 2
    assert "file is empty" in capsys.readouterr().err


def test_info_of_the_demo_model(capsys):
    assert main(["info", "demo"]) == 0
    assert "F16, 13.7 MB, mlx layout" in capsys.readouterr().out


def test_more_frames_than_the_video_has(model, capsys):
    media.write_video("in.png", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    assert generate(model, "-o", "out.gif", "--video", "in.png") == 2
    assert "--num-frames 3: in.png has only 2 frames" in capsys.readouterr().err
    assert os.listdir() == ["in.png"]


def test_foreign_video_cannot_be_replayed(capsys):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    media.write_video("foreign.gif", frames)
    assert main(["generate", "--from", "foreign.gif"]) == 2
    assert "foreign.gif" in capsys.readouterr().err
    media.write_video("other.gif", frames, metadata={"title": "holiday"})
    assert main(["generate", "--from", "other.gif"]) == 2
    assert "no settings of mlx-unet3d" in capsys.readouterr().err


def test_traceback_on_request(capsys):
    assert main(["--traceback", "info", "/no/such/folder"]) == 2
    assert "Traceback" in capsys.readouterr().err
