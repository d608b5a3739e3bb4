"""The names of ModelScope's original UNet, in files of weights and of adapters, and what each is here.

Source: `UNetSD` of modelscope's `video_synthesis`.
"""

import re
from collections.abc import Collection, Iterator

from . import numbered_blocks
from .numbered_blocks import ENDS, RESNET, resnet
from .parts import KeyMap, Part


def unet_key_map(keys: Collection[str], layers: int | None = None) -> KeyMap:
    """Of `text2video_pytorch_model.pth`; `layers` of a block, or None to tell them from the keys."""
    return numbered_blocks.unet_key_map(keys, _layer, layers, middle=3)


def _layer(block: str, layer: int, place: str, rest: str) -> Part | None:
    """A resnet with a temporal convolution, a spatial transformer, a temporal one."""
    if not block:  # beside `conv_in`
        return _transformer("transformer_in", rest, True) if place == "1" else None
    if place == "0":
        if rest.startswith("temopral_conv."):  # sic
            return Part(f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}")
        return resnet(f"{block}.resnets.{layer}", rest)
    if place in ("1", "2"):
        module = "attentions" if place == "1" else "temp_attentions"
        return _transformer(f"{block}.{module}.{layer}", rest, place == "2")
    return None


def _transformer(path: str, rest: str, temporal: bool) -> Part:
    """Inside, the names are the same on both sides."""
    return Part(f"{path}.{rest}", pointwise=temporal and rest in ("proj_in.weight", "proj_out.weight"))


def unet_layer_names(paths: Collection[str], layers: int) -> dict[str, str]:
    """The original names of the layers at `paths`, in blocks of `layers` -> these paths."""
    paths, key_map, found = frozenset(paths), unet_key_map((), layers), {}
    for name in (*ENDS, *_block_names(paths, layers)):
        (part,) = key_map(f"{name}.weight")
        path = part.name.removesuffix(".weight")
        if path in paths:
            found[name] = path
    return found


def _block_names(paths: Collection[str], layers: int) -> Iterator[str]:
    """All names that layers in blocks may have had, and many more."""
    inside = {match[1] for match in map(_INSIDE.fullmatch, paths) if match}
    over_frames = {f"temopral_conv.{match[1]}" for match in map(_OVER_FRAMES.fullmatch, paths) if match}
    rests = (*RESNET, "op", "conv", *sorted(inside | over_frames))
    levels = max((int(match[1]) for match in map(_LEVEL.match, paths) if match), default=0) + 1
    for number in range(levels * (layers + 2) + 1):
        for rest in rests:
            for place in range(4):
                yield f"input_blocks.{number}.{place}.{rest}"
                yield f"output_blocks.{number}.{place}.{rest}"
            yield f"input_blocks.{number}.{rest}"
            if number < 4:
                yield f"middle_block.{number}.{rest}"
                yield from (f"middle_block.{number}.{place}.{rest}" for place in range(3))


_INSIDE = re.compile(r"(?:.*attentions\.\d+|transformer_in)\.(.+)")
_OVER_FRAMES = re.compile(r".*temp_convs\.\d+\.(.+)")
_LEVEL = re.compile(r"(?:down|up)_blocks\.(\d+)\.")
