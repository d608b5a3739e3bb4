"""Few-step models: guidance as an embedding."""

import mlx.core as mx
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, UNet3DConditionModel, VideoToVideoPipeline, media, memory
from mlx_unet3d.cli import main
from mlx_unet3d.layers.embeddings import guidance_embedding

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
