"""I2VGenXLUNet: the denoising network of I2VGen-XL, conditioned on an image and a prompt.

Source: diffusers' class of that name; Zhang et al., arXiv:2311.04145. Letters as in `video_unet`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.config import key
from ..layers.activations import SiLU
from ..layers.attention import Attention
from ..layers.blocks import UNetMidBlock3DCrossAttn
from ..layers.conditions import Conditions
from ..layers.convolution import Conv2d
from ..layers.feed_forward import FeedForward
from ..layers.normalization import LayerNorm
from ..layers.text_context import TextContext
from .feature_cache import FeatureCache
from .unet_3d_condition import DOWN_BLOCKS, UP_BLOCKS, transformer_in
from .video_unet import Inputs, VideoUNet, VideoUNetOutput, as_timestep, check_input, make_levels
from .video_unet_config import VideoUNetConfig

LATENT_CHANNELS = 4  # of the image's latents, independent of in_channels
_POOLED = 32  # height and width of the image's latents before two halvings make context tokens of them
IMAGE_TOKENS = (_POOLED // 4) ** 2  # of these in the context


@dataclass
class I2VGenXLUNetConfig(VideoUNetConfig):
    """The keys of `config.json`; defaults are those of diffusers and of the released checkpoint."""

    down_block_types: tuple[str, ...] = DOWN_BLOCKS
    up_block_types: tuple[str, ...] = UP_BLOCKS
    layers_per_block: int = key(2, "resnets of a down block; up blocks have one more", least=1)
    norm_num_groups: int = key(32, "groups of the group norms", least=1)
    cross_attention_dim: int = key(1024, "D, channels of text states and image embedding", least=1)
    attention_head_dim: int = key(64, "channels of an attention head, at most the narrowest block's", least=1)
    num_attention_heads: int | tuple[int, ...] | None = key(None, "without effect, as in diffusers")


class I2VGenXLTransformerTemporalEncoder(nn.Module):
    """Attention among frames after a norm, and a feed-forward without one; diffusers' class of that name."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, None, heads, dim_head)
        self.ff = FeedForward(dim, activation="gelu")

    def __call__(self, x: mx.array) -> mx.array:
        """(N, F, C) -> (N, F, C)."""
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(x)


class AdaptiveAvgPool2d(nn.Module):
    """Means over the bins into which torch divides (N, H, W, C), -> (N, size, size, C).

    Bins overlap where `size` does not divide a length, and repeat pixels where it is larger.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __call__(self, x: mx.array) -> mx.array:
        rows, columns = (
            [slice(i * n // self.size, -(-(i + 1) * n // self.size)) for i in range(self.size)]
            for n in x.shape[1:3]
        )
        x = mx.stack([x[:, r].mean(axis=1) for r in rows], axis=1)
        return mx.stack([x[:, :, c].mean(axis=2) for c in columns], axis=2)


def _in_turn(layers: Sequence[nn.Module], x: mx.array) -> mx.array:
    for layer in layers:
        x = layer(x)
    return x


@dataclass
class I2VGenXLUNetOutput(VideoUNetOutput):
    """`sample`: the prediction, (B, C, F, H, W)."""


class I2VGenXLUNet(VideoUNet):
    """Predicts the velocity of a noisy video latent, given text states, an image, its embedding and a frame
    rate.

    Raises ValueError where keys of its config contradict each other.
    """

    config_class = I2VGenXLUNetConfig
    class_names = ("I2VGenXLUNet",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.config
        c, latent = config.in_channels, LATENT_CHANNELS
        width, dim = config.block_out_channels[0], config.cross_attention_dim
        self._build(
            make_levels(config),
            UNetMidBlock3DCrossAttn,
            image_channels=c,
            transformer_in=transformer_in(config),
            image_latents_proj_in=[
                Conv2d(latent, 4 * c, 3, padding=1),
                SiLU(),
                Conv2d(4 * c, 4 * c, 3, padding=1),
                SiLU(),
                Conv2d(4 * c, c, 3, padding=1),
            ],
            image_latents_temporal_encoder=I2VGenXLTransformerTemporalEncoder(c, heads=2, dim_head=c),
            image_latents_context_embedding=[
                Conv2d(latent, 8 * c, 3, padding=1),
                SiLU(),
                AdaptiveAvgPool2d(_POOLED),
                Conv2d(8 * c, 16 * c, 3, stride=2, padding=1),
                SiLU(),
                Conv2d(16 * c, dim, 3, stride=2, padding=1),
            ],
            context_embedding=[nn.Linear(dim, 4 * width), SiLU(), nn.Linear(4 * width, dim * c)],
            fps_embedding=[nn.Linear(width, 4 * width), SiLU(), nn.Linear(4 * width, 4 * width)],
        )

    def __call__(
        self,
        sample: mx.array,
        timestep: int | float | mx.array,
        fps: int | float | mx.array,
        image_latents: mx.array,
        image_embeddings: mx.array | None = None,
        encoder_hidden_states: mx.array | TextContext | None = None,
        timestep_cond: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        feature_cache: FeatureCache | None = None,
    ) -> I2VGenXLUNetOutput | tuple[mx.array]:
        """One forward.

        Args:
            sample: noisy latents (B, in_channels, F, H, W) in the dtype of the network.
            timestep: one for all, or (B,); usually 0 to 999.
            fps: frames a second, one for all, or (B,).
            image_latents: (B, 4, F, H, W), latents of the image in the first frame, and frame positions in
                the others.
            image_embeddings: CLIP embedding of the image, (B, D) or (B, 1, D).
            encoder_hidden_states: text states (B, L, D), or the result of `embed_context`, made once for all
                steps.
            timestep_cond: must be None; the network has no projection for it.
            cross_attention_kwargs: keywords for the attention processors; `scale` scales all LoRA.
            return_dict: False for a tuple.
            feature_cache: stores the deep features of this forward, or supplies those of an earlier one.

        Returns the prediction (B, out_channels, F, H, W) in the dtype of the sample.
        Raises ValueError for other shapes, dtypes and counts.
        """
        inputs = dict(
            timestep=as_timestep(timestep),
            fps=as_timestep(fps),
            image_latents=image_latents,
            image_embeddings=image_embeddings,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        x = self._run(sample, encoder_hidden_states, inputs, feature_cache)
        return I2VGenXLUNetOutput(sample=x) if return_dict else (x,)

    def embed_context(
        self, text: mx.array, image_latents: mx.array, image_embeddings: mx.array
    ) -> TextContext:
        """Make the context of all steps: text states, 64 tokens of the first frame's latents, and
        `in_channels` tokens of the image embedding.

        Arguments as of a forward. Returns (B, L + 64 + in_channels, D).
        """
        return TextContext(self._context(text, image_latents, image_embeddings))

    def _context(self, text: mx.array, image_latents: mx.array, image_embeddings: mx.array) -> mx.array:
        batch, dim = text.shape[0], self.config.cross_attention_dim
        if image_embeddings is None or image_embeddings.size != batch * dim:
            shape = None if image_embeddings is None else tuple(image_embeddings.shape)
            raise ValueError(f"image_embeddings has shape {shape}; it must be ({batch}, {dim})")
        first = image_latents[:, :, 0].transpose(0, 2, 3, 1)  # (B, H, W, C)
        latents = _in_turn(self.image_latents_context_embedding, first).reshape(batch, -1, dim)
        image = _in_turn(self.context_embedding, image_embeddings.reshape(batch, dim))
        return mx.concatenate([text, latents, image.reshape(batch, self.config.in_channels, dim)], axis=1)

    def _prepare(self, x: mx.array, cond: Conditions, inputs: Inputs) -> tuple[mx.array, Conditions]:
        batch, frames, height, width, _ = x.shape
        latents, context = inputs["image_latents"], cond.context
        check_input("image_latents", latents, (batch, LATENT_CHANNELS, frames, height, width), x.dtype)
        if not isinstance(context, TextContext):
            context = self._context(context, latents, inputs["image_embeddings"])
        fps = self._sinusoid("fps", inputs["fps"], batch, x.dtype)
        cond = replace(cond, temb=cond.temb + _in_turn(self.fps_embedding, fps), context=context)
        return mx.concatenate([x, self._encode_image(latents)], axis=-1), cond

    def _encode_image(self, latents: mx.array) -> mx.array:
        """Latents of the image (B, 4, F, H, W) -> the channels beside the sample's, (B, F, H, W,
        in_channels)."""
        batch, _, frames, height, width = latents.shape
        # (B, C, F, H, W) -> (N, H, W, C)
        x = latents.transpose(0, 2, 3, 4, 1).reshape(batch * frames, height, width, -1)
        x = _in_turn(self.image_latents_proj_in, x)
        # (N, H, W, C) -> (B*H*W, F, C)
        x = x.reshape(batch, frames, height * width, -1).transpose(0, 2, 1, 3)
        x = self.image_latents_temporal_encoder(x.reshape(batch * height * width, frames, -1))
        # (B*H*W, F, C) -> (B, F, H, W, C)
        return x.reshape(batch, height, width, frames, -1).transpose(0, 3, 1, 2, 4)
