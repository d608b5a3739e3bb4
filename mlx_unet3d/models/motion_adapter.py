"""Motion adapters of AnimateDiff: motion modules for Stable Diffusion UNets, and the combination of both.

Source: diffusers' `MotionAdapter` and `UNetMotionModel.from_unet2d`; Guo et al., arXiv:2307.04725.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.config import ModelConfig, blame, key
from ..checkpoints.hub import Hub, takes_hub
from ..checkpoints.shapes import Shapes
from ..diffusers_names import answers_diffusers
from ..errors import CheckpointError
from ..layers.blocks import Level, entry, motion_module
from ..layers.convolution import Conv2d
from .loading import Checkpoint, Source, find_checkpoint
from .pretrained import PretrainedModel
from .video_unet_config import PerLayer, PerLevel, check_lengths, keys_per_level, layer_key, level_key

STEM = "diffusion_pytorch_model"
_MOTION = ".motion_modules."

# Parts of names in the files of AnimateDiff's authors, and here.
_ORIGINAL = {
    "attention_blocks.0": "attn1",
    "attention_blocks.1": "attn2",
    "norms.0": "norm1",
    "norms.1": "norm2",
    "ff_norm": "norm3",
}
_MODULE = re.compile(r"(\.motion_modules\.\d+)")

# Keys of a `UNetMotionModel` that come from its motion adapter, and their names there.
_ADAPTER_KEYS = {
    "layers_per_block": "motion_layers_per_block",
    "temporal_transformer_layers_per_block": "motion_transformer_layers_per_block",
    "temporal_transformer_layers_per_mid_block": "motion_transformer_layers_per_mid_block",
    "motion_num_attention_heads": "motion_num_attention_heads",
    "motion_max_seq_length": "motion_max_seq_length",
    "use_motion_mid_block": "use_motion_mid_block",
}


@dataclass
class MotionAdapterConfig(ModelConfig):
    """The keys of `config.json`; defaults are those of diffusers."""

    block_out_channels: tuple[int, ...] = key((320, 640, 1280, 1280), "channels a level", least=1)
    motion_layers_per_block: PerLevel = level_key(2, "modules of a down block; up blocks have one more")
    motion_transformer_layers_per_block: PerLayer = layer_key(1, "transformer blocks of a module")
    motion_mid_block_layers_per_block: int = key(1, "motion modules of the mid block", least=1)
    motion_transformer_layers_per_mid_block: PerLevel = key(
        1, "transformer blocks of the mid block's modules, one number or one a module", least=1
    )
    motion_num_attention_heads: PerLevel = level_key(8, "heads")
    motion_norm_num_groups: int = key(32, "groups of the group norms of a lone adapter", least=1)
    motion_max_seq_length: int = key(32, "positions, the most frames", least=1)
    use_motion_mid_block: bool = key(True, "motion modules in the mid block")
    conv_in_channels: int | None = key(None, "input channels of the `conv_in` of PIA; None without", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lengths(self, keys_per_level(self), "block_out_channels")
        mid, modules = self.motion_transformer_layers_per_mid_block, self.motion_mid_block_layers_per_block
        if isinstance(mid, tuple) and len(mid) != modules:
            raise ValueError(
                f"motion_transformer_layers_per_mid_block={mid} must have a number for each of the {modules} "
                "modules of the mid block (motion_mid_block_layers_per_block)"
            )


class MotionAdapter(PretrainedModel):
    """The motion modules of AnimateDiff without a UNet, for `UNetMotionModel.from_unet2d`.

    diffusers' class of that name. Raises ValueError where keys of its config contradict each other.
    """

    config_class = MotionAdapterConfig
    class_names = ("MotionAdapter",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config, count = self.config, len(self.config.block_out_channels)
        layers, depths = config.motion_layers_per_block, config.motion_transformer_layers_per_block

        def block(i: int, modules: int, depth: PerLevel) -> nn.Module:
            level = Level(
                config.block_out_channels[i],
                motion_heads=entry(config.motion_num_attention_heads, i),
                motion_layers=depth,
                motion_positions=config.motion_max_seq_length,
                norm_num_groups=config.motion_norm_num_groups,
            )
            made = nn.Module()
            made.motion_modules = [motion_module(level, j) for j in range(modules)]
            return made

        if config.conv_in_channels is not None:
            self.conv_in = Conv2d(config.conv_in_channels, config.block_out_channels[0], 3, padding=1)
        self.down_blocks = [block(i, entry(layers, i), entry(depths, i)) for i in range(count)]
        self.up_blocks = [
            block(i, entry(layers, i) + 1, _one_more(entry(depths, i))) for i in reversed(range(count))
        ]
        if config.use_motion_mid_block:
            depth = config.motion_transformer_layers_per_mid_block
            self.mid_block = block(count - 1, config.motion_mid_block_layers_per_block, depth)

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Return the parameter name of a file's tensor `key`, which AnimateDiff's authors name otherwise."""
        return motion_name(key)

    @classmethod
    @answers_diffusers
    def from_pretrained(cls, path_or_id: str | Path, **options: Any) -> "MotionAdapter":
        """See `PretrainedModel.from_pretrained`. Also read a lone safetensors file, from diffusers or from
        AnimateDiff's authors, and infer its config from its shapes."""
        if not Path(path_or_id).expanduser().is_file():
            return super().from_pretrained(path_or_id, **options)
        checkpoint = find_checkpoint(path_or_id, STEM, files=True)
        with blame(checkpoint.where):
            model = cls.from_config(adapter_config(checkpoint))
        return model.load_checkpoints([Source(checkpoint)], options.get("dtype"))


def motion_name(name: str) -> str | None:
    """Return the name here of a tensor of a motion module, from diffusers' or the authors' names; None for
    the authors' tables of positions, which are computed by their formula."""
    if "pos_encoder" in name:
        return None
    name = name.replace(".temporal_transformer.", ".")
    for theirs, ours in _ORIGINAL.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def original_motion_name(name: str) -> str:
    """Return the name of a layer of a motion module in the files of AnimateDiff's authors."""
    name = _MODULE.sub(r"\1.temporal_transformer", f"{name}.")
    for theirs, ours in _ORIGINAL.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.removesuffix(".")


def motion_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters of the motion modules of a network or adapter, by name."""
    return {name: array for name, array in tree_flatten(model.parameters()) if _MOTION in name}


def _one_more(depths: PerLevel) -> PerLevel:
    """Return the numbers of an up block, which has one layer more: repeat the last."""
    return depths if isinstance(depths, int) else (*depths, depths[-1])


def adapter_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config of a motion adapter: from its folder, or inferred from the shapes of a lone file.

    Raises CheckpointError for a file of something else.
    """
    if checkpoint.config:
        MotionAdapter.check_class_name(checkpoint.config, str(checkpoint.where / "config.json"))
        return {k: v for k, v in checkpoint.config.items() if k != "quantization"}
    return infer_adapter(_shapes(checkpoint, motion_name))


def _shapes(checkpoint: Checkpoint, rename: Callable[[str], str | None]) -> Shapes:
    tensors = [item for header in checkpoint.headers.values() for item in header.tensors.items()]
    shapes = {rename(name) or name: info.shape for name, info in tensors}
    return Shapes(str(checkpoint.where), shapes, checkpoint.layout)


def infer_adapter(shapes: Shapes) -> dict[str, Any]:
    """Infer the config of a motion adapter from its shapes; a table of positions may have any name.

    Raises CheckpointError for a file of something else.
    """
    levels = shapes.count("down_blocks.{}.motion_modules.0.norm.weight")
    if not levels:
        raise CheckpointError(
            f"{shapes.where} has no down_blocks.0.motion_modules.0.norm.weight, so it is not a motion "
            "adapter; give the file or folder of one"
        )
    tables = [shape for name, shape in shapes.shapes.items() if name.endswith(".pe") and len(shape) == 3]
    block = "down_blocks.0.motion_modules.0.transformer_blocks.{}.norm1.weight"
    return dict(
        block_out_channels=tuple(
            shapes.outputs(f"down_blocks.{i}.motion_modules.0.norm.weight") for i in range(levels)
        ),
        motion_layers_per_block=shapes.count("down_blocks.0.motion_modules.{}.norm.weight"),
        motion_transformer_layers_per_block=shapes.count(block),
        use_motion_mid_block="mid_block.motion_modules.0.norm.weight" in shapes,
        motion_max_seq_length=tables[0][1] if tables else 32,
        conv_in_channels=shapes.inputs("conv_in.weight") if "conv_in.weight" in shapes else None,
    )


Model = TypeVar("Model", bound=PretrainedModel)


@takes_hub
def from_unet2d(
    cls: type[Model],
    unet: str | Path,
    motion_adapter: str | Path | MotionAdapter | None = None,
    *,
    subfolder: str | None = None,
    dtype: mx.Dtype | None = None,
    variant: str | None = None,
    hub: Hub,
) -> Model:
    """Read the weights of a 2-D UNet and of a motion adapter straight into one `UNetMotionModel`.

    Args:
        unet: folder or hub id of a diffusers `UNet2DConditionModel` (Stable Diffusion 1, 2, XL and their
            kin), or a lone safetensors file with its names, whose config is inferred from its shapes.
        motion_adapter: folder, hub id or lone safetensors file of an adapter, or a `MotionAdapter`; None for
            new modules, which change nothing until they are trained.
        dtype: float32, float16 or bfloat16 for all parameters; None takes the UNet's.
        variant: weight files of the UNet such as "fp16"; the adapter's are always the plain ones.
        subfolder: of the UNet.
        revision, local_files_only, token, cache_dir, hub: see `Hub`; the revision is that of the UNet.

    Copies the `add_embedding` of SDXL, which diffusers leaves random.

    Raises ValueError where adapter and UNet do not match; FileNotFoundError, PermissionError,
    ConnectionError, CheckpointError as `from_pretrained`.
    """
    spatial = find_checkpoint(unet, STEM, variant=variant, files=True, subfolder=subfolder, hub=hub)
    config = dict(spatial.config) or infer_unet2d(_shapes(spatial, str))
    name = config.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise CheckpointError(
            f"{spatial.where} is of the class {name}, not UNet2DConditionModel; give the folder 'unet' of a "
            "Stable Diffusion model"
        )
    if "quantization" in config:
        raise CheckpointError(f"{spatial.where} is quantized; give the checkpoint that it was made from")
    motion: Checkpoint | None = None
    adapter: Mapping[str, Any] | None = None
    if isinstance(motion_adapter, MotionAdapter):
        adapter = motion_adapter.config
    elif motion_adapter is not None:
        motion = find_checkpoint(motion_adapter, STEM, files=True, hub=replace(hub, revision=None))
        with blame(motion.where):
            adapter = MotionAdapterConfig.from_dict(adapter_config(motion))
    with blame(spatial.where):
        model = cls(**motion_config(cls, config, adapter))

    expected = model.expected_tensors()
    of_motion = {name: tensor for name, tensor in expected.items() if _MOTION in name}
    of_unet = {name: tensor for name, tensor in expected.items() if _MOTION not in name}
    own: dict[str, mx.array] = {}
    sources = [Source(spatial, of_unet)]
    if adapter is not None and adapter["conv_in_channels"] is not None:  # PIA widens conv_in
        kernel = of_unet["conv_in.weight"]
        narrow = (*kernel.shape[:-1], config.get("in_channels", 4))
        of_unet["conv_in.weight"] = replace(kernel, shape=narrow)
        of_motion["conv_in.weight"] = kernel
    if motion is not None:
        sources.append(Source(motion, of_motion, _without_bias_of_conv_in))
    else:
        given = dict(tree_flatten((model if motion_adapter is None else motion_adapter).parameters()))
        own = {name: given[name] for name in of_motion if name in given}
    return model.load_checkpoints(sources, dtype, own)


def _without_bias_of_conv_in(name: str, keys: Collection[str]) -> str | None:
    """Leave out the adapter's bias: the UNet's is kept, as in diffusers."""
    return None if name == "conv_in.bias" else motion_name(name)


def motion_config(
    cls: type[PretrainedModel], config: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the config of the network from those of its parts.

    Raises ValueError where the adapter has other levels or layers than the UNet.
    """
    known = {field.name for field in fields(cls.config_class)}
    made = {name: value for name, value in config.items() if name in known and value is not None}
    for way in ("down", "up"):
        types = config.get(f"{way}_block_types")
        if types is not None:
            attends = ["CrossAttn" if "CrossAttn" in name else "" for name in types]
            made[f"{way}_block_types"] = tuple(f"{a}{way.capitalize()}BlockMotion" for a in attends)
    if not config.get("num_attention_heads"):
        made["num_attention_heads"] = config.get("attention_head_dim", 8)
    if adapter is not None:
        levels = len(made.get("down_block_types", cls.config_class.down_block_types))
        widths = adapter["block_out_channels"]
        of_unet, of_adapter = (
            value if isinstance(value, tuple) else (value,) * levels
            for value in (_as_tuple(config.get("layers_per_block", 2)), adapter["motion_layers_per_block"])
        )
        if len(widths) != levels or of_unet != of_adapter:
            raise ValueError(
                f"the motion adapter has {of_adapter} layers in {len(widths)} levels, the UNet {of_unet} in "
                f"{levels}; take an adapter for this base model (Stable Diffusion 1.5, SDXL)"
            )
        made |= {name: adapter[theirs] for name, theirs in _ADAPTER_KEYS.items()}
        if adapter["conv_in_channels"]:
            made["in_channels"] = adapter["conv_in_channels"]
    return {name: _as_tuple(value) for name, value in made.items()}


def adapter_of(config: Any) -> dict[str, Any]:
    """Return the config of the motion adapter within a `UNetMotionModel`.

    Raises ValueError where no adapter can hold the modules: other numbers of transformer blocks on the way
    up.
    """
    for name in ("reverse_temporal_transformer_layers_per_block", "reverse_motion_num_attention_heads"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)} has no place in a motion adapter")
    shared = {theirs: config[name] for name, theirs in _ADAPTER_KEYS.items() if config[name] is not None}
    return shared | dict(
        block_out_channels=config.block_out_channels,
        motion_mid_block_layers_per_block=config.mid_block_layers,
        motion_norm_num_groups=config.norm_num_groups,
    )


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def infer_unet2d(shapes: Shapes) -> dict[str, Any]:
    """Infer the config of a 2-D UNet from its shapes, under diffusers' names.

    Heads have 64 channels where text has 1,024 or more (Stable Diffusion 2, XL); else there are 8.
    Raises CheckpointError for other shapes.
    """
    levels = shapes.count("down_blocks.{}.resnets.0.conv1.weight")
    if not levels or "conv_in.weight" not in shapes:
        raise CheckpointError(
            f"{shapes.where} has no tensors of a UNet under diffusers' names; convert a file with other "
            "names first: mlx-unet3d convert --hf-path FILE --motion-adapter FILE --mlx-path FOLDER"
        )
    widths = [shapes.outputs(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)]
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(levels)]
    deepest = "mid_block.attentions.0.transformer_blocks.{}.norm1.weight"
    text = shapes.inputs(deepest.format(0).replace("norm1", "attn2.to_k"))
    depths = [
        max(shapes.count(f"down_blocks.{i}.attentions.0.transformer_blocks.{{}}.norm1.weight"), 1)
        for i in range(levels)
    ]
    config: dict[str, Any] = dict(
        in_channels=shapes.inputs("conv_in.weight"),
        out_channels=shapes.outputs("conv_out.weight"),
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=widths,
        layers_per_block=shapes.count("down_blocks.0.resnets.{}.conv1.weight"),
        cross_attention_dim=text,
        attention_head_dim=[width // 64 for width in widths] if text >= 1024 else 8,
        use_linear_projection=len(shapes.shapes["mid_block.attentions.0.proj_in.weight"]) == 2,
        transformer_layers_per_block=depths,
        transformer_layers_per_mid_block=shapes.count(deepest),
    )
    if "add_embedding.linear_1.weight" in shapes:
        config |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=shapes.inputs("add_embedding.linear_1.weight"),
        )
    return config
