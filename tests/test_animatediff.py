"""AnimateDiff's pipelines without torch: what they return, take and refuse."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    UNetMotionModel,
    memory,
)
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.image_projection import ImageProjection, MultiIPAdapterImageProjection

UNET = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    cross_attention_dim=12,
    num_attention_heads=2,
    motion_num_attention_heads=2,
    motion_max_seq_length=6,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=4,
)
SHORT = dict(num_frames=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = tiny.write_pipeline(tmp_path_factory.mktemp("source"))
    made = tmp_path_factory.mktemp("animatediff")
    index = json.loads((source / "model_index.json").read_text())
    unet = tiny.randomize(UNetMotionModel(**UNET))
    index |= {"_class_name": "AnimateDiffPipeline", "unet": ["diffusers", "UNetMotionModel"]}
    (source / "model_index.json").write_text(json.dumps(index))
    AnimateDiffPipeline.from_pretrained(source, unet=unet).save_pretrained(made)
    return made


@pytest.fixture
def pipe(folder):
    return AnimateDiffPipeline.from_pretrained(folder)


def test_outputs(pipe):
    frames = pipe("a cat", **SHORT).frames
    assert frames.shape == (1, 3, 32, 32, 3)
    assert frames.dtype == np.float32
    latents = pipe("a cat", output_type="latent", **SHORT).frames
    assert latents.shape == (1, 4, 3, 4, 4)
    assert np.array_equal(pipe.decode(latents), frames)
    images = pipe("a cat", output_type="pil", **SHORT).frames
    assert len(images[0]) == 3
    assert pipe("a cat", num_videos_per_prompt=2, **SHORT).frames.shape[0] == 2


def test_save_load_and_share(pipe, tmp_path):
    frames = pipe("a cat", **SHORT).frames
    pipe.save_pretrained(tmp_path)
    again = AnimateDiffPipeline.from_pretrained(tmp_path)
    assert np.array_equal(again("a cat", **SHORT).frames, frames)
    video = AnimateDiffVideoToVideoPipeline.from_pipe(pipe)
    assert video.unet is pipe.unet
    assert video(frames[0], "a cat", num_inference_steps=4).frames.shape == frames.shape
    networks = memory.Networks.of(pipe)
    assert networks.unet.kind is UNetMotionModel
    assert networks.image_encoder is None


def test_another_motion_adapter(folder, pipe):
    other = tiny.randomize(UNetMotionModel(**UNET), 5).motion_adapter()
    changed = AnimateDiffPipeline.from_pretrained(folder, motion_adapter=other)
    assert np.abs(changed("a cat", **SHORT).frames - pipe("a cat", **SHORT).frames).max() > 1e-3


def test_stable_diffusion_needs_a_motion_adapter(folder, tmp_path):
    config = {"_class_name": "UNet2DConditionModel"}
    for name in ("text_encoder", "tokenizer", "scheduler", "vae", "unet"):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="motion_adapter="):
        AnimateDiffPipeline.from_pretrained(tmp_path)


def test_resume_and_interleaved_runs(pipe):
    states = pipe.encode_prompt("a cat")
    settings = dict(num_frames=3, num_inference_steps=5, eta=0.7)
    alone = [list(pipe.steps(states, **settings, seed=seed)) for seed in (1, 2)]
    pairs = zip(*(pipe.steps(states, **settings, seed=seed) for seed in (1, 2)), strict=True)
    for records, *expected in zip(pairs, *alone, strict=True):
        assert all(mx.array_equal(a.latents, b.latents) for a, b in zip(records, expected, strict=True))
    start = [record.prediction for record in alone[0][:2]]
    again = list(pipe.steps(states, **settings, seed=1, predictions=start))
    assert mx.array_equal(again[-1].latents, alone[0][-1].latents)


def test_half_precision_stays(folder, monkeypatch):
    pipe, seen = AnimateDiffPipeline.from_pretrained(folder, dtype=mx.float16), []
    forward = UNetMotionModel.__call__

    def watching(self, sample, *args, **options):
        output = forward(self, sample, *args, **options)
        seen.append((sample.dtype, output.sample.dtype))
        return output

    monkeypatch.setattr(UNetMotionModel, "__call__", watching)
    pipe("a cat", **SHORT)
    assert seen == [(mx.float16, mx.float16)] * 2


BAD_CALLS = {
    "frames": (dict(num_frames=7), "num_frames=7 exceeds the motion module's 6 positions"),
    "height": (dict(height=30), "height=30 must be a multiple of 8"),
    "image": (dict(ip_adapter_image=np.zeros((8, 8, 3), np.uint8)), "call load_ip_adapter"),
    "embeds": (dict(ip_adapter_image_embeds=[mx.zeros((2, 1, 4))]), "for each of 0 IP-Adapters"),
    "rescale": (dict(guidance_rescale=1.5), "guidance_rescale=1.5 must lie between 0 and 1"),
    "latents": (dict(latents=mx.zeros((1, 4, 2, 4, 4))), "latents has shape"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(pipe, name):
    change, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **SHORT | change)


def test_without_a_text_encoder(folder, pipe, tmp_path):
    """A folder whose index lists none, as diffusers writes it, and `text_encoder=None`: prompts as states."""
    states = pipe.encode_prompt("a cat")
    given = dict(prompt_embeds=states[0], negative_prompt_embeds=states[1])
    expected = pipe(**given, **SHORT).frames
    bare = AnimateDiffPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert np.array_equal(bare(**given, **SHORT).frames, expected)
    bare.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    again = AnimateDiffPipeline.from_pretrained(tmp_path)
    assert np.array_equal(again(**given, **SHORT).frames, expected)
    assert AnimateDiffVideoToVideoPipeline.from_pipe(again).text_encoder is None
    with pytest.raises(ValueError, match="made without a text encoder; give prompt_embeds"):
        again("a cat", **SHORT)
    plan = memory.plan(memory.read_networks(tmp_path), num_frames=2, height=32, width=32, budget=2**30)
    assert [stage.name for stage in plan.stages] == ["denoise", "decode"]
    index.pop("text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no text_encoder"):
        AnimateDiffPipeline.from_pretrained(tmp_path)


def test_an_ip_adapter_wants_images_and_is_not_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(4, 12, 4)])
    with pytest.raises(ValueError, match="give ip_adapter_image or ip_adapter_image_embeds"):
        pipe("a cat", **SHORT)
    with pytest.raises(ValueError, match="has no image encoder"):
        pipe("a cat", ip_adapter_image=np.zeros((8, 8, 3), np.uint8), **SHORT)
    with pytest.raises(ValueError, match="before saving, remove it"):
        pipe.save_pretrained(tmp_path)
    AnimateDiffPipeline.from_pretrained(tmp_path)


def test_bad_videos(pipe):
    video = AnimateDiffVideoToVideoPipeline.from_pipe(pipe)
    clip = np.zeros((2, 32, 32, 3), np.uint8)
    for change in (dict(strength=0), dict(strength=2), dict(strength=0, enforce_inference_steps=True)):
        with pytest.raises(ValueError, match="strength="):
            video(clip, "a cat", num_inference_steps=2, **change)
    with pytest.raises(ValueError, match="1 clips for 2 prompts"):
        video(clip, ["a cat", "a dog"], num_inference_steps=2)
