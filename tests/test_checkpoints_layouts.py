"""Layouts of parameters and configs of models."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_unet3d.checkpoints import ModelConfig, file_shapes, parameter_layouts, to_diffusers, to_mlx
from mlx_unet3d.errors import CheckpointError

from .checkpoints_toy import Toy, ToyConfig, diffusers_tensors, make_toy, parameters


@pytest.fixture
def toy():
    return make_toy()


def test_layouts_of_a_model(toy):
    assert parameter_layouts(toy) == {
        "conv1.2.weight": "conv2d",
        "shortcut.weight": "conv2d_1x1",
        "time.weight": "conv3d_temporal",
        "to_q.weight": "linear",
    }
    shapes = {name: array.shape for name, array in diffusers_tensors(toy).items()}
    assert shapes["conv1.2.weight"] == (6, 4, 3, 5)
    assert shapes["shortcut.weight"] == (6, 4, 1, 1)
    assert shapes["time.weight"] == (4, 6, 3, 1, 1)
    assert shapes["to_q.weight"] == (4, 6)


@pytest.mark.parametrize(
    ("layout", "shape", "index_file", "index_mlx"),
    [
        ("conv2d", (2, 3, 4, 5), (1, 4, 2, 3), (1, 2, 3, 4)),
        ("conv2d_1x1", (2, 5), (1, 4, 0, 0), (1, 4)),
        ("conv3d_temporal", (2, 3, 1, 5), (1, 4, 2, 0, 0), (1, 2, 0, 4)),
        ("linear", (2, 5), (1, 4), (1, 4)),
        ("identity", (2, 5, 3), (1, 4, 2), (1, 4, 2)),
    ],
)
def test_layout_moves_each_element_where_it_belongs(layout, shape, index_file, index_mlx):
    size = 1
    for n in shape:
        size *= n
    array = mx.arange(size).reshape(shape)
    turned = to_diffusers(layout, array)
    assert turned.shape == file_shapes(layout, shape)[0]
    assert turned[index_file].item() == array[index_mlx].item()
    assert mx.array_equal(to_mlx(layout, turned), array)


def test_a_linear_takes_a_pointwise_kernel_and_nothing_else():
    assert file_shapes("linear", (1, 5)) == [(1, 5), (1, 5, 1, 1)]
    assert to_mlx("linear", mx.zeros((1, 5, 1, 1))).shape == (1, 5)
    with pytest.raises(ValueError, match="reshape"):
        to_mlx("linear", mx.zeros((4, 5, 3, 1)))


def test_convolutions_without_a_rule_are_refused():
    class Bad(nn.Module):
        diffusers_layout = "conv4d"

    model = nn.Module()
    model.inner = nn.Conv1d(2, 2, 3)
    with pytest.raises(TypeError, match=r"inner: Conv1d has no rule"):
        parameter_layouts(model)
    model.inner = Bad()
    with pytest.raises(TypeError, match="inner: diffusers_layout='conv4d' is none of identity"):
        parameter_layouts(model)


# Configs


def test_config_from_dict():
    config = ToyConfig.from_dict({"_class_name": "Toy", "channels": [8, 2], "old_switch": True})
    assert config == ToyConfig((8, 2))
    assert config["channels"] == config.channels == (8, 2)
    assert config.get("sample_size", 3) is None
    assert config.get("none", 3) == 3
    assert list(config.keys()) == ["channels", "eps", "sample_size"]
    assert "eps" in config
    assert "none" not in config
    assert ToyConfig.from_dict(config.to_dict()) == config == ToyConfig(**config)
    with pytest.raises(KeyError, match="has no 'none'; it has channels"):
        config["none"]


def test_unknown_config_keys_make_one_warning():
    with pytest.warns(UserWarning, match="leaves them out: new_switch, other") as caught:
        ToyConfig.from_dict({"other": 1, "new_switch": 2, "old_switch": 1, "_hidden": 1})
    assert len(caught) == 1


def test_config_key_without_default():
    @dataclass
    class Needy(ModelConfig):
        width: int

    with pytest.raises(CheckpointError, match="needs the config keys width"):
        Needy.from_dict({})


def test_from_config():
    model = Toy.from_config({"_class_name": "OldToy", "channels": [4, 8]}, eps=1e-3)
    assert model.config == ToyConfig((4, 8), 1e-3)
    assert Toy.from_config(model.config, channels=[4, 4]).config.channels == (4, 4)
    with pytest.raises(CheckpointError, match="is for the class UNet2D, not Toy or OldToy"):
        Toy.from_config({"_class_name": "UNet2D"})
    with pytest.raises(TypeError, match="no config key width"):
        Toy.from_config({}, width=3)


def test_config_is_no_parameter(toy):
    assert not any("config" in name for name in parameters(toy))
