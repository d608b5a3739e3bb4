"""Conversion with LoRAs: the same videos as with the LoRAs beside the weights, by folders of their own."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, UNet3DConditionModel, load_pipeline, media
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints.quantization import quantizations
from mlx_unet3d.cli import main

SHORT = dict(num_frames=2, output_type="latent")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A ModelScope model, a Stable Diffusion one with motion modules, and LoRAs."""
    place = tmp_path_factory.mktemp("loras")
    tiny.write_pipeline(place / "base")
    tiny.write_stable_diffusion(place / "sd", place / "motion")
    whole = UNet3DConditionModel(**tiny.UNET, time_cond_proj_dim=8)
    mx.save_safetensors(str(place / "unet_lora.safetensors"), tiny.unnamed_lora(whole))
    rng = np.random.default_rng(0)

    def lora(prefix, path, out, channels):
        return {
            f"{prefix}{path}.lora_{half}.weight": mx.array(rng.normal(0, 0.4, shape).astype(np.float32))
            for half, shape in (("A", (2, *channels)), ("B", (out, 2, *(1 for _ in channels[1:]))))
        }

    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    mcm = place / "mcm" / "modelscopet2v-anime"
    mcm.mkdir(parents=True)
    tensors = lora("base_model.model.", attention, 8, (8,)) | lora(
        "base_model.model.", "conv_in", 8, (4, 3, 3)
    )
    mx.save_safetensors(str(mcm / "adapter_model.safetensors"), tensors)
    (mcm / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3, "peft_type": "LORA"}))
    (place / "lcm-lora").mkdir()
    motion = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_v"
    tensors = lora("unet.", attention, 8, (8,)) | lora("unet.", motion, 8, (8,))
    tensors |= lora("text_encoder.", text, 12, (12,))
    mx.save_safetensors(str(place / "lcm-lora" / "pytorch_lora_weights.safetensors"), tensors)
    return place


LORAS = {
    "unet_lora.safetensors": ("strided", 10.0, 7.5),
    "./mcm/modelscopet2v-anime": ("linspace", 4.0, 1.0),
}


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
@pytest.mark.parametrize("lora", LORAS)
def test_modelscope(place, lora, layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    spacing, scaling, guidance = LORAS[lora]
    out = tmp_path / "out"
    command = ["convert", "--hf-path", "base", "--mlx-path", str(out), "--verify", "--to", layout]
    assert main([*command, "--lora", lora, "0.5"]) == 0
    assert "as " in (said := capsys.readouterr().err)
    assert "weight 0.5" in said
    assert "equal to the source and its LoRA" in said
    pipe = TextToVideoPipeline.from_pretrained(out)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    config = pipe.scheduler.config
    assert (config.distilled_spacing, config.timestep_scaling) == (spacing, scaling)
    assert (pipe.recommended.num_inference_steps, pipe.recommended.guidance_scale) == (4, guidance)
    beside = TextToVideoPipeline.from_pretrained("base", scheduler=pipe.scheduler)
    beside.load_lora_weights(lora, weight=0.5)
    expected = beside("a cat", num_inference_steps=4, guidance_scale=guidance, **SHORT).frames
    assert mx.allclose(pipe("a cat", **SHORT).frames, expected, atol=1e-4)
    if layout == "mlx":
        video = str(tmp_path / "out.png")
        assert main(["generate", "a cat", "--model", str(out), "--num-frames", "2", "-o", video]) == 0
        found = media.read_metadata(video)
        assert [found[k] for k in ("scheduler", "steps", "guidance")] == ["LCMScheduler", 4, guidance]


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_animatediff(place, layout, tmp_path, monkeypatch):
    """UNet, motion modules, wherever they lie, and text encoder; on the schedule of the motion modules."""
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    command = ["convert", "--hf-path", "sd", "--motion-adapter", "motion", "--mlx-path", str(out)]
    assert main([*command, "--verify", "--to", layout, "--lora", "./lcm-lora"]) == 0
    pipe = load_pipeline(out)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert pipe.scheduler.config.beta_schedule == "linear"
    assert pipe.recommended.guidance_scale == 1.0
    beside = load_pipeline("sd", motion_adapter="motion", scheduler=pipe.scheduler)
    beside.load_lora_weights("lcm-lora")
    expected = beside("a cat", num_inference_steps=4, guidance_scale=1.0, **SHORT).frames
    assert mx.allclose(pipe("a cat", **SHORT).frames, expected, atol=1e-4)
    if layout == "diffusers":
        again = load_pipeline("sd", motion_adapter=out / "motion_adapter", scheduler=pipe.scheduler)
        key = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_v.weight"
        ours, its = (dict(tree_flatten(p.unet.parameters()))[key] for p in (again, pipe))
        assert mx.array_equal(ours, its)


def test_quantized_and_alone(place, tmp_path, monkeypatch):
    """LoRA is added first, so that it is quantized with the weights."""
    monkeypatch.chdir(place)
    whole, quantized = str(tmp_path / "whole"), str(tmp_path / "quantized")
    command = ["convert", "--hf-path", "base/unet", "--lora", "unet_lora.safetensors", "--verify"]
    assert main([*command, "--mlx-path", whole]) == 0
    assert (
        main([*command, "--mlx-path", quantized, "-q", "--q-group-size", "32", "--q-recipe", "uniform"]) == 0
    )
    inputs = mx.random.normal((1, 4, 2, 4, 4), key=mx.random.key(1)), 500, mx.ones((1, 5, 12))
    made = []
    for path in (whole, quantized):
        unet = UNet3DConditionModel.from_pretrained(path)
        made.append(unet(*inputs, timestep_cond=mx.ones((1, 8))).sample)
    assert quantizations(unet)
    error = mx.abs(made[0] - made[1]).max() / mx.abs(made[0]).max()
    assert 0 < error < 0.05


def test_refusals(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    whole = {"unet.conv_in.modules_to_save.default.weight": mx.zeros((8, 4, 3, 3))}
    mx.save_safetensors("whole.safetensors", whole)
    mx.save_safetensors("other.safetensors", {"unet.nowhere.lora_A.weight": mx.zeros((2, 2))})
    for words, message in (
        (["nowhere.safetensors"], "does not exist"),
        (["whole.safetensors"], "holds parameters in full"),
        (["other.safetensors"], "fit no layer of the unet"),
        (["unet_lora.safetensors", "much"], "the weight must be a finite number"),
    ):
        command = ["convert", "--hf-path", "base", "--mlx-path", str(tmp_path / "out"), "--lora", *words]
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert not Path(tmp_path / "out").exists()
