"""Original files without torch: what the converter makes of them is bit for bit the network they were."""

import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_unet3d_convert as converter
import numpy as np
import original_files as original
import pytest
import tiny
from mlx_unet3d import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    TextToVideoPipeline,
    UNet3DConditionModel,
)
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import TensorInfo, headers, read_tensor
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError

# As in the original files: 32 groups, 64 channels a head of the text encoder.
UNET = dict(
    block_out_channels=(32, 64, 32),
    down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=128,
    attention_head_dim=8,
    layers_per_block=2,
    sample_size=32,
)
VAE = dict(
    block_out_channels=(32, 64, 32),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    sample_size=512,
)
TEXT = dict(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_act="gelu",
)
LAYERS, LEVELS = UNET["layers_per_block"], len(VAE["block_out_channels"])
CLASSES = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
SHORT = dict(num_frames=2, num_inference_steps=2, height=32, width=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The pipeline that the original files are written from."""
    folder = tmp_path_factory.mktemp("model")
    words = tiny.write_tokenizer(folder / "tokenizer")
    pipe = TextToVideoPipeline(
        unet=tiny.randomize(UNet3DConditionModel(**UNET), 0),
        vae=tiny.randomize(AutoencoderKL(**VAE), 1),
        text_encoder=tiny.randomize(CLIPTextModel(vocab_size=words, **TEXT), 2),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler(**tiny.SCHEDULER),
    )
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture(scope="module")
def tensors(model):
    """The tensors of each original file."""
    pipe, _ = model
    return {
        "unet": original.unet(original.as_diffusers(pipe.unet), LAYERS),
        "vae": original.vae(original.as_diffusers(pipe.vae), LEVELS),
        "text_encoder": original.text(original.as_diffusers(pipe.text_encoder)),
    }


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tensors):
    """A folder as ModelScope's, the autoencoder inside a whole checkpoint of latent diffusion."""
    made = Path("modelscope")
    made.mkdir()
    original.write_pickle(made / "text2video_pytorch_model.pth", tensors["unet"])
    original.write_pickle(made / "VQGAN_autoencoder.pth", latent_diffusion(tensors["vae"]), wrapped=True)
    original.write_pickle(made / "open_clip_pytorch_model.bin", tensors["text_encoder"], legacy=True)
    (made / "configuration.json").write_text('{"framework": "pytorch"}')
    (made / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return made


def latent_diffusion(vae):
    """A checkpoint of an image model: its UNet, its text encoder, running means; mostly in float16."""
    made = {f"first_stage_model.{key}": value for key, value in vae.items()}
    made |= {f"model_ema.{key.replace('.', '')}": value for key, value in made.items()}
    made |= {
        f"model.diffusion_model.{key}": np.ones((4, 4), np.float16)
        for key in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
    }
    made |= {"cond_stage_model.model.token_embedding.weight": np.ones((1500, 1500), np.float16)}
    return made | {"first_stage_model.loss.logvar": np.zeros((), np.float32)}


def convert(source, *arguments, target="out"):
    return main(["convert", "--hf-path", str(source), "--mlx-path", target, *map(str, arguments)])


def same(ours, theirs):
    """Whether two networks have the same config and the same parameters, bit for bit."""
    a, b = (dict(tree_flatten(network.parameters())) for network in (ours, theirs))
    assert ours.config == theirs.config
    assert a.keys() == b.keys()
    return all(a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]) for name in a)


def test_whole_folder(model, folder, capsys):
    pipe, source = model
    assert convert(folder, "--tokenizer", source, "--verify") == 0
    err = capsys.readouterr().err
    assert (
        "unet: UNet3DConditionModel from text2video_pytorch_model.pth (ModelScope's original UNet, as" in err
    )
    assert "it has middle_block.0.temopral_conv" in err
    assert "a torch pickle, read without running it" in err
    assert "norm_num_groups=32" in err
    assert "num_attention_heads=2, hidden_act='gelu'" in err
    assert "scaling_factor=0.18215" in err
    assert err.count("tensors read back, all equal to the source") == 3
    ours = TextToVideoPipeline.from_pretrained("out")
    assert same(ours.unet, pipe.unet)
    assert same(ours.vae, pipe.vae)
    assert same(ours.text_encoder, pipe.text_encoder)
    assert np.array_equal(ours("a cat", **SHORT).frames, pipe("a cat", **SHORT).frames)
    config = json.loads(Path("out/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert tiny.SCHEDULER.items() <= config.items()
    assert config["prediction_type"] == "epsilon"
    assert config["num_train_timesteps"] == 1000
    card = Path("out/README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "the folder `modelscope`" in card


def test_folder_of_other_names(model, tensors):
    """What is what is told by content: the names, suffixes included, all lie."""
    pipe, source = model
    Path("files").mkdir()
    original.write_pickle(Path("files/open_clip.safetensors"), tensors["unet"])
    original.write_safetensors(Path("files/unet.bin"), tensors["vae"])
    original.write_safetensors(Path("files/vae.pth"), tensors["text_encoder"])
    assert convert("files", "--tokenizer", source / "tokenizer") == 0
    ours = TextToVideoPipeline.from_pretrained("out")
    assert same(ours.unet, pipe.unet)
    assert same(ours.vae, pipe.vae)
    assert same(ours.text_encoder, pipe.text_encoder)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "write",
    [
        original.write_safetensors,
        original.write_pickle,
        lambda path, tensors: original.write_pickle(path, tensors, legacy=True, wrapped=True),
    ],
    ids=["safetensors", "zip", "legacy"],
)
def test_one_file(model, tensors, name, write, capsys):
    pipe, _ = model
    other = "unet" if name == "vae" else "vae"
    write(Path(f"{other}.ckpt"), tensors[name])
    assert convert(f"{other}.ckpt", "--verify") == 0
    assert "all equal to the source" in capsys.readouterr().err
    assert same(CLASSES[name].from_pretrained("out"), getattr(pipe, name))
    card = Path("out/README.md").read_text()
    assert f"the file `{other}.ckpt`" in card
    assert f"{CLASSES[name].__name__}.from_pretrained" in card


def test_folder_with_one_file(model, tensors):
    Path("files").mkdir()
    original.write_pickle(Path("files/x.pt"), tensors["vae"])
    assert convert("files") == 0
    assert same(AutoencoderKL.from_pretrained("out"), model[0].vae)


def test_unet_inside_a_larger_model(model, tensors):
    inside = {f"model.diffusion_model.{key}": value for key, value in tensors["unet"].items()}
    original.write_pickle(Path("x"), inside | {"betas": np.zeros(1000, np.float32)})
    assert convert("x") == 0
    assert same(UNet3DConditionModel.from_pretrained("out"), model[0].unet)


# Several networks in a file.

WITHIN = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.model.",
}


def within(tensors, *names, **prefixes):
    """The networks of these names in one file."""
    return {
        prefixes.get(name, WITHIN[name]) + key: value
        for name in names
        for key, value in tensors[name].items()
    }


def image_model(tensors):
    """A whole checkpoint of latent diffusion whose UNet is one of images."""
    made = within(tensors, "vae", "text_encoder")
    return made | {f"model.diffusion_model.{key}": np.ones((4, 4), np.float16) for key in IMAGE_UNET}


def is_the_pipeline(pipe, folder="out"):
    ours = TextToVideoPipeline.from_pretrained(folder)
    return all(same(getattr(ours, name), getattr(pipe, name)) for name in CLASSES)


@pytest.mark.parametrize("write", [original.write_safetensors, original.write_pickle])
@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "cond_stage_model."])
def test_three_networks_in_a_file(model, tensors, write, prefix, capsys):
    pipe, source = model
    betas = {"betas": np.ones(1000, np.float32), "model_ema.num_updates": np.zeros(1, np.int64)}
    write(Path("x.ckpt"), within(tensors, *CLASSES, text_encoder=prefix) | betas)
    assert convert("x.ckpt", "--tokenizer", source, "--verify") == 0
    err = capsys.readouterr().err
    assert f"OpenCLIP's text tower, as it has {prefix}ln_final.weight" in err
    assert err.count("all equal to the source") == 3
    assert is_the_pipeline(pipe)
    assert json.loads(Path("out/scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"
    assert "the file `x.ckpt`" in Path("out/README.md").read_text()


def test_three_networks_by_their_names_in_a_pipeline(model):
    """With diffusers' names, and those of the networks in front."""
    pipe, source = model
    whole = {
        f"{name}.{key}": value
        for name in CLASSES
        for key, value in original.as_diffusers(getattr(pipe, name)).items()
    }
    original.write_pickle(Path("x.pt"), whole)
    assert convert("x.pt", "--tokenizer", source) == 0
    assert is_the_pipeline(pipe)


def test_dropped_tensors_of_a_shared_file_are_listed_once(model, tensors):
    whole = within(tensors, *CLASSES) | {"betas": np.ones(9, np.float32)}
    original.write_pickle(Path("x"), whole)
    plan = converter.plan_checkpoint("x", tokenizer=model[1])
    dropped = [key for component in plan.components for key in component.dropped]
    kept = {re.sub(r"\[.*", "", tensor.key) for part in plan.components for tensor in part.tensors}
    assert len(dropped) == len(set(dropped))
    assert "betas" in dropped
    assert "cond_stage_model.model.visual.conv1.weight" in dropped
    assert kept | set(dropped) == set(whole)
    assert not kept & set(dropped)


@pytest.mark.parametrize("alone", CLASSES)
def test_two_networks_in_a_file_of_a_folder(model, tensors, alone):
    pipe, source = model
    Path("files").mkdir()
    others = [name for name in CLASSES if name != alone]
    original.write_pickle(Path("files/a.ckpt"), within(tensors, *others))
    original.write_safetensors(Path("files/b.safetensors"), tensors[alone])
    assert convert("files", "--tokenizer", source) == 0
    assert is_the_pipeline(pipe)


def test_text_encoder_of_an_image_model(model, folder, tensors, capsys):
    """That in the file of the autoencoder is for where there is no other."""
    pipe, source = model
    turned = {key: 2 * value for key, value in tensors["text_encoder"].items()}
    whole = image_model(tensors | {"text_encoder": turned})
    original.write_pickle(folder / "VQGAN_autoencoder.pth", whole, wrapped=True)
    assert convert(folder, "--tokenizer", source) == 0
    assert "text_encoder: that in VQGAN_autoencoder.pth is left out" in capsys.readouterr().err
    assert is_the_pipeline(pipe)
    original.write_pickle(folder / "VQGAN_autoencoder.pth", image_model(tensors))
    (folder / "open_clip_pytorch_model.bin").unlink()
    assert convert(folder, "--tokenizer", source, target="again") == 0
    assert is_the_pipeline(pipe, "again")


def test_image_model_alone_is_its_autoencoder(model, tensors, capsys):
    original.write_pickle(Path("VQGAN_autoencoder.pth"), image_model(tensors))
    assert convert("VQGAN_autoencoder.pth") == 0
    assert "text_encoder: left out, as VQGAN_autoencoder.pth is the checkpoint of an image model" in (
        capsys.readouterr().err
    )
    assert same(AutoencoderKL.from_pretrained("out"), model[0].vae)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_file_with_diffusers_names(model, name, layout, capsys):
    """Without its config.json the shapes tell, with it the config does."""
    network = getattr(model[0], name)
    (weights,) = network.save_pretrained("saved", layout=layout)
    shutil.copy(weights, "x.bin")
    assert convert("x.bin", "--verify") == 0
    assert "config from the shapes" in capsys.readouterr().err
    assert same(CLASSES[name].from_pretrained("out"), network)
    assert convert(weights, target="again") == 0
    err = capsys.readouterr().err
    assert "with the config.json beside it" in err
    assert "config from the shapes" not in err
    assert same(CLASSES[name].from_pretrained("again"), network)


def test_config_beside_says_what_no_shape_does(model):
    config = dict(UNET, block_out_channels=(8, 16, 8), norm_num_groups=4, attention_head_dim=4)
    network = tiny.randomize(UNet3DConditionModel(**config))
    (weights,) = network.save_pretrained("saved")
    assert convert(weights) == 0
    assert same(UNet3DConditionModel.from_pretrained("out"), network)
    original.write_pickle(Path("saved/x.pth"), original.unet(original.as_diffusers(network), LAYERS))
    assert convert("saved/x.pth", target="again") == 0
    assert same(UNet3DConditionModel.from_pretrained("again"), network)
    # That of another network is none of it.
    shutil.move(weights, "x.safetensors")
    model[0].vae.save_pretrained(".")
    with pytest.raises(CheckpointError, match="norm_num_groups=32 does not divide 8 channels"):
        converter.plan_checkpoint("x.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        dict(layers_per_block=1),
        dict(block_out_channels=(32,), down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",)),
        dict(in_channels=5, out_channels=3, cross_attention_dim=24, attention_head_dim=16),
    ],
    ids=["one layer", "one level", "channels"],
)
def test_other_unets(change):
    network = tiny.randomize(UNet3DConditionModel(**UNET | change))
    layers = network.config.layers_per_block
    original.write_pickle(Path("x.pth"), original.unet(original.as_diffusers(network), layers))
    assert convert("x.pth") == 0
    assert same(UNet3DConditionModel.from_pretrained("out"), network)


def test_to_diffusers(model, folder):
    pipe, source = model
    assert convert(folder, "--tokenizer", source, "--to", "diffusers", "--verify") == 0
    ours = mx.load("out/unet/diffusion_pytorch_model.safetensors")
    expected = original.as_diffusers(pipe.unet)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(np.array(ours[name]), expected[name]) for name in expected)
    assert same(TextToVideoPipeline.from_pretrained("out").vae, pipe.vae)


def test_dtype_and_quantization(model, folder, capsys):
    _, source = model
    arguments = ["--dtype", "float16", "--q-bits", "4", "--q-group-size", "32"]
    assert convert(folder, "--tokenizer", source, "--verify", *arguments) == 0
    assert "dB above their rounding" in capsys.readouterr().err
    for name, cls in CLASSES.items():
        kept = cls.from_pretrained(source / name, dtype=mx.float16)
        kept.save_pretrained(f"kept/{name}")
    assert convert("kept/unet", "--q-bits", "4", "--q-group-size", "32", target="direct") == 0
    ours, theirs = (
        mx.load(f"{folder}/diffusion_pytorch_model.safetensors") for folder in ("out/unet", "direct")
    )
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[key], theirs[key]) for key in ours)
    assert TextToVideoPipeline.from_pretrained("out").unet.config == kept_config(source)


def kept_config(source):
    return UNet3DConditionModel.from_pretrained(source / "unet").config


def test_dtype_is_that_of_the_network(tensors):
    """Not of what lies beside it in the file, nor of what is dropped."""
    original.write_pickle(Path("x"), latent_diffusion(tensors["vae"]))
    plan = converter.plan_checkpoint("x")
    assert {tensor.dtype for tensor in plan.components[0].tensors} == {mx.float32}


def test_dry_run(model, folder, tensors, capsys):
    _, source = model
    assert convert(folder, "--tokenizer", source, "--dry-run") == 0
    out = capsys.readouterr().out
    rows = dict(line.split(" -> ") for line in out.splitlines() if " -> " in line)
    rows = {key.split()[0]: value for key, value in rows.items()}
    whole = {re.sub(r"\[.*", "", key) for key in rows}
    assert whole == {*tensors["unet"], *tensors["text_encoder"], *latent_diffusion(tensors["vae"])}
    block = "transformer.resblocks.0.attn.in_proj_weight"
    assert [rows[f"{block}[{start}:{start + 128}]"].split()[0].split(".")[-2] for start in (0, 128, 256)] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert rows["input_blocks.0.1.proj_in.weight[:,:,0]"] == "transformer_in.proj_in.weight float32 (64, 32)"
    dropped = {key for key, value in rows.items() if value == "not needed"}
    assert {"visual.conv1.weight", "logit_scale", "text_projection"} <= dropped
    assert "transformer.resblocks.2.ln_1.weight" in dropped
    assert "transformer.resblocks.1.ln_1.weight" not in dropped
    assert "vae: config from the shapes; not in the file and taken as published models have it" in out
    assert os.listdir() == ["modelscope"]


def test_memory_is_that_of_a_tensor(tensors, monkeypatch):
    """No tensor but the one before is still held when the next is made, and of a fused one only the part."""
    original.write_pickle(Path("x"), tensors["text_encoder"])
    held, read = [], []
    make, read_array = converter.TensorPlan.make, converter.plan.read_tensor

    def counting(self):
        mx.synchronize()
        mx.clear_cache()
        held.append(mx.get_active_memory())
        return make(self)

    def reading(path, info):
        read.append(info.nbytes)
        return read_array(path, info)

    monkeypatch.setattr(headers, "AHEAD", 0)
    monkeypatch.setattr(converter.TensorPlan, "make", counting)
    monkeypatch.setattr(converter.plan, "read_tensor", reading)
    before = mx.get_active_memory()
    converter.convert("x", "out")
    largest = 192 * 128 * 4
    assert (
        max(read) == largest < tensors["text_encoder"]["transformer.resblocks.0.attn.in_proj_weight"].nbytes
    )
    assert max(held) - before <= 2 * largest


def test_strided_tensors(model, tensors):
    """Views of transposed storages, as a pickle may hold them, come apart in the same way."""
    turned = {
        key: np.asfortranarray(array) if array.ndim in (2, 3) else array
        for name in ("unet", "text_encoder")
        for key, array in tensors[name].items()
    }
    for name in ("unet", "text_encoder"):
        original.write_pickle(Path(name), {key: turned[key] for key in tensors[name]})
        assert convert(name, "--verify", target=f"out-{name}") == 0
        assert same(CLASSES[name].from_pretrained(f"out-{name}"), getattr(model[0], name))


def test_rows_and_squeezed():
    array = np.arange(24, dtype="<f4")
    array.tofile("x")
    info = TensorInfo("F32", (6, 4, 1), 96, 0)
    assert np.array_equal(read_tensor("x", info.rows(2, 4)), array.reshape(6, 4, 1)[2:4])
    assert np.array_equal(read_tensor("x", info.squeezed()), array.reshape(6, 4))
    turned = TensorInfo("F32", (4, 6, 1), 96, 0, (1, 4, 1))
    assert np.array_equal(read_tensor("x", turned.rows(1, 3)), array.reshape(6, 4).T[1:3, :, None])
    assert np.array_equal(read_tensor("x", turned.squeezed()), array.reshape(6, 4).T)
    sparse = TensorInfo("F32", (3, 2), 24, 4, (8, 2))  # every second element, from the second on
    assert np.array_equal(read_tensor("x", sparse.rows(1, 3)), array.reshape(3, 8)[1:, 1:5:2])
    with pytest.raises(ValueError, match="not of size 1"):
        TensorInfo("F32", (6, 4), 96, 0).squeezed()


# The tokenizer.


def test_padding_is_openclips(model, folder, capsys):
    """A tokenizer that pads with the end token gives every prompt states that the UNet has never seen."""
    _, source = model
    words = shutil.copytree(source / "tokenizer", Path("words"))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = json.loads((words / name).read_text()) | {"pad_token": "<|endoftext|>"}
        (words / name).write_text(json.dumps(config))
    assert CLIPTokenizer.from_pretrained(words).pad_token_id != 0
    assert convert(folder, "--tokenizer", words) == 0
    assert "tokenizer: pads with '!', id 0, as the model was trained" in capsys.readouterr().err
    ours, theirs = (CLIPTokenizer.from_pretrained(f"{f}/tokenizer") for f in ("out", source))
    assert np.array_equal(ours("a cat"), theirs("a cat"))


def test_tokenizer_of_a_diffusers_pipeline_is_replaced(model):
    _, source = model
    words = shutil.copytree(source / "tokenizer", Path("words"))
    config = json.loads((words / "tokenizer_config.json").read_text()) | {"model_max_length": 20}
    (words / "tokenizer_config.json").write_text(json.dumps(config))
    assert convert(source, "--tokenizer", words) == 0
    assert CLIPTokenizer.from_pretrained("out/tokenizer").model_max_length == 20


def test_hub_id(model, folder):
    """A repository of original files in the hub's cache, of a revision that the tokenizer's has not."""
    _, source = model
    for name, content in (
        ("models--owner--original", folder),
        ("models--owner--words", source / "tokenizer"),
    ):
        shutil.copytree(content, f"cache/{name}/snapshots/{'a' * 40}")
        Path(f"cache/{name}/refs").mkdir()
        revision = "v1" if "original" in name else "main"
        Path(f"cache/{name}/refs/{revision}").write_text("a" * 40)
    plan = converter.plan_checkpoint(
        "owner/original",
        tokenizer="owner/words",
        revision="v1",
        cache_dir="cache",
        local_files_only=True,
    )
    assert [component.name for component in plan.components] == ["unet", "vae", "text_encoder"]


# Refusals leave nothing behind.


def pickle_of(tensors):
    return original.write_pickle(Path("x.pth"), tensors)


def without(folder, name):
    (folder / name).unlink()
    return folder


def beside(folder, name, tensors):
    original.write_pickle(folder / name, tensors)
    return folder


def truncated(path, size):
    os.truncate(path, size)
    return path


def changed(tensors, **entries):
    return pickle_of({**tensors, **{key.replace("__", "."): value for key, value in entries.items()}})


IMAGE_UNET = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
ONES = np.ones((3, 3), np.float32)
BAD = {
    "no tokenizer": (lambda f, t: f, (), "pass --tokenizer with a folder that has vocab.json"),
    "no such tokenizer": (lambda f, t: f, ("--tokenizer", "./nowhere"), "nowhere does not exist"),
    "empty tokenizer": (lambda f, t: f, ("--tokenizer", "modelscope"), "no vocab.json and no merges.txt"),
    "tokenizer of one network": (
        lambda f, t: f / "open_clip_pytorch_model.bin", ("--tokenizer", "TOKENIZER"), "is for pipelines",
    ),
    "no vae": (
        lambda f, t: without(f, "VQGAN_autoencoder.pth"), ("--tokenizer", "TOKENIZER"), "no file of the vae",
    ),
    "two unets": (
        lambda f, t: beside(f, "a.pt", t["unet"]), ("--tokenizer", "TOKENIZER"), "two files of the unet",
    ),
    "unknown": (lambda f, t: pickle_of({"w": ONES, "b": ONES}), (), "2 tensors (w, b). It is near to none"),
    "image unet": (
        lambda f, t: pickle_of(dict.fromkeys(IMAGE_UNET, ONES)),
        (),
        "Nearest is ModelScope's original UNet, for which it lacks input_blocks.0.1.proj_in.weight, "
        "middle_block.0.temopral_conv.conv1.0.weight",
    ),
    "motion module": (
        lambda f, t: pickle_of({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": ONES}),
        (),
        "holds none of the networks",
    ),
    "other prefix": (
        lambda f, t: pickle_of({f"net.{key}": value for key, value in t["unet"].items()}),
        (),
        "Nearest is ModelScope's original UNet, for which it lacks time_embed.0.weight",
    ),
    "half a text tower": (
        lambda f, t: pickle_of({k: v for k, v in t["text_encoder"].items() if "ln_final" not in k}),
        (),
        "Nearest is OpenCLIP's text tower, for which it lacks ln_final.weight",
    ),
    "two networks": (
        lambda f, t: pickle_of({**t["unet"], **t["vae"]}),
        (),
        "several networks at once: ModelScope's original UNet (middle_block",
    ),
    "two of one kind": (
        lambda f, t: pickle_of(within(t, "vae") | {f"vae.{k}": v for k, v in t["vae"].items()}),
        (),
        "several networks at once: an autoencoder of latent diffusion (first_stage_model.decoder",
    ),
    "three networks without a tokenizer": (
        lambda f, t: pickle_of(within(t, *CLASSES)), (), "x.pth is a pipeline in original files, which come",
    ),
    "no unet beside": (
        lambda f, t: pickle_of(within(t, "vae", "text_encoder")),
        ("--tokenizer", "TOKENIZER"),
        "x.pth holds the vae and the text_encoder, and no unet, which a pipeline needs; put the file of the "
        "unet beside it in a folder of their own, and give that folder",
    ),
    "no vae beside": (
        lambda f, t: pickle_of(within(t, "unet", "text_encoder")), (), "holds the unet and the text_encoder",
    ),
    "two whole files": (
        lambda f, t: beside(
            beside(without(f, "text2video_pytorch_model.pth"), "a.ckpt", within(t, *CLASSES)),
            "b.ckpt",
            within(t, "unet", "vae"),
        ),
        ("--tokenizer", "TOKENIZER"),
        "two files of the unet, a.ckpt and b.ckpt",
    ),
    "cut short": (
        lambda f, t: truncated(original.write_safetensors(Path("x"), t["vae"]), 9999), (), "cut short",
    ),
    "cut short pickle": (lambda f, t: truncated(pickle_of(t["vae"]), 9999), (), "damaged"),
    "cut short in a folder": (
        lambda f, t: truncated(f / "VQGAN_autoencoder.pth", 9999).parent, (), "VQGAN_autoencoder.pth",
    ),
    "empty": (lambda f, t: truncated(pickle_of(t["vae"]), 0), (), "is empty"),
    "missing tensor": (
        lambda f, t: pickle_of({k: v for k, v in t["unet"].items() if k != "output_blocks.4.2.norm.bias"}),
        (),
        "up_blocks.1.temp_attentions.1.norm.bias",
    ),
    "missing tensor of the config": (
        lambda f, t: pickle_of({k: v for k, v in t["unet"].items() if not k.startswith("out.2")}),
        (),
        "no tensor for the parameter 'conv_out.weight'",
    ),
    "other condition": (
        lambda f, t: changed(t["unet"], fps_embedding__0__weight=ONES), (), "fps_embedding.0.weight",
    ),
    "twice": (lambda f, t: changed(t["unet"], conv_in__weight=ONES), (), "both the parameter 'conv_in.wei"),
    "attention in a level": (
        lambda f, t: changed(t["vae"], encoder__down__0__attn__0__q__bias=ONES[0]),
        (),
        "encoder.down.0.attn.0.q.bias",
    ),
    "no thirds": (
        lambda f, t: changed(t["text_encoder"], transformer__resblocks__0__attn__in_proj_bias=ONES[0, :2]),
        (),
        "x.pth: 'transformer.resblocks.0.attn.in_proj_bias' has shape (2,)",
    ),
    "heads": (
        lambda f, t: changed(t["text_encoder"], token_embedding__weight=np.ones((9, 96), "f4")),
        (),
        "hidden_size=96 does not tell the number of attention heads",
    ),
    "shape": (
        lambda f, t: changed(t["vae"], quant_conv__weight=np.ones((8, 8, 3, 3), "f4")),
        (),
        "quant_conv.weight is (8, 8, 3, 3), must be (8, 8, 1, 1)",
    ),
    "variant": (lambda f, t: pickle_of(t["vae"]), ("--variant", "fp16"), "variant='fp16' chooses"),
    "revision": (lambda f, t: pickle_of(t["vae"]), ("--revision", "main"), "is a file"),
    "into its folder": (
        lambda f, t: f / "VQGAN_autoencoder.pth", ("--mlx-path", "modelscope", "--force"), "give another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(model, folder, tensors, name, capsys):
    make, arguments, message = BAD[name]
    source = make(folder, tensors)
    arguments = [model[1] if argument == "TOKENIZER" else argument for argument in arguments]
    before = sorted(os.listdir())
    assert convert(source, *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_tokenizer_of_another_text_encoder(model, folder):
    _, source = model
    words = shutil.copytree(source / "tokenizer", Path("words"))
    vocab = json.loads((words / "vocab.json").read_text())
    (words / "vocab.json").write_text(json.dumps(vocab | {"cat</w>": len(vocab)}))
    with pytest.raises(CheckpointError, match="has 191 tokens, the text encoder 190"):
        converter.plan_checkpoint(folder, tokenizer=words)
