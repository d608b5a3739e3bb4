"""Files written by diffusers load here, and files written here load in diffusers, with equal values."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import ModelConfig, read_header
from mlx_unet3d.models.pretrained import PretrainedModel

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

from diffusers import ConfigMixin, ModelMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402


class TorchToy(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels=(8, 16), kernel_size=3, act_fn="silu"):
        super().__init__()
        a, b = channels
        self.norm = torch.nn.GroupNorm(4, a)
        self.conv = torch.nn.Conv2d(a, b, kernel_size, padding=kernel_size // 2)
        self.conv_shortcut = torch.nn.Conv2d(a, b, 1)
        self.conv1 = torch.nn.Sequential(
            torch.nn.GroupNorm(4, b),
            torch.nn.SiLU(),
            torch.nn.Conv3d(b, b, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.norm_out = torch.nn.LayerNorm(b)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(b, a), torch.nn.Dropout(0.1)])

    def forward(self, x):
        """(B, C, F, H, W) -> (B, F, H, W, C)."""
        b, c, f, h, w = x.shape
        x = x.permute(0, 2, 1, 3, 4).reshape(b * f, c, h, w)
        x = self.conv(self.norm(x)) + self.conv_shortcut(x)
        x = x.reshape(b, f, -1, h, w).permute(0, 2, 1, 3, 4)
        x = self.conv1(x).permute(0, 2, 3, 4, 1)
        return self.to_out[0](self.norm_out(x))


@dataclass
class ToyConfig(ModelConfig):
    channels: tuple[int, ...] = (8, 16)
    kernel_size: int = 3
    act_fn: str = "silu"


class Pointwise(nn.Linear):
    diffusers_layout = "conv2d_1x1"


class Temporal(nn.Module):
    diffusers_layout = "conv3d_temporal"

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.random.normal((channels, 3, 1, channels))
        self.bias = mx.zeros((channels,))

    def __call__(self, x):
        b, f, h, w, c = x.shape
        y = mx.conv2d(x.reshape(b, f, h * w, c), self.weight, padding=(1, 0)) + self.bias
        return y.reshape(b, f, h, w, -1)


class Toy(PretrainedModel):
    config_class = ToyConfig
    class_names = ("TorchToy",)

    def __init__(self, channels=(8, 16), kernel_size=3, act_fn="silu"):
        super().__init__()
        self.config = ToyConfig(channels, kernel_size, act_fn)
        a, b = channels
        self.norm = nn.GroupNorm(4, a, pytorch_compatible=True)
        self.conv = nn.Conv2d(a, b, kernel_size, padding=kernel_size // 2)
        self.conv_shortcut = Pointwise(a, b)
        self.conv1 = [nn.GroupNorm(4, b, pytorch_compatible=True), nn.SiLU(), Temporal(b)]
        self.norm_out = nn.LayerNorm(b)
        self.to_out = [nn.Linear(b, a), nn.Dropout(0.1)]

    def __call__(self, x):
        b, c, f, h, w = x.shape
        x = x.transpose(0, 2, 3, 4, 1).reshape(b * f, h, w, c)
        x = (self.conv(self.norm(x)) + self.conv_shortcut(x)).reshape(b, f, h, w, -1)
        for layer in self.conv1:
            x = layer(x)
        return self.to_out[0](self.norm_out(x))


@pytest.fixture
def theirs():
    torch.manual_seed(3)
    model = TorchToy(channels=(8, 24), kernel_size=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs(ours, theirs):
    x = np.random.default_rng(5).standard_normal((2, 8, 4, 5, 6)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    return np.array(ours(mx.array(x))), expected


def assert_equal_outputs(ours, theirs):
    found, expected = outputs(ours, theirs)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("size", ["10GB", "5KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_files_load_here(theirs, tmp_path, size, variant):
    theirs.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "5KB")
    ours = Toy.from_pretrained(tmp_path, variant=variant)
    assert ours.config.channels == (8, 24)
    assert ours.num_parameters() == theirs.num_parameters()
    assert_equal_outputs(ours, theirs)


@pytest.mark.parametrize("size", ["10GB", "5KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_our_files_load_in_diffusers(theirs, tmp_path, size, variant):
    ours = Toy(channels=(8, 24), kernel_size=5).eval()
    files = ours.save_pretrained(tmp_path, layout="diffusers", max_shard_size=size, variant=variant)
    assert (len(files) > 1) == (size == "5KB")
    again, info = TorchToy.from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not any(info.values()), info
    assert tuple(again.config.channels) == (8, 24)
    assert_equal_outputs(ours, again.eval())


def test_there_and_back_is_exact(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    mlx_layout = Toy.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "mlx")
    assert read_header(mlx_layout[0]).metadata == {"format": "mlx"}
    Toy.from_pretrained(tmp_path / "mlx").save_pretrained(tmp_path / "back", layout="diffusers")
    again = TorchToy.from_pretrained(tmp_path / "back")
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("theirs_dtype", "ours_dtype"),
    [(torch.float16, mx.float16), (torch.bfloat16, mx.bfloat16)],
    ids=["fp16", "bf16"],
)
def test_half_precision_is_kept_bit_for_bit(theirs, tmp_path, theirs_dtype, ours_dtype):
    theirs = theirs.to(theirs_dtype)
    theirs.save_pretrained(tmp_path)
    ours = Toy.from_pretrained(tmp_path)
    assert {array.dtype for _, array in tree_flatten(ours.parameters())} == {ours_dtype}
    bits = theirs.to_out[0].weight.detach().view(torch.int16).numpy()
    assert np.array_equal(np.array(ours.to_out[0].weight.view(mx.int16)), bits)
    ours.save_pretrained(tmp_path / "ours", layout="diffusers")
    again = TorchToy.from_pretrained(tmp_path / "ours", torch_dtype=theirs_dtype)
    assert torch.equal(again.conv.weight, theirs.conv.weight)


def test_plain_safetensors_file_without_config_names(theirs, tmp_path):
    """What scripts write with safetensors.torch, without metadata or class name."""
    from safetensors.torch import save_file

    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"channels": [8, 24], "kernel_size": 5}')
    assert_equal_outputs(Toy.from_pretrained(tmp_path), theirs)
