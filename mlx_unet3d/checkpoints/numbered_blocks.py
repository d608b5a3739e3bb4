"""UNets of latent diffusion, whose blocks are numbered through, as those of Stable Video Diffusion and
ModelScope are.

The layers of a resolution come one after the other, then the halving or doubling between two of them.
Source: `UNetModel` of latent diffusion, Rombach et al., arXiv:2112.10752.
"""

import re
from collections.abc import Callable, Collection

from .parts import KeyMap, Part

WITHIN = "model.diffusion_model."
"""The prefix of the keys of a UNet in a whole checkpoint of latent diffusion."""

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d{1,4})\.(?:(\d{1,4})\.)?(.+)")

Layer = Callable[[str, int, str, str], Part | None]
"""Find the part of a parameter that a tensor is, by the block "down_blocks.0", the number of the layer in
it, its place there ("0" for the resnet, "1" and so on behind it) and the rest of its name; None for none."""


def unet_key_map(
    keys: Collection[str], layer: Layer, layers: int | None = None, middle: int | None = None
) -> KeyMap:
    """The key map of a UNet whose layers are as `layer` says.

    The keys tell the `layers` of a block, and the number of the last module of the middle block, `middle`,
    unless they are given.
    """
    blocks = [match for match in map(_BLOCK.fullmatch, keys) if match]
    inputs = [match for match in blocks if match[1] == "input_blocks"]
    halvings = [int(match[2]) for match in inputs if match[4].startswith("op.")]
    if layers is None:
        most = max((int(match[2]) for match in inputs), default=0)
        layers = max(min(halvings) - 1, 0) if halvings else most
    if middle is None:
        middle = max((int(match[2]) for match in blocks if match[1] == "middle_block"), default=0)

    def key_map(key: str) -> list[Part]:
        module, _, kind = key.rpartition(".")
        if module in ENDS:
            return [Part(f"{ENDS[module]}.{kind}")]
        match = _BLOCK.fullmatch(key)
        made = None if match is None else _part(*match.groups(), layers, middle, layer)
        return [made or Part(key)]

    return key_map


def resnet(path: str, rest: str) -> Part | None:
    """A tensor of a resnet."""
    module, _, kind = rest.rpartition(".")
    return Part(f"{path}.{RESNET[module]}.{kind}") if module in RESNET else None


def _part(
    path: str, digits: str, place: str | None, rest: str, layers: int, middle: int, make: Layer
) -> Part | None:
    number = int(digits)
    if path == "input_blocks":
        if number == 0:
            return make("", 0, place or "", rest)
        level, layer = divmod(number - 1, layers + 1)
        block = f"down_blocks.{level}"
        if rest.startswith("op."):
            return Part(f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}")
    elif path == "middle_block":
        # A resnet, transformers, a resnet: the number says what elsewhere the place says.
        if place is not None:
            rest = f"{place}.{rest}"
        block, layer = "mid_block", int(number == middle)
        place = "0" if number == middle else digits
    else:
        level, layer = divmod(number, layers + 1)
        block = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return Part(f"{block}.upsamplers.0.{rest}")
    return make(block, layer, place or "", rest)
