"""Few-step models: guidance as an embedding, against diffusers and against the formulas of T2V-Turbo."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from mlx_unet3d import TextToVideoPipeline  # noqa: E402
from mlx_unet3d.layers.embeddings import guidance_embedding  # noqa: E402
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
