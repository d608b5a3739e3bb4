"""Few-step models: guidance as an embedding, and the LoRAs that bring sampler, steps and guidance."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import (
    LCMScheduler,
    TextToVideoPipeline,
    UNet3DConditionModel,
    VideoToVideoPipeline,
    media,
    memory,
)
from mlx_unet3d.checkpoints.adapters import read_adapter
from mlx_unet3d.checkpoints.headers import write_safetensors
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.adapted import weight_shape
from mlx_unet3d.layers.embeddings import guidance_embedding
from mlx_unet3d.pipelines.few_steps import training_of_lora

SHORT = dict(num_frames=2, num_inference_steps=2, output_type="latent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose UNet takes guidance as an embedding."""
    folder = tmp_path_factory.mktemp("few_steps")
    base = TextToVideoPipeline.from_pretrained(tiny.write_pipeline(folder / "base"))
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET, time_cond_proj_dim=8), 0)
    TextToVideoPipeline(**base.components | {"unet": unet}).save_pretrained(folder / "embedded")
    return folder / "embedded"


@pytest.mark.parametrize("kind", [TextToVideoPipeline, VideoToVideoPipeline])
def test_one_pass_a_step_without_a_negative_prompt(folder, kind, monkeypatch):
    pipe = kind.from_pretrained(folder)
    rows, forward = [], UNet3DConditionModel.__call__

    def noting(self, sample, *args, **inputs):
        rows.append((sample.shape[0], inputs["timestep_cond"].shape))
        return forward(self, sample, *args, **inputs)

    monkeypatch.setattr(UNet3DConditionModel, "__call__", noting)
    args = dict(num_inference_steps=2, output_type="latent")
    args |= (
        {"num_frames": 2}
        if kind is TextToVideoPipeline
        else {"video": mx.zeros((1, 4, 2, 4, 4)), "strength": 1.0}
    )
    weak, strong, none = (pipe("a cat", guidance_scale=w, **args).frames for w in (2.0, 9.0, 0.0))
    assert rows == [(1, (1, 8))] * 6
    assert pipe.encode_prompt("a cat").negative_prompt_embeds is None
    assert not pipe.is_guided(9.0)
    for one, other in ((weak, strong), (none, weak)):
        assert not mx.allclose(one, other, atol=1e-3)
    same = pipe("a cat", guidance_scale=2.0, negative_prompt="a dog", **args).frames
    assert mx.array_equal(same, weak)


@pytest.mark.parametrize("setting", [{"guidance_rescale": 0.5}, {"guidance_interval": (0.0, 0.5)}])
def test_what_needs_a_negative_prompt_is_refused(folder, setting):
    pipe = TextToVideoPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="takes guidance as an embedding instead; leave"):
        pipe("a cat", **SHORT, **setting)
    pipe("a cat", **SHORT, guidance_rescale=0.0, guidance_interval=[0, 1])


def test_a_narrow_embedding_is_refused():
    with pytest.raises(ValueError, match="time_cond_proj_dim=3 is too narrow"):
        guidance_embedding(7.5, 3, 1)
    assert guidance_embedding(7.5, 5, 2).shape == (2, 5)


def test_plan_and_bench_count_one_pass(folder, capsys):
    networks = memory.read_networks(folder)
    assert networks.embeds_guidance
    assert not memory.read_networks(folder.parent / "base").embeds_guidance
    size = dict(num_frames=2, height=32, width=32, backend="cpu")
    plans = [memory.plan(networks, guidance=guidance, **size) for guidance in (True, False)]
    assert plans[0] == plans[1]
    assert main(["plan", "--model", str(folder), "--num-frames", "2"]) == 0
    assert "with guidance as an embedding, " in capsys.readouterr().out
    assert main(["bench", "--model", str(folder), "--num-frames", "2", "--steps", "1"]) == 0
    assert "| 32x32x2 |" in capsys.readouterr().out


def test_generate(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a cat", "--model", str(folder), "--steps", "2", "--num-frames", "2"]
    assert main([*command, "--guidance", "7.5", "-o", "a.png"]) == 0
    pipe = TextToVideoPipeline.from_pretrained(folder)
    args = dict(num_frames=2, num_inference_steps=2, guidance_scale=7.5)
    frames = media.to_uint8(pipe("a cat", **args).frames[0])
    assert (media.read_video("a.png")[0] == frames).all()


# LoRAs.


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """A folder with LoRAs: T2V-Turbo's, and MCM's as PEFT saves it."""
    monkeypatch.chdir(tmp_path)
    whole = UNet3DConditionModel(**tiny.UNET, time_cond_proj_dim=8)
    write_safetensors(tmp_path / "unet_lora.safetensors", tiny.unnamed_lora(whole), {})
    linear = {path: m for path, m in whole._adaptable().items() if path.endswith(("to_q", "to_v"))}
    tensors, rng = {}, np.random.default_rng(1)
    for path, layer in linear.items():
        out, channels = weight_shape(layer)
        for half, shape in (("A", (2, channels)), ("B", (out, 2))):
            key = f"base_model.model.{path}.lora_{half}.weight"
            tensors[key] = mx.array(rng.normal(size=shape).astype(np.float32))
    mcm = tmp_path / "mcm" / "modelscopet2v-laion"
    mcm.mkdir(parents=True)
    write_safetensors(mcm / "adapter_model.safetensors", tensors, {})
    (mcm / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    return folder.parent / "base"


def test_a_list_that_brings_a_layer(place):
    pipe = TextToVideoPipeline.from_pretrained(place)
    before = pipe("a cat", **SHORT).frames
    layers = list(pipe.unet._adaptable())
    file = Path("unet_lora.safetensors")
    assert pipe.load_lora_weights(file, "turbo") == {"unet": len(layers) + 1}
    assert pipe.unet.config.time_cond_proj_dim == 8
    assert not mx.allclose(pipe("a cat", **SHORT).frames, before, atol=1e-2)
    with pytest.raises(CheckpointError, match="tensors without names"):  # of another length
        pipe.load_lora_weights(dict(list(read_adapter(file).tensors.items())[2:]), "less")
    assert pipe.embeds_guidance
    for remove in (pipe.unload_lora_weights, lambda: pipe.unet.delete_adapters("turbo")):
        remove()
        assert not pipe.embeds_guidance
        assert list(pipe.unet._adaptable()) == layers
        assert mx.array_equal(pipe("a cat", **SHORT).frames, before)
        pipe.load_lora_weights(file, "turbo")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.embeds_guidance
    pipe.save_pretrained("turbo")
    again = TextToVideoPipeline.from_pretrained("turbo")
    assert mx.array_equal(again("a cat", **SHORT).frames, pipe("a cat", **SHORT).frames)


@pytest.mark.parametrize("full", [False, True])
def test_names_that_bring_a_layer(place, full):
    """The projection as a LoRA among others, or in full beside them."""
    pipe = TextToVideoPipeline.from_pretrained(place)
    key = "base_model.model.time_embedding.cond_proj"
    tensors = {f"{key}.lora_A.weight": mx.ones((2, 6)), f"{key}.lora_B.weight": mx.ones((8, 2)) / 20}
    if full:
        tensors = {
            f"{key}.modules_to_save.default.weight": mx.ones((8, 6)) / 10,
            "base_model.model.conv_in.lora_A.weight": mx.zeros((1, 4, 3, 3)),
            "base_model.model.conv_in.lora_B.weight": mx.zeros((8, 1, 1, 1)),
        }
    pipe.load_lora_weights(tensors)
    assert pipe.unet.config.time_cond_proj_dim == 6
    assert mx.allclose(pipe.unet.time_embedding.cond_proj.weight, mx.array(0.1))
    weak, strong = (pipe("a cat", guidance_scale=w, **SHORT).frames for w in (2.0, 9.0))
    assert not mx.allclose(weak, strong, atol=1e-3)
    pipe.unload_lora_weights()
    assert not pipe.embeds_guidance


def test_a_list_that_does_not_fit_leaves_the_unet_as_it_was(place):
    unet = TextToVideoPipeline.from_pretrained(place).unet
    tensors = read_adapter("unet_lora.safetensors").tensors
    wrong = tensors | {"0009": mx.zeros((3, 3))}
    with pytest.raises(CheckpointError, match="tensors without names"):
        unet.load_lora_adapter(wrong)
    key = "unet.time_embedding.cond_proj.lora_"
    for columns in (0, 3):
        narrow = {f"{key}A.weight": mx.ones((2, columns)), f"{key}B.weight": mx.ones((8, 2))}
        with pytest.raises(CheckpointError, match="fit no layer of the unet"):
            unet.load_lora_adapter(narrow)
    assert unet.config.time_cond_proj_dim is None
    assert "cond_proj" not in unet.time_embedding


RECOGNISED = {
    "unet_lora.safetensors": (
        "T2V-Turbo",
        dict(distilled_spacing="strided"),
        dict(steps=4, guidance=7.5),
    ),
    "./mcm/modelscopet2v-laion": ("MCM", dict(timestep_scaling=4.0), dict(steps=4, guidance=1.0)),
}


@pytest.mark.parametrize("lora", RECOGNISED)
def test_a_lora_brings_its_sampler_steps_and_guidance(place, lora, capsys):
    title, settings, calls = RECOGNISED[lora]
    command = ["generate", "a cat", "--model", str(place), "--num-frames", "2", "--lora", lora, "-o"]
    assert main([*command, "out.png"]) == 0
    error = capsys.readouterr().err
    said = f"sampled by LCMScheduler, steps 4, guidance {calls['guidance']:g}, unless options say otherwise"
    assert title in error
    assert said in error
    found = media.read_metadata("out.png")
    assert {name: found[name] for name in ("scheduler", *calls)} == {"scheduler": "LCMScheduler", **calls}
    pipe = TextToVideoPipeline.from_pretrained(place)
    pipe.load_lora_weights(lora)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **settings)
    args = dict(num_frames=2, num_inference_steps=4, guidance_scale=calls["guidance"])
    frames = media.to_uint8(pipe("a cat", **args).frames[0])
    assert np.array_equal(media.read_video("out.png")[0], frames)
    again = ["generate", "--from", "out.png", "--model", str(place), "--lora", lora, "-o", "again.png"]
    assert main(again) == 0
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    options = ["--steps", "2", "--scheduler", "ddim", "--guidance", "3"]
    assert main([*command, "other.png", *options]) == 0
    found = media.read_metadata("other.png")
    assert [found[name] for name in ("scheduler", "steps", "guidance")] == ["ddim", 2, 3.0]


def test_a_negative_prompt_that_has_no_effect_is_said(place, capsys):
    command = ["generate", "a cat", "--model", str(place), "--num-frames", "1", "--steps", "1"]
    words = ["--negative-prompt", "rain", "--lora", "unet_lora.safetensors", "-o", "out.png"]
    assert main([*command, *words]) == 0
    assert "the negative prompt has no effect" in capsys.readouterr().err


FEW = ["DDIMScheduler", 8, None]
NAMES = {
    "latent-consistency/lcm-lora-sdv1-5": ("pytorch_lora_weights.safetensors", ["LCMScheduler", 4, 1.0]),
    "ByteDance/Hyper-SD/Hyper-SD15-8steps-CFG-lora.safetensors": (None, FEW),
    "ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors": (None, ["DDIMScheduler", 4, 1.0]),
    "ByteDance/Hyper-SD/Hyper-SD15-1step-lora.safetensors": (None, ["TCDScheduler", 1, 1.0]),
    "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors": (
        None,
        ["EulerDiscreteScheduler", 4, 1.0],
    ),
    "yhzhai/mcm/animatediff-laion": ("adapter_model.safetensors", ["LCMScheduler", 4, 1.0]),
    "bags/mcm_bag.safetensors": (None, None),
    "hyper-sd-drawings/style.safetensors": (None, None),
    "my-lcm-lora-tests/trains/style.safetensors": (None, None),
    "guoyww/animatediff-motion-lora-zoom-in": ("diffusion_pytorch_model.safetensors", None),
}


@pytest.mark.parametrize("source", NAMES)
def test_loras_are_told_by_names(source):
    file, expected = NAMES[source]
    training = training_of_lora(source, file or Path(source).name)
    found = None
    if training is not None:
        found = [training.recommended.get(name) for name in ("num_inference_steps", "guidance_scale")]
        found = [training.scheduler, *found]
    assert found == expected
