"""The keys that the configs of all video UNets share, and what must fit together in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.config import ModelConfig, key
from ..layers.blocks import DownBlock, UpBlock

# Far above any network, and few enough to be built before the weights are held against it.
_MOST_LEVELS, _MOST_LAYERS = 8, 100


@dataclass
class VideoUNetConfig(ModelConfig):
    """The keys that the configs of all video UNets begin with."""

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


def block_types(down: Sequence[type[DownBlock]], up: Sequence[type[UpBlock]]) -> tuple[Any, Any]:
    """The fields `down_block_types` and `up_block_types` of a network with these blocks, without and with
    attention to the context; four levels by default."""
    (plain_down, cross_down), (plain_up, cross_up) = ([b.__name__ for b in kinds] for kinds in (down, up))
    return (
        key(
            (cross_down,) * 3 + (plain_down,),
            f'"{plain_down}" or "{cross_down}" a level, finest first',
            choices=(plain_down, cross_down),
        ),
        key(
            (plain_up,) + (cross_up,) * 3,
            f'"{plain_up}" or "{cross_up}" a level, coarsest first',
            choices=(plain_up, cross_up),
        ),
    )


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """A config value that is one for all levels, or one each, as one each."""
    return value if isinstance(value, tuple) else (value,) * levels


def check_levels(config: Any, *lists: str) -> None:
    """ValueError where the blocks and widths of a config, or its further `lists`, differ in number, where
    there are more levels or layers than any network has, or where other numbers do not fit."""
    levels = len(config.down_block_types)
    if levels > _MOST_LEVELS:
        raise ValueError(f"down_block_types has {levels} levels; {_MOST_LEVELS} are the most")
    if levels == 0:
        raise ValueError("down_block_types=() must have a level at least")
    if len(config.up_block_types) != levels:
        raise ValueError(
            "Must provide the same number of `down_block_types` as `up_block_types`: got "
            f"{config.down_block_types} and {config.up_block_types}"
        )
    for name in ("block_out_channels", *lists):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != levels:
            raise ValueError(
                f"Must provide the same number of `{name}` as `down_block_types`: got "
                f"{value} and {config.down_block_types}"
            )
    for name, value in config.items():
        if "layers_per" in name and max(_numbers(value), default=0) > _MOST_LAYERS:
            raise ValueError(f"{name}={value} is above {_MOST_LAYERS}")
    attending = [n for n in (*config.down_block_types, *config.up_block_types) if "CrossAttn" in n]
    if attending and config.cross_attention_dim is None:
        raise ValueError(f"cross_attention_dim must be specified for {attending[0]}")
    if config.get("mid_block_scale_factor", 1) == 0:
        raise ValueError("mid_block_scale_factor=0 would divide by 0; use 1 for no scale")
    if config.get("downsample_padding", 1) not in (0, 1):
        raise ValueError(
            f"downsample_padding={config.downsample_padding!r} does not fit the skips; use 0 or 1"
        )
    narrowest = min(config.block_out_channels)
    if config.get("attention_head_dim", 1) > narrowest:
        raise ValueError(
            f"attention_head_dim={config.attention_head_dim} exceeds the {narrowest} channels of a block, "
            "which would leave it no head; use a divisor of the entries of block_out_channels"
        )


def _numbers(value: Any) -> Iterator[int]:
    """The integers of a config value, however nested."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int):
        yield value
