"""AutoencoderKL: images to latents of an eighth of the size, and back; one frame at a time.

Source: diffusers' class of that name; Rombach et al., arXiv:2112.10752. Letters: N frames, H W
pixels, h w latent pixels, C channels, c latent channels.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..checkpoints.config import ModelConfig, key
from ..layers.activations import get_activation
from ..layers.convolution import set_convolution
from ..layers.resnet import PointwiseConv2d
from ..layers.vae_blocks import Decoder, Encoder, in_chunks, tiled
from ..noise import NoiseSource
from ..scalars import as_count
from .pretrained import PretrainedModel

# MLX indexes arrays on the GPU by 32-bit integers in places.
_MAX_ELEMENTS = 2**31 - 1

# Default for the largest activation of one evaluation: 64 MB in fp32; a convolution takes several times that
# as scratch.
_CHUNK_ELEMENTS = 2**24

# Far above any network, and few enough to be built before the weights are compared with them.
_MOST_LEVELS, _MOST_LAYERS = 8, 100

# Names of the attention in files from before mid-2023.
_LEGACY_SEGMENTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class AutoencoderKLConfig(ModelConfig):
    """The keys of `config.json`; defaults are those of diffusers."""

    in_channels: int = key(3, "of the images that are encoded", least=1)
    out_channels: int = key(3, "of the images that are decoded", least=1)
    down_block_types: tuple[str, ...] = key(("DownEncoderBlock2D",), '"DownEncoderBlock2D", one a level')
    up_block_types: tuple[str, ...] = key(("UpDecoderBlock2D",), '"UpDecoderBlock2D", one a level')
    block_out_channels: tuple[int, ...] = key(
        (64,),
        "channels a level, finest first, multiples of `norm_num_groups`; latents are 2^(levels - 1) times "
        "smaller than images each way",
        least=1,
    )
    layers_per_block: int = key(1, "resnets of an encoder block; decoder blocks have one more", least=1)
    act_fn: str = key("silu", "activation of the resnets")
    latent_channels: int = key(4, "c, channels of the latents", least=1)
    norm_num_groups: int = key(32, "groups of the group norms", least=1)
    sample_size: int | tuple[int, int] = key(32, "pixels of the training images, and of a tile")
    scaling_factor: float = key(0.18215, "between latents and the input of a UNet, see `scale_latents`")
    shift_factor: float | None = key(None, "subtracted from latents before scaling; None for 0")
    latents_mean: tuple[float, ...] | None = key(None, "must be None")
    latents_std: tuple[float, ...] | None = key(None, "must be None")
    force_upcast: bool = key(
        True, "asks pipelines for single precision; the model computes in the dtype of its weights"
    )
    use_quant_conv: bool = key(True, "a 1x1 convolution after the encoder")
    use_post_quant_conv: bool = key(True, "a 1x1 convolution before the decoder")
    mid_block_add_attention: bool = key(True, "attention between the two resnets of the mid blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_autoencoder(self)
        for name in ("latents_mean", "latents_std"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)}: latents normalized channel by channel are not "
                    "supported; only scaling_factor and shift_factor are"
                )
        get_activation(self.act_fn)


def check_autoencoder(config: Any) -> None:
    """Raise ValueError where the blocks and numbers of an autoencoder's config contradict each other."""
    levels = config.block_out_channels
    for name, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        blocks = config.get(name, (known,) * len(levels))
        if len(blocks) != len(levels):
            raise ValueError(f"{name}={blocks} must have one entry for each of block_out_channels={levels}")
        for block in blocks:
            if block != known:
                raise ValueError(f"{name} has {block!r}; AutoencoderKL supports {known!r} only")
    if len(levels) > _MOST_LEVELS or config.layers_per_block > _MOST_LAYERS:
        raise ValueError(
            f"layers_per_block={config.layers_per_block} in {len(levels)} levels: "
            f"use at most {_MOST_LAYERS} in {_MOST_LEVELS}"
        )
    if not levels:
        raise ValueError("block_out_channels=() must have at least one level")
    if not config.scaling_factor > 0:
        raise ValueError(f"scaling_factor={config.scaling_factor!r} must be greater than 0")


@dataclass(frozen=True)
class DiagonalGaussian:
    """The distribution of latents given images: independent normal distributions of all elements.

    Attributes:
        mean: (N, c, h, w).
        logvar: logarithm of the variance, clamped to [-30, 20]; (N, c, h, w).
    """

    mean: mx.array
    logvar: mx.array

    @classmethod
    def from_moments(cls, moments: mx.array) -> "DiagonalGaussian":
        """Make the distribution from the encoder's output (N, 2c, h, w), means first."""
        mean, logvar = mx.split(moments, 2, axis=1)
        return cls(mean, mx.clip(logvar, -30.0, 20.0))

    @property
    def std(self) -> mx.array:
        """Standard deviation, (N, c, h, w)."""
        return mx.exp(0.5 * self.logvar)

    def sample(self, noise: NoiseSource) -> mx.array:
        """Draw latents (N, c, h, w); with `noise_source(seed)` the same as diffusers'
        `latent_dist.sample(generator)`."""
        return self.mean + self.std * noise(self.mean.shape).astype(self.mean.dtype)

    def mode(self) -> mx.array:
        """Return the most likely latents, the means (N, c, h, w)."""
        return self.mean


class AutoencoderKL(PretrainedModel):
    """The image autoencoder of Stable Diffusion and ModelScope; diffusers' class of that name.

    Raises ValueError where the numbers of its config do not fit together.
    """

    config_class = AutoencoderKLConfig
    weights_stem = "diffusion_pytorch_model"
    class_names = ("AutoencoderKL",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        c = config.latent_channels
        common = (
            config.block_out_channels,
            config.layers_per_block,
            config.norm_num_groups,
            config.act_fn,
            config.mid_block_add_attention,
        )
        self.encoder = Encoder(config.in_channels, c, *common)
        self.decoder = Decoder(c, config.out_channels, *common)
        if config.use_quant_conv:
            self.quant_conv = PointwiseConv2d(2 * c, 2 * c)
        if config.use_post_quant_conv:
            self.post_quant_conv = PointwiseConv2d(c, c)
        self._set_defaults()

    def _set_defaults(self) -> None:
        size = self.config.sample_size
        self.spatial_factor = 2 ** (len(self.config.block_out_channels) - 1)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = size if isinstance(size, int) else size[0]
        self.tile_latent_min_size = self.tile_sample_min_size // self.spatial_factor

    # Encoding and decoding.

    def encode(self, x: mx.array, *, chunk_size: int | None = None) -> DiagonalGaussian:
        """Encode images to a distribution of latents.

        Args:
            x: images (N, in_channels, H, W) in [-1, 1], H and W at least `spatial_factor`; pixels beyond the
                last multiple of it have no latent of their own.
            chunk_size: number of frames evaluated at a time, at least 1; the result is the same. None for 1
                with slicing enabled, and for `frames_per_chunk` without. With more frames than that, this
                call evaluates its chunks, except within `mx.compile`.

        Returns the distribution, (N, c, H // spatial_factor, W // spatial_factor), in the dtype of
        the network, whatever the dtype of `x`.
        Raises ValueError for shapes and sizes out of range.
        """
        self._check_input("x", x, self.config.in_channels)
        height, width = x.shape[2:]
        if min(height, width) < self.spatial_factor:
            raise ValueError(
                f"x is {width}x{height}; an image needs at least "
                f"{self.spatial_factor}x{self.spatial_factor} pixels"
            )
        chunk_size = self._checked_chunk_size(chunk_size, height, width)
        moments = in_chunks(self._encode_chunk, x.astype(self.dtype), chunk_size)
        return DiagonalGaussian.from_moments(moments)

    def decode(self, z: mx.array, *, chunk_size: int | None = None) -> mx.array:
        """Decode latents to images; pass latents from a UNet through `unscale_latents` first.

        Args:
            z: latents (N, c, h, w).
            chunk_size: number of frames evaluated at a time, as in `encode`.

        Returns images (N, out_channels, h * spatial_factor, w * spatial_factor), about [-1, 1] and
        not clipped, in the dtype of the network.
        Raises ValueError for shapes and sizes out of range.
        """
        self._check_input("z", z, self.config.latent_channels)
        height, width = (size * self.spatial_factor for size in z.shape[2:])
        chunk_size = self._checked_chunk_size(chunk_size, height, width)
        return in_chunks(self._decode_chunk, z.astype(self.dtype), chunk_size)

    def scale_latents(self, latents: mx.array) -> mx.array:
        """Scale latents of this autoencoder for a UNet: (latents - shift_factor) * scaling_factor."""
        if self.config.get("shift_factor") is not None:
            latents = latents - self.config.get("shift_factor")
        return latents * self.config.scaling_factor

    def unscale_latents(self, latents: mx.array) -> mx.array:
        """Undo `scale_latents`."""
        latents = latents * (1 / self.config.scaling_factor)
        if self.config.get("shift_factor") is not None:
            latents = latents + self.config.get("shift_factor")
        return latents

    def _encode_chunk(self, x: mx.array) -> mx.array:
        """(N, C, H, W) -> moments (N, 2c, h, w)."""
        x = x.transpose(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        if self.use_tiling and max(x.shape[1:3]) > self.tile_sample_min_size:
            moments = tiled(self._encode, x, self.tile_sample_min_size, self.tile_latent_min_size)
        else:
            moments = self._encode(x)
        return moments.transpose(0, 3, 1, 2)  # (N, h, w, 2c) -> (N, 2c, h, w)

    def _decode_chunk(self, z: mx.array) -> mx.array:
        """(N, c, h, w) -> (N, C, H, W)."""
        z = z.transpose(0, 2, 3, 1)  # (N, c, h, w) -> (N, h, w, c)
        if self.use_tiling and max(z.shape[1:3]) > self.tile_latent_min_size:
            x = tiled(self._decode, z, self.tile_latent_min_size, self.tile_sample_min_size)
        else:
            x = self._decode(z)
        return x.transpose(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)

    def _encode(self, x: mx.array) -> mx.array:
        if min(x.shape[1:3]) < self.spatial_factor:
            raise ValueError(
                f"the last tile is {x.shape[2]}x{x.shape[1]} pixels, less than the latent's "
                f"{self.spatial_factor}; crop or pad to a multiple of {self.spatial_factor}, or "
                "disable_tiling()"
            )
        moments = self.encoder(x)
        return self.quant_conv(moments) if "quant_conv" in self else moments

    def _decode(self, z: mx.array) -> mx.array:
        return self.decoder(self.post_quant_conv(z) if "post_quant_conv" in self else z)

    def _check_input(self, name: str, x: mx.array, channels: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {x.shape}; it must be (frames, {channels}, height, width), not empty"
            )
        if not mx.issubdtype(x.dtype, mx.floating):
            raise ValueError(f"{name} is {x.dtype}; it must be floating point")

    # Memory.

    def frames_per_chunk(self, height: int, width: int) -> int:
        """Return the default number of frames of `height` x `width` pixels evaluated at a time.

        As many as keep the largest activation within 2^24 elements (64 MB in fp32), and at least
        one: 4 frames of 128x128, one of 256x256 and more, for Stable Diffusion's autoencoder.
        """
        return max(1, _CHUNK_ELEMENTS // self._elements_per_frame(height, width))

    def set_convolution(self, mode: str) -> None:
        """Set "auto" (the default), "fast" or "precise" convolutions, see
        `UNet3DConditionModel.set_convolution`."""
        set_convolution(self.modules(), mode)

    def enable_slicing(self) -> None:
        """Evaluate one frame at a time, which takes the least memory; the result is the same."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Evaluate `frames_per_chunk` frames at once."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Compute frames larger than `tile_sample_min_size` in overlapping tiles and blend these.

        Memory then depends on the tile alone. The result differs visibly from that without tiles, as group
        norms and attention see one tile only; it equals diffusers' tiled result.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.use_tiling = False

    def _elements_per_frame(self, height: int, width: int) -> int:
        """Return the number of elements in the largest activation of encoding or decoding a frame of this
        size."""
        if self.use_tiling:
            height = min(height, self.tile_sample_min_size)
            width = min(width, self.tile_sample_min_size)
        widths = self.config.block_out_channels
        elements = 0
        for level in range(len(widths)):
            # After upsampling, a level's pixels carry the channels of the next coarser level.
            channels = max(widths[level : level + 2])
            pixels = -(-height // 2**level) * -(-width // 2**level)
            elements = max(elements, channels * pixels)
        if self.config.get("mid_block_add_attention", True):
            elements = max(elements, pixels**2)  # the scores of attention that is not fused
        return elements

    def check_frame(self, height: int, width: int) -> int:
        """Return the number of frames of `height` x `width` pixels that MLX can index at once.

        Raises ValueError where one frame is too large.
        """
        per_frame = self._elements_per_frame(height, width)
        most = _MAX_ELEMENTS // per_frame
        if most == 0:
            advice = (
                "reduce tile_sample_min_size and tile_latent_min_size"
                if self.use_tiling
                else "call enable_tiling(), or give the command --vae-tiling"
            )
            raise ValueError(
                f"one frame of {width}x{height} needs an array of {per_frame} elements, more than "
                f"the 2^31 - 1 that MLX can index; {advice}"
            )
        return most

    def _checked_chunk_size(self, chunk_size: int | None, height: int, width: int) -> int:
        most = self.check_frame(height, width)
        if chunk_size is None:
            return 1 if self.use_slicing else min(most, self.frames_per_chunk(height, width))
        chunk_size = as_count("chunk_size", chunk_size, also=", or None")
        if chunk_size > most:
            elements = chunk_size * self._elements_per_frame(height, width)
            raise ValueError(
                f"chunk_size={chunk_size} frames of {width}x{height} need an array of {elements} elements, "
                f"more than the 2^31 - 1 that MLX can index; use at most {most}, or None"
            )
        return chunk_size

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Return the parameter name of a file's tensor `key`; old files name attention layers differently."""
        path, _, parameter = key.rpartition(".")
        parent, _, segment = path.rpartition(".")
        if segment in _LEGACY_SEGMENTS and ".mid_block.attentions." in f".{parent}.":
            return f"{parent}.{_LEGACY_SEGMENTS[segment]}.{parameter}"
        return key
