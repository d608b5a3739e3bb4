"""The keys that the configs of all video UNets share, and the checks across several keys."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mlx.utils import tree_flatten

from ..checkpoints.config import ModelConfig, key

# Far above any network, and few enough to be built before the weights are compared with them.
_MOST_LEVELS, _MOST_LAYERS = 8, 100

PerLevel = int | tuple[int, ...]
PerLayer = int | tuple[PerLevel, ...]


def level_key(default: Any, doc: str, form: str = "one number, or one a level") -> Any:
    """Return a field of positive integers: one for all levels, or one a level."""
    made = key(default, f"{doc}; {form}", least=1)
    return field(default=default, metadata={**made.metadata, "per_level": True})


def layer_key(default: Any, doc: str) -> Any:
    """Return a field of positive integers: one for all layers, one a level, or one a level and layer."""
    return level_key(default, doc, "one number, one a level, or one a level and layer")


def block_types(kind: str) -> tuple[Any, Any]:
    """Return the fields `down_block_types` and `up_block_types` of a network whose blocks are of a `kind`
    ("3D", "Motion" or "SpatioTemporal"), with and without attention to the context; four levels by default.
    """

    def one_way(way: str, order: str) -> Any:
        plain, attending = f"{way}Block{kind}", f"CrossAttn{way}Block{kind}"
        default = (attending, attending, attending, plain)
        return key(
            default if way == "Down" else default[::-1],
            f'"{plain}" or "{attending}" a level, {order} first',
            choices=(plain, attending),
        )

    return one_way("Down", "finest"), one_way("Up", "coarsest")


@dataclass
class VideoUNetConfig(ModelConfig):
    """The keys that the configs of all video UNets begin with. Raises ValueError where keys contradict each
    other, or for more levels or layers than any network has."""

    sample_size: int | tuple[int, int] | None = key(
        None, "height and width of the latents it was trained on; only pipelines look at it"
    )
    in_channels: int = key(4, "of the sample", least=1)
    out_channels: int = key(4, "of the prediction", least=1)
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = key(
        (320, 640, 1280, 1280), "channels a level; multiples of the groups of the norms", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.down_block_types)
        if levels > _MOST_LEVELS:
            raise ValueError(f"down_block_types has {levels} levels; use at most {_MOST_LEVELS}")
        if levels == 0:
            raise ValueError("down_block_types=() must have at least one level")
        check_lengths(self, ["down_block_types"], "up_block_types")
        check_lengths(self, ["block_out_channels", *keys_per_level(self)], "down_block_types")
        for name, value in self.items():
            layers = [number for _, number in tree_flatten(value)] if "layers_per" in name else []
            if any(number is not None and number > _MOST_LAYERS for number in layers):
                raise ValueError(f"{name}={value} is above {_MOST_LAYERS}")
        attending = [n for n in (*self.down_block_types, *self.up_block_types) if "CrossAttn" in n]
        if attending and self.cross_attention_dim is None:
            raise ValueError(f"cross_attention_dim must be specified for {attending[0]}")
        if self.get("mid_block_scale_factor", 1) == 0:
            raise ValueError("mid_block_scale_factor=0 would divide by 0; use 1 for no scale")
        if self.get("downsample_padding", 1) not in (0, 1):
            raise ValueError(
                f"downsample_padding={self.downsample_padding!r} does not suit the skips; use 0 or 1"
            )
        narrowest = min(self.block_out_channels)
        if self.get("attention_head_dim", 1) > narrowest:
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim} exceeds the {narrowest} channels of a block, "
                "which would leave it no head; use a divisor of the entries of block_out_channels"
            )


def keys_per_level(config: ModelConfig) -> list[str]:
    """Return the names of the keys made by `level_key` and `layer_key`."""
    return [f.name for f in fields(config) if f.metadata.get("per_level")]  # type: ignore[arg-type]


def check_lengths(config: ModelConfig, names: Sequence[str], reference: str) -> None:
    """Raise ValueError unless each tuple under `names` is as long as the one under `reference`."""
    for name in names:
        value = config[name]
        if isinstance(value, tuple) and len(value) != len(config[reference]):
            raise ValueError(
                f"Must provide the same number of `{name}` as `{reference}`: got {value} and "
                f"{config[reference]}"
            )
