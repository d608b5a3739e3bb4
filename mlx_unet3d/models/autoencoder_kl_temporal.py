"""AutoencoderKLTemporalDecoder of Stable Video Diffusion: encodes single images, decodes clips.

Source: diffusers' class of that name; Blattmann et al., arXiv:2311.15127. Letters as in `autoencoder_kl`,
with F frames of a clip.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..checkpoints.config import ModelConfig, key
from ..layers.chunking import Chunks
from ..layers.conditions import Conditions
from ..layers.resnet import PointwiseConv2d
from ..layers.vae_blocks import Encoder, TemporalDecoder, in_chunks
from ..scalars import as_count
from .autoencoder_kl import AutoencoderKL, check_autoencoder


@dataclass
class AutoencoderKLTemporalDecoderConfig(ModelConfig):
    """The keys of `config.json`; defaults are those of diffusers."""

    in_channels: int = key(3, "of the images that are encoded", least=1)
    out_channels: int = key(3, "of the frames that are decoded", least=1)
    down_block_types: tuple[str, ...] = key(("DownEncoderBlock2D",), '"DownEncoderBlock2D", one a level')
    block_out_channels: tuple[int, ...] = key(
        (64,), "channels a level, finest first; multiples of 32", least=1
    )
    layers_per_block: int = key(1, "resnets of an encoder block; decoder blocks have one more", least=1)
    latent_channels: int = key(4, "c, channels of the latents", least=1)
    sample_size: int | tuple[int, int] = key(32, "pixels of the training images")
    scaling_factor: float = key(0.18215, "between latents and the input of a UNet, see `scale_latents`")
    force_upcast: bool = key(True, "asks pipelines for single precision")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_autoencoder(self)


class AutoencoderKLTemporalDecoder(AutoencoderKL):
    """An image encoder and a decoder with temporal layers; diffusers' class of that name.

    Raises ValueError where the numbers of its config do not fit together.
    """

    config_class = AutoencoderKLTemporalDecoderConfig
    class_names = ("AutoencoderKLTemporalDecoder",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super(AutoencoderKL, self).__init__(*args, **kwargs)
        config = self.config
        widths, layers, c = config.block_out_channels, config.layers_per_block, config.latent_channels
        self.encoder = Encoder(config.in_channels, c, widths, layers, 32, "silu", True)
        self.decoder = TemporalDecoder(c, config.out_channels, widths, layers)
        self.quant_conv = PointwiseConv2d(2 * c, 2 * c)
        self._set_defaults()
        self.chunks = Chunks()

    def decode(
        self,
        z: mx.array,
        num_frames: int,
        image_only_indicator: mx.array | None = None,
        *,
        chunk_size: int | None = None,
    ) -> mx.array:
        """Decode latents to frames; pass latents from a UNet through `unscale_latents` first.

        Args:
            z: latents (N, c, h, w), the frames of a clip together.
            num_frames: F, frames of a clip; divides N. Frames that are decoded together influence each other.
            image_only_indicator: (N / F, F), as in diffusers; it has no effect on this decoder.
            chunk_size: number of frames decoded at a time, each chunk as a clip of its own, like
                `decode_chunk_size` of pipelines: this takes less memory and changes the result. None for
                complete clips, which MLX can index up to about 14 frames of 1024x576.

        Returns frames (N, out_channels, h * spatial_factor, w * spatial_factor), about [-1, 1] and not
        clipped, in the dtype of the network. Raises ValueError for shapes and numbers out of range.
        """
        self._check_input("z", z, self.config.latent_channels)
        n = z.shape[0]
        num_frames = as_count("num_frames", num_frames)
        if n % num_frames:
            raise ValueError(f"num_frames={num_frames} must divide the {n} frames of z")
        if chunk_size is not None:
            chunk_size = as_count("chunk_size", chunk_size, also=", or None")
            parts = []
            for start in range(0, n, chunk_size):
                part = z[start : start + chunk_size]
                parts.append(self.decode(part, part.shape[0]))
                mx.eval(parts[-1])
            return mx.concatenate(parts)
        height, width = (size * self.spatial_factor for size in z.shape[2:])
        most = self.check_frame(height, width)
        if num_frames > most:
            raise ValueError(
                f"{num_frames} frames of {width}x{height} decoded together need an array of more than the "
                f"2^31 - 1 elements that MLX can index; give chunk_size={most} or less"
            )
        if n > most:  # clips do not influence each other
            clips = most // num_frames * num_frames
            return in_chunks(lambda z: self.decode(z, num_frames), z, clips)
        chunks, few = self.chunks, self.frames_per_chunk(height, width)
        if chunks.frames is None and few < num_frames:
            chunks = dataclasses.replace(chunks, frames=few)
        cond = Conditions(n // num_frames, num_frames, chunks=chunks)
        # (N, c, h, w) -> (N, h, w, c), and (N, H, W, C) -> (N, C, H, W)
        return self.decoder(z.astype(self.dtype).transpose(0, 2, 3, 1), cond).transpose(0, 3, 1, 2)

    def enable_frame_chunking(self, frames: int = 1) -> None:
        """Run spatial layers on `frames` frames at a time; the result stays the same.

        The default is `frames_per_chunk`. Raises ValueError for less than 1.
        """
        self.chunks = dataclasses.replace(self.chunks, frames=frames)

    def disable_frame_chunking(self) -> None:
        """Undo `enable_frame_chunking`."""
        self.chunks = dataclasses.replace(self.chunks, frames=None)

    def enable_pixel_chunking(self, pixels: int = 4096) -> None:
        """Run temporal layers on `pixels` pixels of all frames at a time to save memory.

        The result stays the same up to rounding. Raises ValueError for less than 1.
        """
        self.chunks = dataclasses.replace(self.chunks, pixels=pixels)

    def disable_pixel_chunking(self) -> None:
        """Undo `enable_pixel_chunking`."""
        self.chunks = dataclasses.replace(self.chunks, pixels=None)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Raise NotImplementedError for True: like diffusers' class, this one has no tiles."""
        if use_tiling:
            raise NotImplementedError(
                "AutoencoderKLTemporalDecoder does not decode in tiles; use enable_frame_chunking() and "
                "enable_pixel_chunking(), which save memory and leave the result as it is"
            )
        self.use_tiling = False
