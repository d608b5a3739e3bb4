"""A small model with every layout, for the tests of checkpoints."""

import json
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import (
    ModelConfig,
    parameter_layouts,
    to_diffusers,
    write_safetensors,
)
from mlx_unet3d.models.pretrained import PretrainedModel

STEM = "diffusion_pytorch_model"


class Pointwise(nn.Linear):
    diffusers_layout = "conv2d_1x1"


class Temporal(nn.Module):
    diffusers_layout = "conv3d_temporal"

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.weight = mx.random.normal((channels_out, 3, 1, channels_in))
        self.bias = mx.zeros((channels_out,))


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    ignored_keys: ClassVar[frozenset[str]] = frozenset({"old_switch"})

    channels: tuple[int, ...] = (4, 6)
    eps: float = 1e-5
    sample_size: int | None = None


class Toy(PretrainedModel):
    config_class = ToyConfig
    class_names = ("Toy", "OldToy")

    def __init__(self, channels=(4, 6), eps=1e-5, sample_size=None):
        super().__init__()
        self.config = ToyConfig(channels, eps, sample_size)
        a, b = channels
        self.conv1 = [nn.GroupNorm(2, a, eps), nn.SiLU(), nn.Conv2d(a, b, (3, 5))]
        self.shortcut = Pointwise(a, b)
        self.time = Temporal(b, a)
        self.to_q = nn.Linear(b, a)
        self.embed = nn.Embedding(7, b)
        self.dropout = nn.Dropout(0.5)

    @classmethod
    def rename_key(cls, key, keys):
        if key.endswith("position_ids"):
            return None
        head, _, tail = key.rpartition(".")
        return f"to_q.{tail}" if head == "query" else key


COUNT = 4 * 2 + (6 * 4 * 15 + 6) + (4 * 6 + 6) + (3 * 4 * 6 + 4) + (6 * 4 + 4) + 7 * 6


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def same(a, b):
    a, b = parameters(a), parameters(b)
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


def make_toy():
    model = Toy()
    mx.eval(model.parameters())
    return model


def diffusers_tensors(model):
    layouts = parameter_layouts(model)
    return {
        name: to_diffusers(layouts.get(name, "identity"), array) for name, array in parameters(model).items()
    }


def write(folder, tensors, config=None, metadata=None, name=f"{STEM}.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"_class_name": "Toy"}))
    write_safetensors(folder / name, tensors, {"format": "pt"} if metadata is None else metadata)
    return folder
