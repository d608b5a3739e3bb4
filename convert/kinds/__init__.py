"""The networks that can be converted, one module each."""

from mlx_unet3d.checkpoints.parts import Part

from .autoencoder_kl import AUTOENCODER_KL
from .autoencoder_kl_temporal import AUTOENCODER_KL_TEMPORAL
from .clip_text import CLIP_TEXT, CLIP_TEXT_WITH_PROJECTION
from .clip_vision import CLIP_VISION
from .kind import Family, Inputs, Kind
from .motion_adapter import MOTION_ADAPTER
from .pipeline import Pipeline
from .unet_3d_condition import UNET_3D
from .unet_i2vgen_xl import UNET_I2VGEN_XL
from .unet_motion import UNET_2D, UNET_MOTION
from .unet_spatio_temporal import UNET_SPATIO_TEMPORAL

KINDS: tuple[Kind, ...] = (
    UNET_3D,
    AUTOENCODER_KL,
    CLIP_TEXT,
    CLIP_TEXT_WITH_PROJECTION,
    CLIP_VISION,
    UNET_MOTION,
    UNET_2D,
    MOTION_ADAPTER,
    UNET_SPATIO_TEMPORAL,
    AUTOENCODER_KL_TEMPORAL,
    UNET_I2VGEN_XL,
)

BY_NAME = {name: kind for kind in KINDS for name in kind.names}
"""The kinds by the names of their classes in `config.json` and `model_index.json`."""

COMPONENTS = tuple(dict.fromkeys(kind.component for kind in KINDS))
"""The names of networks in a pipeline."""


def kind_of(cls: type) -> Kind:
    """Return the kind of a network's class."""
    return BY_NAME[cls.__name__]


__all__ = ["BY_NAME", "COMPONENTS", "KINDS", "Family", "Inputs", "Kind", "Part", "Pipeline", "kind_of"]
