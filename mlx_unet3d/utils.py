"""The place where diffusers' users look for `export_to_video` and `export_to_gif`."""

from typing import Any

from .diffusers_names import instead
from .media import export_to_gif, export_to_video

__all__ = ["export_to_gif", "export_to_video"]


def __getattr__(name: str) -> Any:
    message = f"mlx_unet3d.utils has no {name}{instead(name)}"
    # `from ... import` makes another message of an AttributeError.
    raise (ImportError if instead(name) else AttributeError)(message)
