"""Known files that cannot be converted, identified by their tensors, and their use."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Other:
    """A kind of file without a network for this converter.

    Attributes:
        title: its name in messages.
        sign: a pattern in the name of one of its tensors, and of no network's.
        cure: how to use it.
        beside: a part of another tensor's name; empty for none.
    """

    title: str
    sign: re.Pattern[str]
    cure: str
    beside: str = ""


_LORA = (
    "it changes a network and is none; convert the network, and load the LoRA into it with generate --lora"
)
OTHERS = (
    Other(
        "HotShot-XL's motion modules",
        re.compile(r"\.temporal_attentions\.\d+\."),
        "diffusers has no place for them; give a motion module of AnimateDiff",
    ),
    Other(
        "a LoRA of motion modules",
        re.compile(r"motion_modules\..*(_lora\.|\.lora_|\.lora\.)"),
        "it changes motion modules and is none; give the modules that it was trained for",
    ),
    Other(
        "a LoRA",
        re.compile(r"_lora\.(down|up)\.|\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.lora_linear_layer\."),
        _LORA,
    ),
    Other("a LyCORIS adapter", re.compile(r"\.(hada_w1_a|lokr_w1|lokr_w1_a)$"), _LORA),
    Other(
        "a SparseCtrl encoder",
        re.compile(r"(^|\.)controlnet_cond_embedding\."),
        "it steers a video by pictures and makes none; give a motion module",
        beside="motion_modules.",
    ),
    Other(
        "a ControlNet",
        re.compile(r"(^|\.)(control_model|input_hint_block|zero_convs|controlnet_cond_embedding)\."),
        "it steers a UNet and is none; give the UNet",
    ),
    Other(
        "an IP-Adapter",
        re.compile(r"(^|\.)(ip_adapter|image_proj)\.|\.to_[kv]_ip\."),
        "it steers a UNet by pictures and is none; give the UNet",
    ),
    Other(
        "a textual inversion",
        re.compile(r"^(emb_params|string_to_param.*)$"),
        "load it with pipe.load_textual_inversion",
    ),
)


def other(keys: Collection[str]) -> Other | None:
    """Return the kind of a file with these tensors; None if it is not in `OTHERS`."""
    for kind in OTHERS:
        if any(map(kind.sign.search, keys)) and any(kind.beside in key for key in keys):
            return kind
    return None
