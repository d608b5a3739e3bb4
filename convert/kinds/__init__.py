"""The networks that can be converted, a file each, and all that the converter knows of them."""

from .autoencoder_kl import AUTOENCODER_KL
from .clip_text import CLIP_TEXT
from .kind import Family, Inputs, Kind
from .parts import Part
from .unet_3d_condition import UNET_3D

KINDS: tuple[Kind, ...] = (UNET_3D, AUTOENCODER_KL, CLIP_TEXT)

BY_NAME = {kind.cls.__name__: kind for kind in KINDS}
"""The kinds by the names of their classes in `config.json` and `model_index.json`."""

COMPONENTS = tuple(dict.fromkeys(kind.component for kind in KINDS))
"""The names of networks in a pipeline."""


def kind_of(cls: type) -> Kind:
    """The kind of a network's class."""
    return BY_NAME[cls.__name__]


__all__ = ["BY_NAME", "COMPONENTS", "KINDS", "Family", "Inputs", "Kind", "Part", "kind_of"]
