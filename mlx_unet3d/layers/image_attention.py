"""Attention processors for images beside the text: IP-Adapters (arXiv:2308.06721).

Names and meanings are those of diffusers 0.42.1.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .attention_processors import (
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
    refuse_attention_op,
)
from .text_context import TextContext


class IPAdapterAttnProcessor(AttnProcessor, nn.Module):
    """The sum of attention to the text and attention to image tokens with their own keys and values.

    Takes a `TextContext` with `images`, one for each adapter. Attention is computed by a base processor:
    explicitly, fused, or in slices.

    Args:
        hidden_size: channels of the attention layer.
        cross_attention_dim: channels of its context.
        num_tokens: tokens of an image, one number or one an adapter; only the number of adapters matters.
        scale: weight of each adapter, one number or one an adapter; 0 disables it.

    Raises ValueError for another number of scales than of adapters.
    """

    attends_to_text_alone = False
    base_processor: Callable[[], AttnProcessor] = AttnProcessor

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        num_tokens: int | Sequence[int] = (4,),
        scale: float | Sequence[float] = 1.0,
    ):
        super().__init__()
        count = 1 if isinstance(num_tokens, int) else len(num_tokens)
        scales = list(scale) if isinstance(scale, list | tuple) else [scale] * count
        if len(scales) != count:
            raise ValueError(
                f"scale={scales} has {len(scales)} numbers, num_tokens has {count}; give as many"
            )
        dim = hidden_size if cross_attention_dim is None else cross_attention_dim
        self.to_k_ip = [nn.Linear(dim, hidden_size, bias=False) for _ in range(count)]
        self.to_v_ip = [nn.Linear(dim, hidden_size, bias=False) for _ in range(count)]
        self.hidden_size = hidden_size
        self.cross_attention_dim = dim
        self.scale = scales
        self.base = self.base_processor()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":  # plain numbers, kept out of the parameter tree
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def attention(self) -> Callable[..., mx.array]:
        """The attention function of the base processor."""
        return self.base.attention

    def standing_on(self, base: AttnProcessor) -> "IPAdapterAttnProcessor":
        """Return a processor with the same layers on another base."""
        other = copy.copy(self)
        other.base = base
        return other

    def check(self, attn: Attention) -> None:
        """Raise ValueError where `attn` has other channels, or is no cross-attention."""
        wanted = (attn.heads * attn.dim_head, attn.cross_attention_dim)
        if not attn.is_cross_attention or wanted != (self.hidden_size, self.cross_attention_dim):
            raise ValueError(
                f"{type(self).__name__}: it maps {self.cross_attention_dim} channels to {self.hidden_size}, "
                f"this layer of {'cross' if attn.is_cross_attention else 'self'}-attention {wanted[1]} to "
                f"{wanted[0]}; give hidden_size and cross_attention_dim of a layer with cross-attention"
            )

    def _add_images(
        self, attn: Attention, query: mx.array, context: mx.array | TextContext | None, y: mx.array
    ) -> mx.array:
        images = context.images if isinstance(context, TextContext) else ()
        if len(images) != len(self.scale):
            raise ValueError(
                f"{len(self.scale)} IP-Adapters are loaded, but images are given for {len(images)}; give "
                "image_embeds for each, or unload them"
            )
        for image, scale, to_k, to_v in zip(images, self.scale, self.to_k_ip, self.to_v_ip, strict=True):
            if scale == 0:
                continue
            key, value = image.keys_values(to_k, lambda tokens, k=to_k, v=to_v: (k(tokens), v(tokens)))
            # (N, S, E) -> (B, F*S, E): all frames of a sample attend to the same images
            rows = query.reshape(key.shape[0], -1, query.shape[-1])
            y = y + scale * self._attend(attn, rows, key, value).reshape(y.shape)
        return y


class IPAdapterAttnProcessor2_0(IPAdapterAttnProcessor):
    """`IPAdapterAttnProcessor` with fused attention."""

    base_processor = AttnProcessor2_0


class IPAdapterXFormersAttnProcessor(IPAdapterAttnProcessor2_0):
    """The fused form under xformers' name; `attention_op` must be None."""

    base_processor = XFormersAttnProcessor

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        num_tokens: int | Sequence[int] = (4,),
        scale: float | Sequence[float] = 1.0,
        attention_op: Callable | None = None,
    ):
        refuse_attention_op(attention_op)
        super().__init__(hidden_size, cross_attention_dim, num_tokens, scale)
