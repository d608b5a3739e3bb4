"""Original files, written by torch, against the networks that they were written for."""

import importlib
import importlib.util
import json
import math
import sys
import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx_unet3d_convert as converter  # noqa: E402
import numpy as np  # noqa: E402
import original_files as original  # noqa: E402
import unet_sd  # noqa: E402
from mlx_unet3d import AutoencoderKL, CLIPTextModel, TextToVideoPipeline, UNet3DConditionModel  # noqa: E402
from mlx_unet3d.cli import main  # noqa: E402
from reference import randomize_constants, relative_error, to_mlx  # noqa: E402
from tiny import write_tokenizer  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-5
WORDS, WIDTH, HEADS = 190, 128, 2


def convert(source, target, *arguments):
    return main(["convert", "--hf-path", str(source), "--mlx-path", str(target), "--verify", *arguments])


# The UNet.


def make_unet(**settings) -> nn.Module:
    torch.manual_seed(0)
    made = unet_sd.UNetSD(context_dim=WIDTH, **settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape))
    return made


@pytest.mark.parametrize(
    "settings",
    [
        dict(dim=32, dim_mult=(1, 2, 1), num_res_blocks=2, attention_levels=2),
        dict(dim=32, dim_mult=(1, 2), num_res_blocks=1, attention_levels=1),
        dict(dim=32, dim_mult=(1, 2, 4, 4), num_res_blocks=2, attention_levels=3),
    ],
    ids=["three levels", "one layer", "ModelScope's"],
)
def test_unet(tmp_path, settings):
    theirs = make_unet(**settings)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", tmp_path / "out") == 0
    ours = UNet3DConditionModel.from_pretrained(tmp_path / "out")
    assert ours.config.attention_head_dim == 8
    sample, text = torch.randn(1, 4, 3, 16, 8), torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        expected = theirs(sample, torch.tensor([981]), text)
    assert relative_error(ours(to_mlx(sample), 981, to_mlx(text)).sample, expected) <= TOLERANCE


# The autoencoder.

VAE = dict(
    block_out_channels=(32, 64, 32),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
)


def make_vae() -> tuple[diffusers.AutoencoderKL, dict]:
    """diffusers' and its tensors by the names of latent diffusion."""
    torch.manual_seed(1)
    model = diffusers.AutoencoderKL(**VAE).eval()
    randomize_constants(model, 1)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    return model, {key: torch.tensor(value) for key, value in original.vae(arrays, 3).items()}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_vae_as_diffusers_reads_it(tmp_path, prefix):
    """diffusers' own reader of single files turns the names on its own account."""
    model, tensors = make_vae()
    tensors = {prefix + key: value for key, value in tensors.items()}
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "VQGAN_autoencoder.pth")
    torch.save(tensors, tmp_path / "flat.pt")
    model.save_config(tmp_path / "config")
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "flat.pt"), config=str(tmp_path / "config")
    )
    assert convert(tmp_path / "VQGAN_autoencoder.pth", tmp_path / "out") == 0
    ours = AutoencoderKL.from_pretrained(tmp_path / "out")
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        moments = theirs.eval().encode(images).latent_dist.mode()
        frames = theirs.decode(moments).sample
    assert relative_error(ours.encode(to_mlx(images)).mode(), moments) <= TOLERANCE
    assert relative_error(ours.decode(to_mlx(moments)), frames) <= TOLERANCE


# The text tower.


@pytest.fixture
def open_clip_transformer(monkeypatch):
    """OpenCLIP's module of transformers; the rest of its package wants torchvision and more."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "open_clip", package)
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = nn.Module
    for name in ("transformer", "utils", "pos_embed"):
        monkeypatch.delitem(sys.modules, f"open_clip.{name}", raising=False)
    yield importlib.import_module("open_clip.transformer")
    for name in ("transformer", "utils", "pos_embed"):
        sys.modules.pop(f"open_clip.{name}", None)


class Block(nn.Module):
    """A layer of OpenCLIP's: its names are those of torch's own attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """A text tower on torch's attention."""

    def __init__(self, layers, width=WIDTH, heads=HEADS, words=WORDS):
        super().__init__()
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.empty(()))


def penultimate(tower, ids, call):
    """The states that the UNets were trained on: of all layers but the last, after the final norm."""
    with torch.no_grad():
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        for block in tower.transformer.resblocks[:-1]:
            x = call(block, x, mask)
        return tower.ln_final(x)


def randomized(tower):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.ndim == 2:
                scale = 1 if "embedding" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0, scale)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return tower.eval()


def check_tower(tower, call, folder, **save):
    torch.save(tower.state_dict() | {"visual.conv1.weight": torch.ones(3)}, folder / "x.bin", **save)
    assert convert(folder / "x.bin", folder / "out") == 0
    ours = CLIPTextModel.from_pretrained(folder / "out")
    assert ours.config.num_hidden_layers == len(tower.transformer.resblocks) - 1
    ids = torch.randint(0, WORDS, (2, 77))
    expected = penultimate(tower, ids, call)
    assert relative_error(ours(ids.numpy()), expected) <= TOLERANCE


@pytest.mark.parametrize("zipped", [True, False])
def test_text_tower(tmp_path, zipped):
    tower = randomized(Tower(3))
    check_tower(tower, lambda block, x, mask: block(x, mask), tmp_path, _use_new_zipfile_serialization=zipped)


def test_text_tower_of_open_clip(tmp_path, open_clip_transformer):
    tower = open_clip_transformer.TextTransformer(
        vocab_size=WORDS, width=WIDTH, heads=HEADS, layers=4, output_dim=48
    )
    check_tower(randomized(tower), lambda block, x, mask: block(x, attn_mask=mask), tmp_path)


# All of it.


def write_empty(path, tensors):
    """A safetensors file of these names and shapes, float32, that takes no room on the disk."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def test_published_sizes(tmp_path):
    """From shapes alone come the configs that the hub has, and the published numbers of parameters."""
    source = tmp_path / "source"
    source.mkdir()
    with torch.device("meta"):
        unet = unet_sd.UNetSD(
            dim=320,
            dim_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_levels=3,
            context_dim=1024,
            head_dim=64,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        text = Tower(24, 1024, 16, 49408)
    write_empty(source / "a.safetensors", unet.state_dict())
    write_empty(source / "b.safetensors", original.vae(vae.state_dict(), 4))
    write_empty(source / "c.safetensors", text.state_dict())
    write_tokenizer(tmp_path / "words")
    plan = converter.plan_checkpoint(source, tokenizer=tmp_path / "words")
    found = {component.name: component for component in plan.components}
    counts = {
        name: sum(math.prod(tensor.shape) for tensor in component.tensors)
        for name, component in found.items()
    }
    assert counts == {"unet": 1_411_233_860, "vae": 83_653_863, "text_encoder": 340_387_840}
    defaults = UNet3DConditionModel.config_class(sample_size=32)
    assert UNet3DConditionModel.config_class.from_dict(found["unet"].config) == defaults
    config = found["vae"].config
    assert (config["block_out_channels"], config["sample_size"]) == ((128, 256, 512, 512), 512)
    assert (config["layers_per_block"], config["latent_channels"]) == (2, 4)
    config = found["text_encoder"].config
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (
        1024,
        23,
        16,
    )
    assert (config["intermediate_size"], config["vocab_size"], config["hidden_act"]) == (4096, 49408, "gelu")


def test_whole_folder_loads_in_diffusers(tmp_path):
    pytest.importorskip("transformers")
    source = tmp_path / "source"
    assert write_tokenizer(tmp_path / "words") == WORDS
    source.mkdir()
    unet = make_unet(dim=32, dim_mult=(1, 2), num_res_blocks=1, attention_levels=1)
    torch.save(unet.state_dict(), source / "text2video_pytorch_model.pth")
    torch.save(randomized(Tower(3)).state_dict(), source / "open_clip_pytorch_model.bin")
    _, vae = make_vae()
    vae = {f"first_stage_model.{key}": value for key, value in vae.items()}
    torch.save({"state_dict": vae, "global_step": 7}, source / "VQGAN_autoencoder.pth")
    arguments = ["--tokenizer", str(tmp_path / "words")]
    assert convert(source, tmp_path / "out", *arguments) == 0
    assert convert(source, tmp_path / "diffusers", "--to", "diffusers", *arguments) == 0
    ours = TextToVideoPipeline.from_pretrained(tmp_path / "out")
    theirs = diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path / "diffusers")
    theirs.set_progress_bar_config(disable=True)
    settings = dict(height=32, width=32, num_frames=2, num_inference_steps=2, guidance_scale=3.0)
    generator = torch.Generator().manual_seed(0)
    expected = theirs("a cat", generator=generator, output_type="latent", **settings).frames
    latents = ours("a cat", seed=0, output_type="latent", **settings).frames
    assert latents.dtype == mx.float32
    assert relative_error(np.array(latents), expected) <= 1e-4
