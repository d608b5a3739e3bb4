"""The names of ModelScope's original UNet, in files of weights and of adapters, and what each is here.

A naming tells of a key which parameters it holds: none where the network has no use for it, three where a
matrix is fused. Source: `UNetSD` of modelscope's `video_synthesis`.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from ..errors import CheckpointError
from .headers import TensorInfo


@dataclass(frozen=True)
class Part:
    """A parameter, and which part of the tensor it is.

    Attributes:
        name: the parameter.
        third: 0, 1 or 2 for that third of the rows; None for all of them.
        pointwise: a Conv1d of kernel size 1, (O, I, 1), of which the matrix (O, I) is wanted.
    """

    name: str
    third: int | None = None
    pointwise: bool = False

    def of(self, key: str, info: TensorInfo) -> tuple[str, TensorInfo]:
        """What to call the part, `key[0:4]` in Python's notation, and where it lies.

        Raises CheckpointError where the tensor has no such part.
        """
        if self.third is not None:
            if not info.shape or info.shape[0] % 3:
                raise CheckpointError(
                    f"{key!r} has shape {info.shape}; query, key and value must be equal thirds of its rows"
                )
            height = info.shape[0] // 3
            start, stop = self.third * height, (self.third + 1) * height
            return f"{key}[{start}:{stop}]", info.rows(start, stop)
        if self.pointwise and len(info.shape) == 3 and info.shape[2] == 1:
            return f"{key}[:,:,0]", info.squeezed()
        return key, info


Naming = Callable[[str], list[Part]]
"""The parts of a key; an unknown key is the parameter of its own name, which no network will have."""


_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d{1,4})\.(?:(\d{1,4})\.)?(.+)")


def unet_naming(keys: Collection[str], layers: int | None = None) -> Naming:
    """Of `text2video_pytorch_model.pth`; `layers` of a block, or None to tell them from the keys.

    Its blocks are numbered through: the layers of a resolution, then the halving between two of them.
    """
    inputs = [match for match in map(_UNET_BLOCK.fullmatch, keys) if match and match[1] == "input_blocks"]
    halvings = [int(match[2]) for match in inputs if match[4].startswith("op.")]
    if layers is None:
        most = max((int(match[2]) for match in inputs), default=0)
        layers = max(min(halvings) - 1, 0) if halvings else most

    def naming(key: str) -> list[Part]:
        module, _, kind = key.rpartition(".")
        if module in _UNET:
            return [Part(f"{_UNET[module]}.{kind}")]
        match = _UNET_BLOCK.fullmatch(key)
        if match is None:
            return [Part(key)]
        return [_unet_part(key, match[1], int(match[2]), match[3], match[4], layers)]

    return naming


def _unet_part(key: str, path: str, number: int, place: str | None, rest: str, layers: int) -> Part:
    if path == "input_blocks":
        if number == 0:
            return _unet_transformer("transformer_in", rest, True) if place == "1" else Part(key)
        level, layer = divmod(number - 1, layers + 1)
        block = f"down_blocks.{level}"
        if rest.startswith("op."):
            return Part(f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}")
    elif path == "middle_block":
        # Resnet, spatial and temporal transformer, resnet: the number says what elsewhere the place says.
        if place is not None:
            rest = f"{place}.{rest}"
        block, layer = "mid_block", int(number == 3)
        place = "0" if number == 3 else str(number)
    else:
        level, layer = divmod(number, layers + 1)
        block = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return Part(f"{block}.upsamplers.0.{rest}")
    if place == "0":
        return _unet_resnet(key, block, layer, rest)
    if place in ("1", "2"):
        module = "attentions" if place == "1" else "temp_attentions"
        return _unet_transformer(f"{block}.{module}.{layer}", rest, place == "2")
    return Part(key)


def _unet_resnet(key: str, block: str, layer: int, rest: str) -> Part:
    if rest.startswith("temopral_conv."):  # sic
        return Part(f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}")
    module, _, kind = rest.rpartition(".")
    return Part(f"{block}.resnets.{layer}.{_UNET_RESNET[module]}.{kind}" if module in _UNET_RESNET else key)


def _unet_transformer(path: str, rest: str, temporal: bool) -> Part:
    """Inside, the names are the same on both sides."""
    return Part(f"{path}.{rest}", pointwise=temporal and rest in ("proj_in.weight", "proj_out.weight"))


def unet_layer_names(paths: Collection[str], layers: int) -> dict[str, str]:
    """The original names of the layers at `paths`, in blocks of `layers` -> these paths."""
    paths, naming, found = frozenset(paths), unet_naming((), layers), {}
    for name in (*_UNET, *_block_names(paths, layers)):
        (part,) = naming(f"{name}.weight")
        path = part.name.removesuffix(".weight")
        if path in paths:
            found[name] = path
    return found


def _block_names(paths: Collection[str], layers: int) -> Iterator[str]:
    """All names that layers in blocks may have had, and many more."""
    inside = {match[1] for match in map(_INSIDE.fullmatch, paths) if match}
    over_frames = {f"temopral_conv.{match[1]}" for match in map(_OVER_FRAMES.fullmatch, paths) if match}
    rests = (*_UNET_RESNET, "op", "conv", *sorted(inside | over_frames))
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
