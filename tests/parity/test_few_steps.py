"""Few-step models: guidance as an embedding, against diffusers and against the formulas of T2V-Turbo."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from mlx_unet3d import TextToVideoPipeline  # noqa: E402
from mlx_unet3d.cli import main  # noqa: E402
from mlx_unet3d.layers.embeddings import guidance_embedding  # noqa: E402
from mlx_unet3d.pipelines.few_steps import sample_as, training_of_lora  # noqa: E402
from mlx_unet3d.schedulers import scheduler_from_config  # noqa: E402
from reference import relative_error, unet_pair  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize("dim", [4, 7, 256])
@pytest.mark.parametrize("scale", [-1.0, 0.3, 7.5, 14.0])
def test_the_embedding_is_that_of_diffusers(scale, dim):
    make = diffusers.AnimateDiffSDXLPipeline.get_guidance_scale_embedding
    expected = make(None, torch.tensor(scale).repeat(2), embedding_dim=dim)
    embedding = np.array(guidance_embedding(scale, dim, 2))
    # A frequency that is one bit off turns an angle of 1000 * scale by as much as this.
    assert np.abs(embedding - expected.numpy()).max() <= 1000 * abs(scale) * 2**-23 + 1e-6


def t2v_turbo(unet, text, scale, steps, seed):
    """T2V-Turbo's sampling by its formulas (Li et al. 2024, arXiv:2405.18750), latents of 3 frames."""
    generator = torch.Generator().manual_seed(seed)
    rows = text.shape[0]
    angles = 1000 * scale * 10_000 ** (-torch.arange(128, dtype=torch.float64) / 127)
    condition = torch.cat([angles.sin(), angles.cos()]).float().repeat(rows, 1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    origin = [20 * i - 1 for i in range(1, 51)]
    timesteps = origin[:: -(50 // steps)][:steps]
    x = torch.randn(rows, 4, 3, 4, 6, generator=generator)
    for i, t in enumerate(timesteps):
        with torch.no_grad():
            epsilon = unet(x, t, text, timestep_cond=condition).sample
        x0 = (x - (1 - alpha_bar[t]).sqrt() * epsilon) / alpha_bar[t].sqrt()
        scaled = 10 * t
        x = scaled / (scaled**2 + 0.25) ** 0.5 * x0 + 0.25 / (scaled**2 + 0.25) * x
        if i + 1 < steps:
            then = alpha_bar[timesteps[i + 1]]
            x = then.sqrt() * x + (1 - then).sqrt() * torch.randn(x.shape, generator=generator)
    return x.float()


@pytest.mark.parametrize(("scale", "steps"), [(7.5, 4), (0.5, 3), (2.0, 1)])
def test_t2v_turbo(tmp_path, scale, steps):
    theirs, unet = unet_pair(tmp_path / "unet", time_cond_proj_dim=256, cross_attention_dim=12)
    base = TextToVideoPipeline.from_pretrained(tiny.write_pipeline(tmp_path / "base"))
    config = base.scheduler.config.to_dict() | {"distilled_spacing": "strided"}
    pipe = TextToVideoPipeline(
        **base.components | {"unet": unet, "scheduler": scheduler_from_config(config, "lcm")}
    )
    prompts = ["a fox", "two moons"]
    text = np.array(pipe.encode_prompt(prompts).prompt_embeds)
    settings = dict(num_frames=3, height=32, width=48, num_inference_steps=steps, output_type="latent")
    latents = pipe(prompts, guidance_scale=scale, seed=5, **settings).frames
    expected = t2v_turbo(theirs, torch.from_numpy(text), scale, steps, seed=5)
    assert relative_error(latents, expected) <= 1e-4
    other = pipe(prompts, guidance_scale=scale + 1, seed=5, **settings).frames
    assert mx.abs(other - latents).max() > 1e-3


LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


def write_unet_lora(unet, file, rank=3, parameters=False):
    """T2V-Turbo's file for a UNet of diffusers with `time_cond_proj_dim`, and its change merged into that."""
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for _, layer in unet.named_modules():
        if isinstance(layer, LAYERS):
            out, channels, *kernel = layer.weight.shape
            r = min(rank, out, channels)
            up = 0.1 * torch.randn(out, r, *(1 for _ in kernel), generator=generator)
            down = torch.randn(r, channels, *kernel, generator=generator) / layer.weight[0].numel() ** 0.5
            with torch.no_grad():
                layer.weight += (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
            tensors += [torch.nn.Parameter(x) if parameters else x for x in (up, down)]
    torch.save(tensors, file)
    return len(tensors) // 2


@pytest.mark.parametrize("parameters", [False, True])
def test_the_lora_of_t2v_turbo(tmp_path, parameters):
    """All layers of a UNet to which the projection of the guidance scale was added, from zeros."""
    theirs, unet = unet_pair(tmp_path / "unet", cross_attention_dim=12)
    student = diffusers.UNet3DConditionModel.from_config(theirs.config, time_cond_proj_dim=256).eval()
    student.load_state_dict(theirs.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    count = write_unet_lora(student, tmp_path / "unet_lora.pt", parameters=parameters)
    base = TextToVideoPipeline.from_pretrained(tiny.write_pipeline(tmp_path / "base"))
    config = base.scheduler.config.to_dict() | {"distilled_spacing": "strided"}
    parts = base.components | {"unet": unet, "scheduler": scheduler_from_config(config, "lcm")}
    pipe = TextToVideoPipeline(**parts)
    assert pipe.load_lora_weights(tmp_path / "unet_lora.pt") == {"unet": count}
    assert pipe.embeds_guidance
    text = np.array(pipe.encode_prompt("a fox").prompt_embeds)
    settings = dict(num_frames=3, height=32, width=48, num_inference_steps=4, output_type="latent")
    expected = t2v_turbo(student, torch.from_numpy(text), 7.5, 4, seed=5)
    assert relative_error(pipe("a fox", guidance_scale=7.5, seed=5, **settings).frames, expected) <= 1e-4
    command = ["convert", "--hf-path", str(tmp_path / "unet"), "--lora", str(tmp_path / "unet_lora.pt")]
    assert main([*command, "--to", "diffusers", "--mlx-path", str(tmp_path / "merged")]) == 0
    merged = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == student.state_dict().keys()
    for name, weight in student.state_dict().items():
        assert relative_error(merged[name], weight) <= 1e-5, name
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "turbo", layout="diffusers")
    again = TextToVideoPipeline.from_pretrained(tmp_path / "turbo")
    assert relative_error(again("a fox", guidance_scale=7.5, seed=5, **settings).frames, expected) <= 1e-4
    loaded = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "turbo" / "unet")
    ours, its = (net.time_embedding.cond_proj.weight.detach() for net in (loaded, student))
    assert relative_error(ours, its) <= 1e-5


def test_mcm(tmp_path):
    """The folder that PEFT saves, sampled as MCM's demo does."""
    peft = pytest.importorskip("peft")
    base = TextToVideoPipeline.from_pretrained(tiny.write_pipeline(tmp_path / "base"))
    base.save_pretrained(tmp_path / "theirs", layout="diffusers")
    theirs = diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path / "theirs")
    theirs.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    targets = r".*(to_q|to_v|to_out\.0|proj_in|net\.2|resnets\.\d+\.conv1|conv_shortcut|time_emb_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    theirs.unet = peft.get_peft_model(theirs.unet, config)
    folder = tmp_path / "mcm" / "modelscopet2v-laion"
    theirs.unet.save_pretrained(folder)
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config, timestep_scaling=4.0)
    training = training_of_lora(str(folder), "adapter_model.safetensors")
    assert sample_as(base, training).startswith("a motion consistency model (MCM), sampled by LCMScheduler")
    plain = base("a fox", seed=3, num_frames=3, height=32, width=32).frames
    base.load_lora_weights(folder)
    args = dict(num_frames=3, height=32, width=32, num_inference_steps=4, guidance_scale=1.0)
    expected = theirs("a fox", generator=torch.Generator().manual_seed(3), **args).frames
    frames = base("a fox", seed=3, num_frames=3, height=32, width=32).frames  # the rest it recommends
    assert np.abs(frames - expected).max() <= 1e-4
    assert np.abs(frames - plain).max() > 1e-2
