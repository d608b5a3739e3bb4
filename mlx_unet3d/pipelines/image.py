"""Images to states: what an image encoder makes of them, and the pixels that a VAE encodes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..image_processor import Pictures, rgb_images
from ..media import read_image

Images = Pictures | str | Path
"""Images as `Pictures`, or the path of one."""


class ImageStates(NamedTuple):
    """An encoded image on its way to the denoising loop.

    Attributes:
        image_embeds: of CLIP, (B, 1, D).
        pixels: for the VAE, (B, 3, H, W) in [-1, 1].
    """

    image_embeds: mx.array
    pixels: mx.array

    def repeated(self, copies: int) -> ImageStates:
        """Return the states with each row so many times, one after the other."""
        return ImageStates(*(mx.repeat(array, copies, axis=0) for array in self))


def as_images(images: Images | list[str | Path]) -> Pictures:
    """Return images, of which files are read; TypeError or ValueError for anything else.

    Pictures of files are turned as their EXIF data say.
    """
    if images is None:
        raise ValueError("image is None; give a picture: a path, a Pillow image or an array")
    if isinstance(images, list | tuple):
        images = [read_image(image) if isinstance(image, str | Path) else image for image in images]
    elif isinstance(images, str | Path):
        images = read_image(images)
    return rgb_images(images)
