"""Images to the inputs of networks: CLIP's image processor, and the resizes of image-to-video pipelines, on
NumPy and Pillow.

Each pipeline of diffusers resizes in its own way, and networks see the difference:

| for                 | way                                           | here                             |
|---------------------|-----------------------------------------------|----------------------------------|
| CLIP of IP-Adapter  | shortest edge bicubic, centre crop            | `CLIPImageProcessor`             |
| CLIP of SVD         | Gaussian blur, bicubic, squeezed to a square  | `CLIPImageProcessor.antialiased` |
| CLIP of I2VGen-XL   | box filter, centre crop to a square, bilinear | `CLIPImageProcessor.box_cropped` |
| VAE of SVD, frames  | Lanczos                                       | `vae_pixels`                     |
| VAE of I2VGen-XL    | box filter, centre crop                       | `vae_pixels_cropped`             |

Source: transformers' `CLIPImageProcessor`; diffusers' `VaeImageProcessor`, `StableVideoDiffusionPipeline`
and `I2VGenXLPipeline`. Letters: N images, H W pixels, C = 3 channels, red green blue.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .atomic import write_text
from .checkpoints import Hub, read_component_config, takes_hub
from .checkpoints.config import ModelConfig, blame, key
from .media import to_uint8

CONFIG_NAME = "preprocessor_config.json"

Picture = Image.Image | NDArray[Any] | mx.array
"""An image: Pillow's, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or floats in [0, 1]."""

Pictures = Picture | Sequence[Picture]
"""One image, a list of images, or an array (N, H, W, C)."""


def rgb_images(images: Pictures, *, exif_transpose: bool = False) -> list[Image.Image]:
    """Convert images to RGB with 8 bits a colour, and transparency to white.

    Args:
        images: one image or several.
        exif_transpose: first rotate and mirror Pillow's images as their EXIF data says.

    Returns Pillow images of mode "RGB". Raises TypeError for objects that are no images, ValueError for
    shapes and values out of range, and for Pillow's images of 16 or 32 bits a pixel.
    """
    batch = isinstance(images, (np.ndarray, mx.array)) and images.ndim == 4
    pictures = list(images) if batch or isinstance(images, (list, tuple)) else [images]
    if not pictures:
        raise ValueError("images is empty; give at least one image")
    return [_rgb_image(picture, exif_transpose) for picture in pictures]


def _rgb_image(picture: Picture, exif_transpose: bool) -> Image.Image:
    if isinstance(picture, (np.ndarray, mx.array)):
        picture = Image.fromarray(_as_uint8(picture))
    if not isinstance(picture, Image.Image):
        raise TypeError(
            f"an image is a {type(picture).__name__}; give a Pillow image, a NumPy array or an mx.array"
        )
    if picture.mode[0] in "IF":
        raise ValueError(
            f"an image has mode {picture.mode!r}, whose values Pillow would clip to 255; scale it to 8 bits "
            "a colour first"
        )
    if 0 in picture.size:
        raise ValueError(f"an image has size {picture.size}; it must have a pixel at least")
    if exif_transpose:
        picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _as_uint8(array: NDArray[Any] | mx.array) -> NDArray[np.uint8]:
    """Convert (H, W) or (H, W, C) to uint8, without an axis of one channel."""
    pixels = np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating):
            raise TypeError(f"an image is an array of {pixels.dtype}; give uint8, or floats in [0, 1]")
        pixels = to_uint8(pixels)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
    if not known or 0 in pixels.shape:
        raise ValueError(
            f"an image has shape {tuple(array.shape)}; it must be (height, width), or (height, width, "
            "channels) with 1, 3 or 4 channels"
        )
    return pixels


def _pair(name: str, value: Any) -> Any:
    """Return a size of a file, which may be a dict, as an integer or (height, width)."""
    if isinstance(value, Mapping):
        value = {name: number for name, number in value.items() if number is not None}
        if set(value) == {"shortest_edge"}:
            return value["shortest_edge"]
        if set(value) == {"height", "width"}:
            return value["height"], value["width"]
        raise ValueError(f"{name}={value} must have the keys height and width, or shortest_edge")
    return value


@dataclass
class CLIPImageProcessorConfig(ModelConfig):
    """The keys of `preprocessor_config.json`; defaults are those of transformers."""

    do_resize: bool = key(True, "resize to `size`")
    size: int | tuple[int, int] = key(
        224, 'pixels of the shortest edge, {"shortest_edge": 224}, or {"height": 224, "width": 224}', least=1
    )
    resample: int = key(
        3,
        "the filter by Pillow's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming",
        least=0,
    )
    do_center_crop: bool = key(True, "crop to `crop_size`; smaller images get a black border")
    crop_size: int | tuple[int, int] = key(
        224, 'pixels of a square, or {"height": 224, "width": 224}', least=1
    )
    do_rescale: bool = key(True, "multiply by `rescale_factor`")
    rescale_factor: float = key(1 / 255, "from the values of a file to [0, 1]")
    do_normalize: bool = key(True, "subtract `image_mean`, divide by `image_std`")
    image_mean: tuple[float, float, float] = key((0.48145466, 0.4578275, 0.40821073), "red, green, blue")
    image_std: tuple[float, float, float] = key((0.26862954, 0.26130258, 0.27577711), "red, green, blue")

    # Of transformers itself; images are always converted to RGB, since networks take nothing else.
    ignored_keys: ClassVar[frozenset[str]] = frozenset(
        (
            "data_format",
            "default_to_square",
            "do_convert_rgb",
            "feature_extractor_type",
            "image_processor_type",
            "processor_class",
        )
    )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPImageProcessorConfig":
        """Make the config from a file's content, see `ModelConfig.from_dict`; null stands for the default."""
        given = {name: value for name, value in config.items() if value is not None}
        for name in {"size", "crop_size"} & given.keys():
            given[name] = _pair(name, given[name])
        return super().from_dict(given)

    def __post_init__(self) -> None:
        self.size, self.crop_size = _pair("size", self.size), _pair("crop_size", self.crop_size)
        super().__post_init__()
        if self.resample > max(Image.Resampling):
            raise ValueError(f"resample={self.resample} must be 0 to {max(Image.Resampling):d}")
        if 0 in self.image_std:
            raise ValueError(f"image_std={self.image_std} must not have a zero")


class CLIPImageProcessor:
    """Prepares images for a CLIP image encoder; transformers' class of that name.

    Its arguments are the keys of a `CLIPImageProcessorConfig`. Raises ValueError for values out of range.
    """

    __signature__ = inspect.signature(CLIPImageProcessorConfig)
    config: CLIPImageProcessorConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.config = CLIPImageProcessorConfig(*args, **kwargs)

    @classmethod
    @takes_hub
    def from_pretrained(
        cls, path_or_id: str | Path, *, subfolder: str | None = None, hub: Hub
    ) -> "CLIPImageProcessor":
        """Read `preprocessor_config.json` of a folder or hub id.

        Args:
            path_or_id: a folder, or a hub id.
            subfolder: "feature_extractor" or "image_processor" for the folder of a pipeline.
            revision, local_files_only, token, cache_dir, hub: see `checkpoints.Hub`.

        Raises FileNotFoundError, PermissionError, ConnectionError: see `find_folder`; CheckpointError.
        """
        content = read_component_config(path_or_id, CONFIG_NAME, subfolder=subfolder, hub=hub)
        with blame(Path(path_or_id) / (subfolder or "") / CONFIG_NAME):
            return cls(**CLIPImageProcessorConfig.from_dict(content))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `preprocessor_config.json`, which transformers reads as well; returns its path."""
        path = Path(folder).expanduser() / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        return path

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`."""
        size, edges = self.config.size, ("height", "width")
        return {
            **self.config,
            "size": dict(zip(edges, size, strict=True))
            if isinstance(size, tuple)
            else {"shortest_edge": size},
            "crop_size": dict(zip(edges, self.crop, strict=True)),
            "do_convert_rgb": True,
            "image_processor_type": "CLIPImageProcessor",
        }

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of images after the centre crop."""
        size = self.config.crop_size
        return size if isinstance(size, tuple) else (size, size)

    def __call__(self, images: Pictures) -> mx.array:
        """Resize, crop, rescale and normalize images by the config; returns (N, 3, height, width), float32.

        Raises ValueError where images come out in several sizes; TypeError and ValueError, see `rgb_images`.
        """
        config = self.config
        arrays = []
        for image in rgb_images(images):
            if config.do_resize:
                image = image.resize(self._target(image), Image.Resampling(config.resample))
            pixels = np.asarray(image)
            arrays.append(_center_crop(pixels, *self.crop) if config.do_center_crop else pixels)
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            sizes = ", ".join(f"{width}x{height}" for height, width, _ in sorted(shapes))
            raise ValueError(f"images come out in the sizes {sizes}; give one at a time, or crop them")
        pixels = np.stack(arrays)
        if config.do_rescale:
            pixels = (pixels * config.rescale_factor).astype(np.float32)
        return self.normalize(pixels) if config.do_normalize else _channels_first(pixels)

    def antialiased(self, images: Pictures, *, height: int = 224, width: int = 224) -> mx.array:
        """Resize and normalize images as `StableVideoDiffusionPipeline` does; returns (N, 3, height, width).

        The aspect ratio is not kept. Raises TypeError and ValueError, see `rgb_images`.
        """
        return self.normalize(
            np.stack([resize_antialiased(np.asarray(i), height, width) / 255 for i in rgb_images(images)])
        )

    def box_cropped(self, images: Pictures, *, width: int) -> mx.array:
        """Crop, resize and normalize images as `I2VGenXLPipeline` does; returns (N, 3, *crop_size).

        `width` is the width of the video: the crop is a square of that many pixels, which is then resized.
        Raises TypeError and ValueError, see `rgb_images`.
        """
        height, out_width = self.crop
        cropped = [crop_wide(image, width, width) for image in rgb_images(images)]
        resized = [image.resize((out_width, height), Image.Resampling.BILINEAR) for image in cropped]
        return self.normalize(np.stack([np.asarray(image) for image in resized]) / np.float32(255))

    def normalize(self, pixels: NDArray[Any]) -> mx.array:
        """Normalize (N, H, W, 3) in [0, 1] by mean and deviation; returns (N, 3, H, W) in float32."""
        mean, std = (np.array(x, np.float32) for x in (self.config.image_mean, self.config.image_std))
        return _channels_first((pixels.astype(np.float32) - mean) / std)

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """Return width and height after the resize."""
        size = self.config.size
        if isinstance(size, tuple):
            return size[1], size[0]
        shortest = min(image.size)
        width, height = (int(size * edge / shortest) for edge in image.size)
        return width, height


def _channels_first(pixels: NDArray[Any]) -> mx.array:
    """(N, H, W, 3) -> (N, 3, H, W) in float32."""
    return mx.array(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32))


def _center_crop(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (height, width, 3); where it is smaller, with zeros around."""
    for axis, size in enumerate((height, width)):
        missing = size - pixels.shape[axis]
        if missing > 0:
            before = (missing + 1) // 2
            border = [(before, missing - before) if i == axis else (0, 0) for i in range(3)]
            pixels = np.pad(pixels, border)
        start = (pixels.shape[axis] - size) // 2
        pixels = np.take(pixels, range(start, start + size), axis=axis)
    return pixels


def vae_pixels(images: Pictures, height: int, width: int, *, factor: int = 8) -> mx.array:
    """Resize images by a Lanczos filter; returns (N, 3, height, width) in [-1, 1], float32.

    The aspect ratio is not kept. Height and width are rounded down to multiples of `factor`, the pixels of a
    latent each way.
    Raises ValueError for less than one multiple; TypeError and ValueError, see `rgb_images`.
    """
    size = tuple(edge - edge % factor for edge in (width, height))
    if min(size) < factor:
        raise ValueError(f"height={height} and width={width} must be at least {factor}")
    resized = [image.resize(size, Image.Resampling.LANCZOS) for image in rgb_images(images)]
    return _signed(resized)


def vae_pixels_cropped(images: Pictures, height: int, width: int) -> mx.array:
    """Resize images by `crop_wide`; returns (N, 3, height, width) in [-1, 1], float32."""
    return _signed([crop_wide(image, width, height) for image in rgb_images(images)])


def _signed(images: Sequence[Image.Image]) -> mx.array:
    pixels = np.stack([np.asarray(image) for image in images])
    return _channels_first(pixels / np.float32(255) * 2 - 1)


def crop_wide(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image by a box filter until it covers width x height, and crop its middle.

    As diffusers does it: the size before the crop is rounded down, so that a row or column can be missing,
    which is black. Raises ValueError for less than one pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width={width} and height={height} must be at least 1")
    scale = min(image.width / width, image.height / height)
    size = round(image.width // scale), round(image.height // scale)
    image = image.resize(size, Image.Resampling.BOX)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize_antialiased(pixels: NDArray[Any], height: int, width: int) -> NDArray[np.float64]:
    """Resize (H, W, C) to (height, width, C) by a Gaussian blur, then bicubic interpolation, unclipped.

    Of Stable Video Diffusion: the blur's deviation is half of what the scale exceeds 1 by, borders are
    mirrored, corners are aligned and the cubic has a = -0.75. Both are linear in each axis, so one sparse
    matrix an axis does both.
    """
    rows, columns = _antialias_matrix(pixels.shape[0], height), _antialias_matrix(pixels.shape[1], width)
    return _along_rows(columns, _along_rows(rows, pixels).swapaxes(0, 1)).swapaxes(0, 1)


def _antialias_matrix(length: int, size: int) -> NDArray[np.float64]:
    """Return (size, length): the weight of each pixel of a row in each pixel of the resized row."""
    sigma = max((length / size - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3)) // 2 * 2 + 1
    offsets = np.arange(taps) - taps // 2
    gauss = np.exp(-(offsets**2) / (2 * sigma**2))
    gauss /= gauss.sum()
    # Positions in float32, as torch has them: their rounding is the largest difference otherwise
    step = np.float32((length - 1) / (size - 1)) if size > 1 else np.float32(0)
    position = (step * np.arange(size, dtype=np.float32)).astype(np.float64)
    base = np.floor(position)
    distance = np.abs((position - base)[:, None] - np.arange(-1, 3))  # to the 4 pixels around
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    cubic = np.where(distance <= 1, near, far)
    centers = np.clip(base[:, None] + np.arange(-1, 3), 0, length - 1).astype(int)
    period = max(2 * (length - 1), 1)
    sources = np.abs(centers[:, :, None] + offsets) % period  # (size, 4, taps)
    sources = np.minimum(sources, period - sources) if length > 1 else np.zeros_like(sources)
    matrix = np.zeros((size, length))
    np.add.at(matrix, (np.arange(size)[:, None, None], sources), cubic[:, :, None] * gauss)
    return matrix


def _along_rows(matrix: NDArray[np.float64], pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Return `matrix @ pixels` over the first axis; each row reads only the pixels with a weight."""
    result = np.empty((len(matrix), *pixels.shape[1:]))
    for row, weights in zip(result, matrix, strict=True):
        used = np.flatnonzero(weights)
        part = slice(used[0], used[-1] + 1)
        row[...] = np.tensordot(weights[part], pixels[part], axes=1)
    return result
