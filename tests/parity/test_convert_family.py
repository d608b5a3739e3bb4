"""The converter on AnimateDiff, Stable Diffusion, Stable Video Diffusion and I2VGen-XL, against diffusers."""

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mlx_unet3d  # noqa: E402
import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import original_files as original  # noqa: E402
import transformers  # noqa: E402
from mlx_unet3d.cli import main  # noqa: E402
from reference import relative_error, to_mlx  # noqa: E402
from tiny import write_tokenizer  # noqa: E402
from video_networks import KINDS, ours_of, randomize, theirs_of  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-5
STEM = "diffusion_pytorch_model.safetensors"
# As original files have them: 32 groups, 8 heads of text below 1,024 channels, else 64 channels a head.
UNET = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=8,
)
XL = dict(
    block_out_channels=(64, 128),
    cross_attention_dim=1024,
    attention_head_dim=(1, 2),
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=6 * 256 + 16,
)
ADAPTER = dict(block_out_channels=(32, 64), motion_layers_per_block=1)
VAE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
)
TEMPORAL_VAE = {k: v for k, v in VAE.items() if k != "up_block_types"}
SVD = dict(block_out_channels=(64, 128), num_attention_heads=(1, 2))
I2V = dict(norm_num_groups=32)


def made(cls, **config):
    """A network of diffusers with seeded weights, none of them trivial."""
    torch.manual_seed(0)
    model = getattr(diffusers, cls)(**config).eval()
    randomize(model)
    return model


def text_encoder(words=190):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="quick_gelu",
        eos_token_id=words - 1,
    )
    return transformers.CLIPTextModel(config).eval()


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def under(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def convert(source, *arguments, target="out"):
    given = ["--hf-path", str(source), "--mlx-path", target, "--verify", *map(str, arguments)]
    return main(["convert", *given])


def same(folder, state):
    """Whether the weights of a folder in diffusers' layout are these, bit for bit, but for tables that files
    of others lack or have once more."""
    found = mx.load(f"{folder}/{STEM}")
    assert found.keys() == state.keys()
    differing = {k for k, value in state.items() if not np.array_equal(np.array(found[k]), value.numpy())}
    tables = {key for key in differing if key.endswith(".pe")}
    assert all(np.abs(np.array(found[key]) - state[key].numpy()).max() <= 1e-5 for key in tables)
    return differing == tables


# Folders of diffusers.

NETWORKS = {
    "UNetMotionModel": KINDS["motion"].config,
    "UNetSpatioTemporalConditionModel": KINDS["svd"].config,
    "I2VGenXLUNet": KINDS["i2vgenxl"].config,
    "AutoencoderKLTemporalDecoder": TEMPORAL_VAE,
    "MotionAdapter": ADAPTER | dict(use_motion_mid_block=False, motion_max_seq_length=24),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_there_and_back(name, capsys):
    theirs = made(name, **NETWORKS[name])
    theirs.save_pretrained("source")
    assert convert("source") == 0
    err = capsys.readouterr().err
    assert "all equal to the source" in err
    assert "above its difference from diffusers'" in err or name == "MotionAdapter"
    assert f"{name}.from_pretrained" in Path("out/README.md").read_text()
    ours = getattr(mlx_unet3d, name).from_pretrained("out")
    assert convert("out", "--to", "diffusers", target="back") == 0
    assert same("back", theirs.state_dict())
    assert main(["info", "out"]) == 0
    assert name in capsys.readouterr().out
    if name in ("UNetMotionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet"):
        kind = next(kind for kind in KINDS.values() if kind.name == name)
        inputs = kind.inputs(theirs.config)
        assert relative_error(ours_of(ours, inputs), theirs_of(theirs, inputs)) <= TOLERANCE
        assert convert("source", "--q-bits", "4", "--q-group-size", "32", target="small") == 0
        config = json.loads(Path("small/config.json").read_text())
        assert config["quantization"]["bits"] in (4, 8)
        assert ours_of(type(ours).from_pretrained("small"), inputs).shape == theirs_of(theirs, inputs).shape


def animatediff(unet):
    words = write_tokenizer(Path("words"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained("words")
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    parts = dict(
        vae=made("AutoencoderKL", **VAE),
        text_encoder=text_encoder(words),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )
    motion = made("MotionAdapter", **ADAPTER)
    diffusers.AnimateDiffPipeline(motion_adapter=motion, **parts).save_pretrained("source")
    return parts, motion


def test_animatediff_pipeline(capsys):
    """Its motion adapter has the UNet's weights once more: never read, and written for diffusers alone."""
    parts, motion = animatediff(made("UNet2DConditionModel", **UNET | dict(cross_attention_dim=64)))
    shutil.rmtree("source/motion_adapter")
    assert convert("source") == 0
    index = json.loads(Path("out/model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNetMotionModel"]
    assert "motion_adapter" not in index
    assert not Path("out/motion_adapter").exists()
    assert mlx_unet3d.UNetMotionModel.from_pretrained("out/unet").num_parameters() > 0
    assert convert("out", "--to", "diffusers", target="back") == 0
    theirs = diffusers.AnimateDiffPipeline.from_pretrained("back")
    state = theirs.motion_adapter.state_dict()
    tables = {name: value for name, value in motion.state_dict().items() if name.endswith(".pe")}
    assert all(torch.allclose(state[name], value, atol=1e-5) for name, value in tables.items())
    others = motion.state_dict().keys() - tables.keys()
    assert all(torch.equal(state[name], motion.state_dict()[name]) for name in others)
    flat, state = parts["unet"].state_dict(), theirs.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in flat.items())
    assert convert("source", "-q", "--q-group-size", "32", target="small") == 0


def test_a_base_and_a_motion_adapter_in_folders():
    unet = made("UNet2DConditionModel", **UNET)
    motion = made("MotionAdapter", **ADAPTER)
    unet.save_pretrained("unet")
    motion.save_pretrained("motion")
    assert convert("unet", "--motion-adapter", "motion") == 0
    check_motion("out", unet, motion)
    assert convert("unet", "--motion-adapter", "motion", "--to", "diffusers", target="theirs") == 0
    theirs = diffusers.UNetMotionModel.from_unet2d(unet, motion)
    assert same("theirs", theirs.state_dict())


def check_motion(folder, unet, motion):
    theirs = diffusers.UNetMotionModel.from_unet2d(unet, motion).eval()
    if "addition_embed_type" in unet.config and unet.config.addition_embed_type:  # which diffusers forgets
        theirs.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    ours = mlx_unet3d.UNetMotionModel.from_pretrained(folder)
    inputs = KINDS["motion"].inputs(theirs.config)
    assert relative_error(ours_of(ours, inputs), theirs_of(theirs, inputs)) <= TOLERANCE


def test_a_pipeline_of_images_and_a_motion_adapter(capsys):
    unet = made("UNet2DConditionModel", **UNET | dict(cross_attention_dim=64))
    parts, motion = animatediff(unet)
    diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained("images")
    unet.save_pretrained("images/unet")
    index = json.loads(Path("images/model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    Path("images/model_index.json").write_text(json.dumps(index))
    motion.save_pretrained("motion")
    assert convert("images", "--motion-adapter", "motion") == 0
    check_motion("out/unet", unet, motion)
    index = json.loads(Path("out/model_index.json").read_text())
    assert index["_class_name"] == "AnimateDiffPipeline"
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= index.keys()
    scheduler = json.loads(Path("out/scheduler/scheduler_config.json").read_text())
    assert scheduler["beta_schedule"] == "linear"
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)


# Original files.

MODULES = {
    "v1": (dict(use_motion_mid_block=False, motion_max_seq_length=24), {}, original.write_pickle),
    "v2": (dict(), {}, original.write_safetensors),
    "v3": (dict(use_motion_mid_block=False), {}, original.write_safetensors),
    "AnimateLCM": (dict(), dict(tables=False), original.write_pickle),
    "wrapped": (dict(), {}, lambda path, t: original.write_pickle(path, under("module.", t), wrapped=True)),
    "PIA": (dict(conv_in_channels=9), {}, original.write_safetensors),
    "two layers": (dict(motion_layers_per_block=2), {}, original.write_safetensors),
}


@pytest.mark.parametrize("name", MODULES)
def test_motion_modules(name):
    config, more, write = MODULES[name]
    theirs = made("MotionAdapter", **ADAPTER | config)
    write(Path("mm.ckpt"), original.motion_module(arrays(theirs), **more))
    assert convert("mm.ckpt", "--to", "diffusers") == 0
    assert same("out", theirs.state_dict())
    assert convert("mm.ckpt", target="ours") == 0
    ours = mlx_unet3d.MotionAdapter.from_pretrained("ours")
    assert ours.config.motion_max_seq_length == config.get("motion_max_seq_length", 32)
    again = diffusers.MotionAdapter.from_pretrained("out")
    assert again.config.use_motion_mid_block == config.get("use_motion_mid_block", True)


def test_lightning_under_diffusers_names():
    theirs = made("MotionAdapter", **ADAPTER)
    original.write_safetensors(Path("x.safetensors"), arrays(theirs))
    assert convert("x.safetensors", "--to", "diffusers") == 0
    assert same("out", theirs.state_dict())


def stable_diffusion(unet, vae, text):
    """A checkpoint as the web UIs have it, with what training leaves in it."""
    tensors = under("model.diffusion_model.", original.numbered_unet(arrays(unet), 1))
    tensors |= under("first_stage_model.", original.vae(arrays(vae), 2))
    words = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in arrays(text).items()}
    tensors |= under("cond_stage_model.transformer.", words)
    ids = np.arange(77)[None]
    tensors |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": ids}
    return tensors | {"alphas_cumprod": np.ones(9, np.float32), "model_ema.decay": np.ones((), np.float32)}


@pytest.mark.parametrize("write", [original.write_safetensors, original.write_pickle])
def test_stable_diffusion_with_a_motion_module(write, capsys):
    words = write_tokenizer(Path("words"))
    unet = made("UNet2DConditionModel", **UNET | dict(cross_attention_dim=64))
    vae, text = made("AutoencoderKL", **VAE), text_encoder(words)
    motion = made("MotionAdapter", **ADAPTER)
    write(Path("sd.ckpt"), stable_diffusion(unet, vae, text))
    write(Path("mm.ckpt"), original.motion_module(arrays(motion)))
    assert convert("sd.ckpt", "--motion-adapter", "mm.ckpt", "--tokenizer", "words") == 0
    check_motion("out/unet", unet, motion)
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        frames = vae.decode(latents).sample
        states = text(torch.arange(77)[None] + 1).last_hidden_state
    ours = mlx_unet3d.AutoencoderKL.from_pretrained("out/vae")
    assert relative_error(ours.decode(to_mlx(latents)), frames) <= TOLERANCE
    ours = mlx_unet3d.CLIPTextModel.from_pretrained("out/text_encoder")
    assert ours.config.hidden_act == "quick_gelu"
    assert relative_error(ours(np.arange(77)[None] + 1), states) <= TOLERANCE
    assert json.loads(Path("out/model_index.json").read_text())["_class_name"] == "AnimateDiffPipeline"
    # Both files in one folder, and for diffusers.
    Path("files").mkdir()
    for name in ("sd.ckpt", "mm.ckpt"):
        shutil.move(name, f"files/{name}")
    assert convert("files", "--tokenizer", "words", "--to", "diffusers", target="theirs") == 0
    pipe = diffusers.AnimateDiffPipeline.from_pretrained("theirs")
    state = pipe.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in unet.state_dict().items())
    tables = {name: value for name, value in motion.state_dict().items() if name.endswith(".pe")}
    assert all(torch.allclose(state[name], value, atol=1e-5) for name, value in tables.items())
    others = motion.state_dict().keys() - tables.keys()
    assert all(torch.equal(state[name], motion.state_dict()[name]) for name in others)


def test_stable_diffusion_xl_with_a_motion_module():
    unet = made("UNet2DConditionModel", **UNET | XL)
    motion = made("MotionAdapter", **ADAPTER | dict(block_out_channels=(64, 128), use_motion_mid_block=False))
    tensors = under("model.diffusion_model.", original.numbered_unet(arrays(unet), 1))
    vae = made("AutoencoderKL", **VAE)
    tensors |= under("first_stage_model.", original.vae(arrays(vae), 2))
    original.write_safetensors(Path("xl"), tensors)
    original.write_pickle(Path("mm"), original.motion_module(arrays(motion)))
    assert convert("xl", "--motion-adapter", "mm") == 0
    check_motion("out", unet, motion)
    assert mlx_unet3d.UNetMotionModel.from_pretrained("out").config.num_attention_heads == (1, 2)
    assert convert("xl", target="vae") == 0
    assert mlx_unet3d.AutoencoderKL.from_pretrained("vae").config.scaling_factor == 0.13025


def test_a_base_under_diffusers_names():
    unet, motion = made("UNet2DConditionModel", **UNET), made("MotionAdapter", **ADAPTER)
    original.write_safetensors(Path("unet"), arrays(unet))
    motion.save_pretrained("motion")
    assert convert("unet", "--motion-adapter", "motion") == 0
    check_motion("out", unet, motion)


def test_stable_video_diffusion(capsys):
    kind = KINDS["svd"]
    unet = made(kind.name, **kind.config | SVD)
    vae = made("AutoencoderKLTemporalDecoder", **TEMPORAL_VAE)
    tensors = under("model.diffusion_model.", original.numbered_unet(arrays(unet), 1))
    tensors |= original.temporal_vae(arrays(vae), 2)
    front = "conditioner.embedders.0.open_clip.model"
    tensors |= {f"{front}.visual.conv1.weight": np.ones((8, 3, 2, 2), np.float32)}
    original.write_safetensors(Path("svd.safetensors"), tensors)
    assert convert("svd.safetensors") == 0
    assert "image_encoder: left out" in capsys.readouterr().err
    inputs = kind.inputs(unet.config)
    ours = mlx_unet3d.UNetSpatioTemporalConditionModel.from_pretrained("out/unet")
    assert relative_error(ours_of(ours, inputs), theirs_of(unet, inputs)) <= TOLERANCE
    latents, images = torch.randn(2, 4, 4, 4), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        frames = vae.decode(latents, num_frames=2).sample
        moments = vae.encode(images).latent_dist.mode()
    ours = mlx_unet3d.AutoencoderKLTemporalDecoder.from_pretrained("out/vae")
    assert relative_error(ours.decode(to_mlx(latents), num_frames=2), frames) <= TOLERANCE
    assert relative_error(ours.encode(to_mlx(images)).mode(), moments) <= TOLERANCE
    assert convert("svd.safetensors", "--to", "diffusers", target="theirs") == 0
    assert same("theirs/unet", unet.state_dict())
    assert same("theirs/vae", vae.state_dict())
    assert diffusers.EulerDiscreteScheduler.from_pretrained("theirs/scheduler").config.sigma_max == 700


def test_i2vgen_xl():
    kind = KINDS["i2vgenxl"]
    theirs = made(kind.name, **kind.config | I2V)
    original.write_pickle(Path("i2v.pth"), original.i2vgen(arrays(theirs), 1), wrapped=True)
    assert convert("i2v.pth") == 0
    inputs = kind.inputs(theirs.config)
    ours = mlx_unet3d.I2VGenXLUNet.from_pretrained("out")
    assert relative_error(ours_of(ours, inputs), theirs_of(theirs, inputs)) <= TOLERANCE
    assert convert("i2v.pth", "--to", "diffusers", target="theirs") == 0
    assert same("theirs", theirs.state_dict())
