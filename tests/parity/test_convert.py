"""The converter against diffusers: what it makes of every kind of file is what loading the original gives."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import transformers  # noqa: E402
from mlx_unet3d import AutoencoderKL, CLIPTextModel, TextToVideoPipeline, UNet3DConditionModel  # noqa: E402
from mlx_unet3d.cli import main  # noqa: E402
from reference import TINY, randomize_constants  # noqa: E402
from tiny import SCHEDULER, write_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

NETWORKS = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of small networks, saved by diffusers in safetensors."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_tokenizer(folder / "words")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    unet = diffusers.UNet3DConditionModel(**TINY)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TINY["cross_attention_dim"],
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=len(tokenizer) - 1,
        )
    )
    for seed, model in enumerate((unet, vae, text)):
        randomize_constants(model.eval(), seed)
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    diffusers.TextToVideoSDPipeline(vae, text, tokenizer, unet, scheduler).save_pretrained(folder)
    shutil.rmtree(folder / "words")
    return folder


def state(folder, name):
    stem = "model" if name == "text_encoder" else STEMS[name]
    import safetensors.torch

    return safetensors.torch.load_file(folder / name / f"{stem}.safetensors")


def with_pickles(folder, target, change=lambda tensors: tensors, variant="", **options):
    """The same pipeline with each network as one torch file."""
    shutil.copytree(folder, target)
    for name in NETWORKS:
        tensors = state(folder, name)
        for file in (target / name).glob("*.safetensors"):
            file.unlink()
        torch.save(change(tensors), target / name / f"{STEMS[name]}{variant}.bin", **options)
    return target


def shard(target):
    """Two files and an index in place of the UNet's one."""
    single = target / "unet" / "diffusion_pytorch_model.bin"
    tensors = torch.load(single, weights_only=True)
    single.unlink()
    keys = list(tensors)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        torch.save({key: tensors[key] for key in keys if weight_map[key] == name}, target / "unet" / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "unet" / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))


def half(tensors):
    return {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}


SOURCES = {
    "safetensors": lambda f, t: shutil.copytree(f, t),
    "zip": lambda f, t: with_pickles(f, t),
    "legacy": lambda f, t: with_pickles(f, t, _use_new_zipfile_serialization=False),
    "half": lambda f, t: with_pickles(f, t, half),
    "variant": lambda f, t: with_pickles(f, t, half, ".fp16"),
    "double": lambda f, t: with_pickles(f, t, lambda tensors: {k: v.double() for k, v in tensors.items()}),
    "wrapped": lambda f, t: with_pickles(f, t, lambda tensors: {"state_dict": tensors, "epoch": 3}),
    "parameters": lambda f, t: with_pickles(
        f, t, lambda tensors: {k: torch.nn.Parameter(v) for k, v in tensors.items()}
    ),
    "position ids": lambda f, t: with_pickles(
        f,
        t,
        lambda tensors: (
            tensors
            | (
                {"embeddings.position_ids": torch.arange(77)[None]}
                if "final_layer_norm.bias" in tensors
                else {}
            )
        ),
    ),
    "prefix": lambda f, t: with_pickles(
        f,
        t,
        lambda tensors: {
            ("text_model." + k if "final_layer_norm.bias" in tensors else k): v for k, v in tensors.items()
        },
    ),
    "shards": lambda f, t: shard(with_pickles(f, t)),
    "channels last": lambda f, t: with_pickles(
        f,
        t,
        lambda tensors: {
            k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in tensors.items()
        },
    ),
}


def convert(source, target, *arguments):
    return main(["convert", "--hf-path", str(source), "--mlx-path", str(target), "--verify", *arguments])


@pytest.mark.parametrize("name", SOURCES)
def test_converted_is_loading_the_original(folder, tmp_path, name):
    SOURCES[name](folder, tmp_path / "source")
    arguments = ["--variant", "fp16"] if name == "variant" else []
    assert convert(tmp_path / "source", tmp_path / "out", *arguments) == 0
    dtype = mx.float16 if name in ("half", "variant") else mx.float32
    ours = TextToVideoPipeline.from_pretrained(tmp_path / "out", dtype=dtype, vae_dtype=None)
    assert UNet3DConditionModel.from_pretrained(tmp_path / "out" / "unet").dtype == dtype
    assert ours.unet.dtype == ours.vae.dtype == ours.text_encoder.dtype == dtype
    theirs = TextToVideoPipeline.from_pretrained(folder, dtype=dtype, vae_dtype=dtype)
    settings = dict(num_frames=2, height=16, width=16, num_inference_steps=2)
    assert np.array_equal(ours("a cat", **settings).frames, theirs("a cat", **settings).frames)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_to_diffusers_and_back_is_exact(folder, tmp_path, zipped, dtype):
    """Pickle -> MLX -> diffusers: every tensor bit for bit, and diffusers loads it."""
    cast = lambda tensors: {k: v.to(dtype) for k, v in tensors.items()}  # noqa: E731
    source = with_pickles(folder, tmp_path / "source", cast, _use_new_zipfile_serialization=zipped)
    assert convert(source, tmp_path / "mlx") == 0
    assert convert(tmp_path / "mlx", tmp_path / "back", "--to", "diffusers") == 0
    for name in NETWORKS:
        expected, found = cast(state(folder, name)), state(tmp_path / "back", name)
        prefix = "" if set(found) == set(expected) else "text_model."
        assert {prefix + key for key in expected} == set(found)
        assert all(torch.equal(found[prefix + key], value) for key, value in expected.items())
    loaded = diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path / "back", torch_dtype=dtype)
    assert loaded.unet.dtype == dtype
    for key, value in cast(state(folder, "unet")).items():
        assert torch.equal(loaded.unet.state_dict()[key], value)


@pytest.mark.parametrize(
    ("arguments", "least"), [((), 100), (("--dtype", "float16"), 40), (("-q", "--q-bits", "8"), 100)]
)
def test_verified_against_diffusers_itself(folder, tmp_path, monkeypatch, capsys, arguments, least):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--hf-path", str(folder), "--mlx-path", "out", "--verify", *arguments]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "from diffusers'" in line]
    ratios = {
        line.split(":")[0]: float(line.split(" dB above its difference")[0].split()[-1]) for line in lines
    }
    assert ratios.keys() == set(NETWORKS)
    assert min(ratios.values()) > least
    assert len([line for line in lines if "what quantization changed" in line]) == ("-q" in arguments)


def test_shards_of_a_variant_verified_against_diffusers(folder, tmp_path, capsys):
    unet = diffusers.UNet3DConditionModel.from_pretrained(folder / "unet")
    unet.save_pretrained(tmp_path / "source", variant="fp16", max_shard_size="500KB")
    assert len(list((tmp_path / "source").glob("*.fp16-*-of-*.safetensors"))) > 1
    assert convert(tmp_path / "source", tmp_path / "out", "--variant", "fp16") == 0
    assert "dB above its difference from diffusers'" in capsys.readouterr().err


def test_a_network_that_diffusers_computes_otherwise(folder, tmp_path, monkeypatch):
    """A mistake of ours in a forward, which both sides of the conversion share."""
    from mlx_unet3d.errors import CheckpointError
    from mlx_unet3d_convert import convert

    monkeypatch.setattr(UNet3DConditionModel, "_embed_time", lambda self, *_: mx.zeros((1, 4 * 32)))
    with pytest.raises(CheckpointError, match="its difference from diffusers', below"):
        convert(folder / "unet", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
