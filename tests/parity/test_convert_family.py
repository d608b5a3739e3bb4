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
OF_SD = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    set_alpha_to_one=False,
    steps_offset=1,
)
DDIM = [
    *("beta_start", "beta_end", "beta_schedule", "clip_sample", "set_alpha_to_one", "steps_offset"),
    *("timestep_spacing", "prediction_type", "num_train_timesteps", "thresholding"),
]
IMAGE_UNET = ["diffusers", "UNet2DConditionModel"]
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
SD2 = ("UNet2DConditionModel", UNET | dict(cross_attention_dim=1024, attention_head_dim=(1, 1)))


def made(cls, **config):
    """A network of diffusers with seeded weights, none of them trivial."""
    torch.manual_seed(0)
    model = getattr(diffusers, cls)(**config).eval()
    randomize(model)
    return model


def text_encoder(words=190, projection=False, **config):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="quick_gelu",
        eos_token_id=words - 1,
        projection_dim=16,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**settings | config)).eval()


def image_encoder(**config):
    torch.manual_seed(0)
    settings = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=32,
        patch_size=8,
        projection_dim=24,
        hidden_act="gelu",
    )
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**settings | config)
    ).eval()


def feature_extractor():
    return transformers.CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32})


def check_images(folder, theirs):
    """Embeddings of the image encoder of a folder."""
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embeds = theirs(pixels).image_embeds
    ours = mlx_unet3d.CLIPVisionModelWithProjection.from_pretrained(folder)
    assert relative_error(ours(to_mlx(pixels)).image_embeds, embeds) <= TOLERANCE


def check_texts(folder, theirs, words):
    """States of the last layer but one, and embeddings, of a text encoder with projection."""
    ids = torch.cat([torch.arange(9) + 1, torch.tensor([words - 1])])[None]
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    ours = mlx_unet3d.CLIPTextModelWithProjection.from_pretrained(folder)
    found = ours(np.array(ids), output_hidden_states=True)
    assert relative_error(found.text_embeds, expected.text_embeds) <= TOLERANCE
    assert relative_error(found.hidden_states[-2], expected.hidden_states[-2]) <= TOLERANCE


def index_of(folder):
    return json.loads(Path(folder, "model_index.json").read_text())


def scheduler_of(folder):
    return json.loads(Path(folder, "scheduler/scheduler_config.json").read_text())


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
    parts["scheduler"] = diffusers.PNDMScheduler(**OF_SD, prediction_type="v_prediction", skip_prk_steps=True)
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
    theirs = diffusers.DDIMScheduler.from_config(
        parts["scheduler"].config,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="linspace",
        steps_offset=1,
    )
    scheduler = scheduler_of("out")
    assert {k: scheduler.get(k) for k in DDIM} == {k: theirs.config[k] for k in DDIM}
    assert scheduler["prediction_type"] == "v_prediction"
    recommended = dict(num_frames=16, num_inference_steps=50, guidance_scale=7.5, fps=8)
    assert recommended.items() <= index["_recommended"].items()


@pytest.mark.parametrize("name", ["AnimateDiff-Lightning-2step", "AnimateLCM"])
def test_the_sampler_of_distilled_motion_modules(name):
    parts, motion = animatediff(made("UNet2DConditionModel", **UNET | dict(cross_attention_dim=64)))
    base = diffusers.PNDMScheduler(**OF_SD, skip_prk_steps=True)
    base.save_pretrained("source/scheduler")
    index = index_of("source") | {"scheduler": ["diffusers", "PNDMScheduler"], "unet": IMAGE_UNET}
    parts["unet"].save_pretrained("source/unet")
    Path("source/model_index.json").write_text(json.dumps(index))
    motion.save_pretrained(name)
    assert convert("source", "--motion-adapter", name) == 0
    settings, steps, guidance = dict(beta_schedule="linear"), 6, 2.0
    cls = diffusers.LCMScheduler
    if "Lightning" in name:
        cls, settings["timestep_spacing"], steps, guidance = (
            diffusers.EulerDiscreteScheduler, "trailing", 2, 1.0,
        )  # fmt: skip
    theirs = cls.from_config(base.config, **settings).config
    assert index_of("out")["scheduler"] == ["diffusers", cls.__name__]
    scheduler = scheduler_of("out")
    keys = {k for k in theirs if not k.startswith("_")} & scheduler.keys()
    assert len(keys) > 8
    assert {k: scheduler[k] for k in keys} == {k: theirs[k] for k in keys}
    recommended = dict(num_inference_steps=steps, guidance_scale=guidance, num_frames=16)
    assert recommended.items() <= index_of("out")["_recommended"].items()


# Pipelines of diffusers.


def animatediff_xl():
    words = write_tokenizer(Path("words"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained("words")
    return diffusers.AnimateDiffSDXLPipeline(
        vae=made("AutoencoderKL", **VAE),
        text_encoder=text_encoder(words),
        text_encoder_2=text_encoder(words, True, hidden_act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=made("UNet2DConditionModel", **UNET | XL),
        motion_adapter=made("MotionAdapter", **ADAPTER | dict(block_out_channels=(64, 128))),
        scheduler=diffusers.DDIMScheduler(),
        image_encoder=image_encoder(),
        feature_extractor=feature_extractor(),
    )


def stable_video():
    return diffusers.StableVideoDiffusionPipeline(
        vae=made("AutoencoderKLTemporalDecoder", **TEMPORAL_VAE),
        image_encoder=image_encoder(),
        unet=made("UNetSpatioTemporalConditionModel", **KINDS["svd"].config | dict(num_frames=14)),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
        feature_extractor=feature_extractor(),
    )


def i2vgen_xl():
    words = write_tokenizer(Path("words"))
    return diffusers.I2VGenXLPipeline(
        vae=made("AutoencoderKL", **VAE),
        text_encoder=text_encoder(words),
        tokenizer=transformers.CLIPTokenizer.from_pretrained("words"),
        image_encoder=image_encoder(),
        feature_extractor=feature_extractor(),
        unet=made("I2VGenXLUNet", **KINDS["i2vgenxl"].config),
        scheduler=diffusers.DDIMScheduler(),
    )


PIPELINES = {
    "AnimateDiffSDXLPipeline": (animatediff_xl, dict(num_frames=16, guidance_scale=5.0)),
    "StableVideoDiffusionPipeline": (stable_video, dict(num_frames=14, height=576, width=1024, fps=7)),
    "I2VGenXLPipeline": (i2vgen_xl, dict(num_frames=16, guidance_scale=9.0, height=704, width=1280)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_complete_pipelines_there_and_back(name, capsys):
    make, recommended = PIPELINES[name]
    theirs = make()
    theirs.save_pretrained("source")
    assert convert("source") == 0
    err = capsys.readouterr().err
    assert "left out" not in err
    source, index = index_of("source"), index_of("out")
    assert {k: v for k, v in index.items() if k != "_recommended"} == {
        k: v for k, v in source.items() if k != "motion_adapter" and v != [None, None]
    }
    assert recommended.items() <= index["_recommended"].items()
    assert all(Path("out", name).is_dir() for name, entry in index.items() if isinstance(entry, list))
    processor = json.loads(Path("out/feature_extractor/preprocessor_config.json").read_text())
    assert processor == json.loads(Path("source/feature_extractor/preprocessor_config.json").read_text())
    check_images("out/image_encoder", theirs.image_encoder)
    if name == "AnimateDiffSDXLPipeline":
        check_texts("out/text_encoder_2", theirs.text_encoder_2, 190)
        for part in ("tokenizer", "tokenizer_2"):
            ours = mlx_unet3d.CLIPTokenizer.from_pretrained(f"out/{part}")
            ids = theirs.tokenizer("a b", padding="max_length").input_ids
            assert ours("a b")[0].tolist() == ids
    assert main(["info", "out"]) == 0
    assert "CLIPVisionModelWithProjection" in capsys.readouterr().out
    # Quantized: the encoders in 8 bits, the VAE as it is.
    small = ("-q", "--q-bits", "4", "--q-group-size", "32")
    assert convert("source", *small, target="small") == 0
    config = json.loads(Path("small/image_encoder/config.json").read_text())
    assert config["quantization"]["bits"] == 8
    assert "quantization" not in json.loads(Path("small/vae/config.json").read_text())
    # And back.
    assert convert("out", "--to", "diffusers", target="back") == 0
    again = getattr(diffusers, name).from_pretrained("back")
    networks = [part for part in theirs.components.values() if isinstance(part, torch.nn.Module)]
    assert len(networks) >= 3
    for part, network in theirs.components.items():
        if isinstance(network, torch.nn.Module):
            state = getattr(again, part).state_dict()
            rest = {k: v for k, v in network.state_dict().items() if not k.endswith(".pe")}
            assert rest.keys() <= state.keys()
            assert all(torch.equal(state[key], value) for key, value in rest.items())


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
    words = write_tokenizer(Path("words"))
    unet = made("UNet2DConditionModel", **UNET | XL)
    motion = made("MotionAdapter", **ADAPTER | dict(block_out_channels=(64, 128), use_motion_mid_block=False))
    vae, text = made("AutoencoderKL", **VAE), text_encoder(words)
    second = text_encoder(words, True, hidden_act="gelu")
    tensors = under("model.diffusion_model.", original.numbered_unet(arrays(unet), 1))
    tensors |= under("first_stage_model.", original.vae(arrays(vae), 2))
    first = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in arrays(text).items()}
    tensors |= under("conditioner.embedders.0.transformer.", first)
    tensors |= under("conditioner.embedders.1.model.", original.text_tower(arrays(second)))
    tensors |= {"conditioner.embedders.1.model.logit_scale": np.ones((), np.float32)}
    original.write_safetensors(Path("xl"), tensors)
    original.write_pickle(Path("mm"), original.motion_module(arrays(motion)))
    assert convert("xl", "--motion-adapter", "mm", "--tokenizer", "words") == 0
    check_motion("out/unet", unet, motion)
    assert mlx_unet3d.UNetMotionModel.from_pretrained("out/unet").config.num_attention_heads == (1, 2)
    check_texts("out/text_encoder_2", second, words)
    index = index_of("out")
    assert index["_class_name"] == "AnimateDiffSDXLPipeline"
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert dict(height=1024, width=1024, guidance_scale=5.0).items() <= index["_recommended"].items()
    pads = [mlx_unet3d.CLIPTokenizer.from_pretrained(f"out/tokenizer{n}").pad_token_id for n in ("", "_2")]
    assert pads == [words - 1, 0]
    assert mlx_unet3d.AutoencoderKL.from_pretrained("out/vae").config.scaling_factor == 0.13025
    assert convert("xl", "--motion-adapter", "mm", "--tokenizer", "out", "--to", "diffusers", target="x") == 0
    pipe = diffusers.AnimateDiffSDXLPipeline.from_pretrained("x")
    state = pipe.text_encoder_2.state_dict()
    assert all(torch.equal(state[key], value) for key, value in second.state_dict().items())
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
    eye, words = image_encoder(), text_encoder(projection=True)
    tower = original.image_tower(arrays(eye)) | original.text_tower(arrays(words))
    tensors |= under("conditioner.embedders.0.open_clip.model.", tower)
    original.write_safetensors(Path("svd.safetensors"), tensors)
    assert convert("svd.safetensors") == 0
    assert "left out" not in capsys.readouterr().err
    check_images("out/image_encoder", eye)
    index = index_of("out")
    assert index["_class_name"] == "StableVideoDiffusionPipeline"
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    settings = dict(num_frames=14, num_inference_steps=25, height=576, width=1024, fps=7)
    assert index["_recommended"] == settings
    processor = json.loads(Path("out/feature_extractor/preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 224, "width": 224}
    shutil.copy("svd.safetensors", "svd_xt_1_1.safetensors")
    assert convert("svd_xt_1_1.safetensors", target="xt") == 0
    assert index_of("xt")["_recommended"] == settings | dict(num_frames=25)
    assert json.loads(Path("xt/unet/config.json").read_text())["num_frames"] == 25
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
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained("theirs")
    assert pipe.scheduler.config.sigma_max == 700
    state = pipe.image_encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in eye.state_dict().items())


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


def test_i2vgen_xl_of_four_files(capsys):
    """The folder that its authors' code wants: the UNet, a CLIP, and a checkpoint of Stable Diffusion 2."""
    words = write_tokenizer(Path("words"))
    kind = KINDS["i2vgenxl"]
    unet = made(kind.name, **kind.config | I2V | dict(cross_attention_dim=64))
    vae, eye, text = made("AutoencoderKL", **VAE), image_encoder(), text_encoder(words, hidden_act="gelu")
    Path("files").mkdir()
    write = original.write_pickle
    write(Path("files/i2vgen_xl_00854500.pth"), original.i2vgen(arrays(unet), 1), wrapped=True)
    clip = original.text(arrays(text)) | original.image_tower(arrays(eye))
    write(Path("files/open_clip_pytorch_model.bin"), clip)
    image = under("model.diffusion_model.", original.numbered_unet(arrays(made(*SD2[:1], **SD2[1])), 1))
    image |= under("first_stage_model.", original.vae(arrays(vae), 2))
    image |= under("cond_stage_model.model.", original.text(arrays(text_encoder(words))))
    write(Path("files/v2-1_512-ema-pruned.ckpt"), image)
    assert convert("files", "--tokenizer", "words") == 0
    err = capsys.readouterr().err
    assert "text_encoder: that in v2-1_512-ema-pruned.ckpt is left out" in err
    index = index_of("out")
    assert index["_class_name"] == "I2VGenXLPipeline"
    assert dict(height=704, width=1280, fps=16).items() <= index["_recommended"].items()
    check_images("out/image_encoder", eye)
    ours = mlx_unet3d.CLIPTextModel.from_pretrained("out/text_encoder")
    with torch.no_grad():
        states = text(torch.arange(77)[None] + 1).last_hidden_state
    assert relative_error(ours(np.arange(77)[None] + 1), states) <= TOLERANCE
    # The CLIP alone is its text encoder.
    assert convert("files/open_clip_pytorch_model.bin", target="clip") == 0
    assert "image_encoder: left out" in capsys.readouterr().err
    assert mlx_unet3d.CLIPTextModel.from_pretrained("clip").config == ours.config


@pytest.mark.parametrize("name", ["vision", "text", "clip"])
def test_clip_in_a_file_of_transformers(name):
    words, eye, text = 190, image_encoder(), text_encoder(190, True)
    tensors = {"vision": arrays(eye), "text": arrays(text), "clip": arrays(eye) | arrays(text)}[name]
    original.write_safetensors(Path("x.safetensors"), tensors)
    assert convert("x.safetensors") == 0
    if name == "vision":
        config = {"num_attention_heads": 1, "hidden_act": "gelu", "image_size": 32, "patch_size": 8}
        assert config.items() <= json.loads(Path("out/config.json").read_text()).items()
        check_images("out", eye)
    elif name == "text":
        config = json.loads(Path("out/config.json").read_text())
        assert (config["projection_dim"], config["eos_token_id"]) == (16, words - 1)
    else:
        assert isinstance(mlx_unet3d.CLIPTextModel.from_pretrained("out"), mlx_unet3d.CLIPTextModel)
