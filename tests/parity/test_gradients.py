"""Gradients through the networks against torch's, live, in fp32 on the same weights."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import AutoencoderKL, CLIPTextModel, CLIPVisionModelWithProjection, cpu  # noqa: E402
from diffusers import AutoencoderKL as ReferenceVAE  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_unet3d.checkpoints.layouts import parameter_layouts, to_diffusers  # noqa: E402
from mlx_unet3d.layers import convolution  # noqa: E402
from reference import Inputs, randomize_constants, to_mlx, unet_pair  # noqa: E402
from video_networks import KINDS, randomize, temporal_vae_pair  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def all_routes(monkeypatch):
    """The forms for the CPU take over at any size, in several pieces."""
    monkeypatch.setattr(cpu, "PIECE", 2**11)
    monkeypatch.setattr(cpu, "_SMALL", 0)
    monkeypatch.setattr(convolution, "_winograd_pays", lambda x, weight: True)
    monkeypatch.setattr(convolution, "_temporal_winograd_pays", lambda x, weight: True)


def compare(theirs, ours, their_output, our_output, inputs):
    """All gradients of the sum of an output times fixed numbers: of the inputs, and of every weight.

    Each is held to its own largest value; one that is no more than rounding, such as that of a bias before a
    norm, to three thousandths of the largest of all, so within three roundings of it. Mix factors are single
    numbers, sums over a whole state that may cancel: they are held to the largest of them, as one vector.
    """
    inputs = [x.requires_grad_() for x in inputs]
    y = their_output(*inputs)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * factors).sum().backward()
    expected = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    expected |= {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}

    def loss(arrays, weights):
        ours.update(weights)
        return (our_output(*arrays) * to_mlx(factors)).sum()

    weights = ours.parameters()
    of_inputs, of_weights = mx.grad(loss, (0, 1))([to_mlx(x) for x in inputs], weights)
    ours.update(weights)
    layouts = parameter_layouts(ours)
    found = {f"input {i}": g for i, g in enumerate(of_inputs)}
    for name, g in tree_flatten(of_weights):
        found[name] = to_diffusers(layouts.get(name, "identity"), g)
    names = {name: name if name in found else f"text_model.{name}" for name in expected}
    least = 3e-3 * max(float(g.abs().max()) for g in expected.values())
    mixing = max((float(g.abs()) for name, g in expected.items() if name.endswith("mix_factor")), default=0.0)
    for name, g in expected.items():
        largest = mixing if name.endswith("mix_factor") else float(g.abs().max())
        difference = np.abs(np.array(found.pop(names[name])) - g.numpy()).max()
        assert difference <= TOLERANCE * max(largest, least), name
    assert all(float(mx.abs(g).max()) == 0 for g in found.values()), "torch has none of these"


OPTIONS = {
    "plain": lambda unet: None,
    "frames and pixels": lambda unet: (unet.enable_frame_chunking(2), unet.enable_pixel_chunking(48)),
    "compiled": lambda unet: unet.compile(),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_unet(name, tmp_path):
    theirs, ours = unet_pair(tmp_path)
    inputs = Inputs(theirs, batch=2)
    OPTIONS[name](ours)
    t = inputs.timestep
    compare(
        theirs,
        ours,
        lambda sample, text: theirs(sample, t, text).sample,
        lambda sample, text: ours(sample, t, text).sample,
        [inputs.sample, inputs.text],
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_video_unet(kind, options, tmp_path):
    theirs, ours = KINDS[kind].pair(tmp_path)
    (sample, t, *rest), _ = KINDS[kind].inputs(theirs.config, batch=2)
    OPTIONS[options](ours)
    compare(
        theirs,
        ours,
        lambda sample, *rest: theirs(sample, t, *rest).sample,
        lambda sample, *rest: ours(sample, t, *rest).sample,
        [sample, *rest],
    )


def vae_pair(folder):
    torch.manual_seed(0)
    theirs = ReferenceVAE(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    ).eval()
    randomize_constants(theirs)
    theirs.save_pretrained(folder)
    return theirs, AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_vae(chunk_size, tmp_path):
    theirs, ours = vae_pair(tmp_path)
    generator = torch.Generator().manual_seed(1)

    def moments(x):
        found = ours.encode(x, chunk_size=chunk_size)
        return mx.concatenate([found.mean, found.logvar], axis=1)

    compare(
        theirs,
        ours,
        lambda x: theirs.encode(x).latent_dist.parameters,
        moments,
        [torch.randn(2, 3, 16, 24, generator=generator)],
    )
    theirs.zero_grad()
    compare(
        theirs,
        ours,
        lambda z: theirs.decode(z).sample,
        lambda z: ours.decode(z, chunk_size=chunk_size),
        [torch.randn(2, 4, 8, 12, generator=generator)],
    )


@pytest.mark.parametrize("frames", [1, 4])
def test_temporal_vae(frames, tmp_path):
    theirs, ours = temporal_vae_pair(tmp_path)
    compare(
        theirs,
        ours,
        lambda z: theirs.decode(z, num_frames=frames).sample,
        lambda z: ours.decode(z, frames),
        [torch.randn(4, 4, 6, 5, generator=torch.Generator().manual_seed(1))],
    )


def test_vision_encoder(tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    compare(
        theirs,
        ours,
        lambda x: theirs(x).image_embeds,
        lambda x: ours(x).image_embeds,
        [torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))],
    )


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_text_encoder(act, tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act=act,
        eos_token_id=59,
        bos_token_id=58,
        pad_token_id=0,
    )
    theirs = transformers.CLIPTextModel(config).eval()
    randomize_constants(theirs)
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextModel.from_pretrained(tmp_path, subfolder=None)
    ids = np.random.default_rng(0).integers(1, 58, (2, 12))
    compare(
        theirs,
        ours,
        lambda: theirs(torch.tensor(ids)).last_hidden_state,
        lambda: ours(ids),
        [],
    )
