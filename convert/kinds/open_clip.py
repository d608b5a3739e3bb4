"""Layers of OpenCLIP's transformers, which its text and image towers have alike.

Source of the original names: open_clip's `Transformer`.
"""

import re

from mlx_unet3d.checkpoints.parts import Part

_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
RESBLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.(.+)")
"""A tensor of a layer: its number, and the rest of the name."""


def layer_parts(key: str, layers: str) -> list[Part]:
    """The parts of a tensor of a layer, under the path `layers`; none for other tensors."""
    match = RESBLOCK.fullmatch(key)
    if match is None:
        return []
    path, rest = f"{layers}.{match[1]}", match[2]
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        return [Part(f"{path}.self_attn.{name}_proj.{kind}", third) for third, name in enumerate("qkv")]
    module, _, kind = rest.rpartition(".")
    return [Part(f"{path}.{_LAYER[module]}.{kind}")] if module in _LAYER else []
