"""Attention processors with weights of their own: LoRA and Custom Diffusion.

Names and meanings are those of diffusers 0.23.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapted import PROCESSORS, AdaptedLayer, LowRank, weight_shape
from .attention import Attention
from .attention_processors import (
    AttnAddedKVProcessor,
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
    explicit_attention,
    fused_attention,
    refuse_attention_op,
)
from .text_context import TextContext


class LoRALinearLayer(nn.Module):
    """`network_alpha / rank * up(down(x))`, (..., I) -> (..., O) (arXiv:2106.09685); diffusers' class.

    `network_alpha` None stands for a factor of 1. Starts as zero: `up` is zero, `down` is normal with a
    standard deviation of 1 / rank. It can be a branch of an `AdaptedLayer`, see `Branch`; when it is called
    by itself, `amount` has no effect.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        network_alpha: float | None = None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.down.weight = mx.random.normal(self.down.weight.shape, scale=1 / rank)
        self.up.weight = mx.zeros(self.up.weight.shape)
        self.rank = rank
        self.network_alpha = network_alpha
        self.amount = 1.0

    @property
    def scaling(self) -> float:
        """Alpha over rank."""
        return 1.0 if self.network_alpha is None else self.network_alpha / self.rank

    def low_rank(self) -> LowRank:
        """Return the change of the weight."""
        return LowRank(self.down.weight, self.up.weight, self.scaling)

    def beside(self, base: nn.Module, x: mx.array) -> mx.array:
        """Return the term added to the output of a linear layer for x."""
        return self(x)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., I) -> (..., O); compute in the dtype of the weights, return that of `x`."""
        y = self.up(self.down(x.astype(self.down.weight.dtype)))
        return (y * self.scaling).astype(x.dtype)


class _LoRAProcessor(nn.Module):
    """Base of the LoRA processors: setting one puts its layers beside the projections as an adapter."""

    added_kv: bool
    base_processor: Callable[[], Any]

    def check(self, attn: Attention) -> None:
        """Raise ValueError where the layers have other shapes than the projections of `attn`."""
        for name, layer in attn.projections().items():
            lora = self[f"{name}_lora"]
            has = (lora.up.weight.shape[0], lora.down.weight.shape[1])
            base = layer.base if isinstance(layer, AdaptedLayer) else layer
            if has != weight_shape(base):
                raise ValueError(
                    f"{type(self).__name__}: {name}_lora maps {has[1]} channels to {has[0]}, the projection "
                    f"{weight_shape(base)[1]} to {weight_shape(base)[0]}; give hidden_size and "
                    "cross_attention_dim of this layer"
                )

    def put_beside(self, attn: Attention) -> Any:
        """Put the layers beside the projections of `attn` and return the processor to use there."""
        for name, layer in attn.projections().items():
            if not isinstance(layer, AdaptedLayer):
                layer = AdaptedLayer(layer)
                attn.replace_projection(name, layer)
            layer.branches[PROCESSORS] = self[f"{name}_lora"]
        return self.base_processor()


class LoRAAttnProcessor(_LoRAProcessor):
    """LoRA on the query, key, value and output projections of one `Attention`.

    Setting it makes its layers the adapter "processors" beside the projections of that `Attention`, where
    they stay until they are removed. `cross_attention_kwargs={"scale": s}` scales them; 0 gives the base
    network.

    Args:
        hidden_size: channels of the attention layer (`transformer_in`: 8 * attention_head_dim).
        cross_attention_dim: channels of its context; None for self-attention.
        rank, network_alpha: of each layer, see `LoRALinearLayer`.
        q_rank, v_rank, out_rank, q_hidden_size, v_hidden_size, out_hidden_size: where they differ.
    """

    added_kv = False
    base_processor: Callable[[], Any] = AttnProcessor

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        rank: int = 4,
        network_alpha: float | None = None,
        *,
        q_rank: int | None = None,
        v_rank: int | None = None,
        out_rank: int | None = None,
        q_hidden_size: int | None = None,
        v_hidden_size: int | None = None,
        out_hidden_size: int | None = None,
    ):
        super().__init__()

        def layer(size: int | None, own_rank: int | None, context: int | None = None):
            width = hidden_size if size is None else size
            inputs = width if context is None else context
            return LoRALinearLayer(inputs, width, rank if own_rank is None else own_rank, network_alpha)

        self.to_q_lora = layer(q_hidden_size, q_rank)
        self.to_k_lora = layer(None, None, cross_attention_dim)
        self.to_v_lora = layer(v_hidden_size, v_rank, cross_attention_dim)
        self.to_out_lora = layer(out_hidden_size, out_rank)
        self.hidden_size = hidden_size
        self.cross_attention_dim = cross_attention_dim
        self.rank = rank


class LoRAAttnProcessor2_0(LoRAAttnProcessor):
    """`LoRAAttnProcessor` over the fused attention."""

    base_processor = AttnProcessor2_0


class LoRAXFormersAttnProcessor(LoRAAttnProcessor):
    """`LoRAAttnProcessor2_0` under xformers' name; `attention_op` must be None."""

    base_processor = XFormersAttnProcessor

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        rank: int = 4,
        attention_op: Callable | None = None,
        network_alpha: float | None = None,
        **sizes: int | None,
    ):
        refuse_attention_op(attention_op)
        super().__init__(hidden_size, cross_attention_dim, rank, network_alpha, **sizes)


class LoRAAttnAddedKVProcessor(_LoRAProcessor):
    """LoRA on an `Attention` with added keys and values, `add_k_proj` and `add_v_proj` included."""

    added_kv = True
    base_processor = AttnAddedKVProcessor

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        rank: int = 4,
        network_alpha: float | None = None,
    ):
        super().__init__()
        context = hidden_size if cross_attention_dim is None else cross_attention_dim

        def layer(inputs: int) -> LoRALinearLayer:
            return LoRALinearLayer(inputs, hidden_size, rank, network_alpha)

        self.to_q_lora = layer(hidden_size)
        self.add_k_proj_lora = layer(context)
        self.add_v_proj_lora = layer(context)
        self.to_k_lora = layer(hidden_size)
        self.to_v_lora = layer(hidden_size)
        self.to_out_lora = layer(hidden_size)
        self.hidden_size = hidden_size
        self.cross_attention_dim = cross_attention_dim
        self.rank = rank


def lora_processor(attn: Attention) -> _LoRAProcessor | None:
    """Return the LoRA processor with the layers beside the projections of `attn`, of the class for the
    processor in use; None where there are no such layers."""
    layers = {
        f"{name}_lora": layer.branches[PROCESSORS]
        for name, layer in attn.projections().items()
        if isinstance(layer, AdaptedLayer) and PROCESSORS in layer.branches
    }
    if not layers:
        return None
    kinds = LoRAAttnAddedKVProcessor, LoRAXFormersAttnProcessor, LoRAAttnProcessor2_0
    base = attn.get_processor()
    base = getattr(base, "base", base)  # below an IP-Adapter
    kind = next((kind for kind in kinds if isinstance(base, kind.base_processor)), LoRAAttnProcessor)
    query = layers["to_q_lora"]
    context = layers["add_k_proj_lora" if attn.has_added_kv else "to_k_lora"].down.weight.shape[1]
    width = query.down.weight.shape[1]
    processor = kind.__new__(kind)  # without new layers, which would draw random numbers
    nn.Module.__init__(processor)
    for name, layer in layers.items():
        processor[name] = layer
    processor.hidden_size, processor.cross_attention_dim, processor.rank = width, context, query.rank
    return processor


class CustomDiffusionAttnProcessor(nn.Module):
    """Trained keys and values, and optionally query and output, for one layer (arXiv:2212.04488).

    In cross-attention, gradients do not flow into the first token's key and value.

    Args:
        train_kv, train_q_out: which projections the processor holds.
        hidden_size, cross_attention_dim: channels of the layer and of its context; needed for these
            projections.
        out_bias, dropout: of its output projection.
    """

    added_kv = False
    attention = staticmethod(explicit_attention)

    def __init__(
        self,
        train_kv: bool = True,
        train_q_out: bool = True,
        hidden_size: int | None = None,
        cross_attention_dim: int | None = None,
        out_bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if (train_kv or train_q_out) and hidden_size is None:
            raise ValueError("hidden_size=None: train_kv and train_q_out need the channels of the layer")
        context = hidden_size if cross_attention_dim is None else cross_attention_dim
        if train_kv:
            self.to_k_custom_diffusion = nn.Linear(context, hidden_size, bias=False)
            self.to_v_custom_diffusion = nn.Linear(context, hidden_size, bias=False)
        if train_q_out:
            self.to_q_custom_diffusion = nn.Linear(hidden_size, hidden_size, bias=False)
            out = nn.Linear(hidden_size, hidden_size, bias=out_bias)
            self.to_out_custom_diffusion = [out, nn.Dropout(dropout)]
        self.train_kv = train_kv
        self.train_q_out = train_q_out
        self.hidden_size = hidden_size
        self.cross_attention_dim = cross_attention_dim

    def __call__(
        self,
        attn: Attention,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array | TextContext | None = None,
        attention_mask: mx.array | None = None,
    ) -> mx.array:
        crossing = encoder_hidden_states is not None
        context = attn.norm_context(encoder_hidden_states) if crossing else hidden_states
        if self.train_kv:
            context = context.astype(self.to_k_custom_diffusion.weight.dtype)
            key = self.to_k_custom_diffusion(context).astype(hidden_states.dtype)
            value = self.to_v_custom_diffusion(context).astype(hidden_states.dtype)
        else:
            key, value = attn.to_k(context), attn.to_v(context)
        if crossing:
            key, value = map(_freeze_first_token, (key, value))
        if self.train_q_out:
            query = self.to_q_custom_diffusion(hidden_states).astype(hidden_states.dtype)
        else:
            query = attn.to_q(hidden_states)
        query, key, value = map(attn.split_heads, (query, key, value))
        y = attn.merge_heads(self.attention(attn, query, key, value, attention_mask))
        if not self.train_q_out:
            return attn.project_out(y)
        for layer in self.to_out_custom_diffusion:
            y = layer(y)
        return y.astype(hidden_states.dtype)


def _freeze_first_token(x: mx.array) -> mx.array:
    """x (B, L, E) -> the same, without gradients of the first token."""
    return mx.concatenate([mx.stop_gradient(x[:, :1]), x[:, 1:]], axis=1)


class CustomDiffusionAttnProcessor2_0(CustomDiffusionAttnProcessor):
    """`CustomDiffusionAttnProcessor` over the fused attention."""

    attention = staticmethod(fused_attention)


class CustomDiffusionXFormersAttnProcessor(CustomDiffusionAttnProcessor2_0):
    """The fused form under xformers' name, with its default `train_q_out=False`."""

    def __init__(
        self,
        train_kv: bool = True,
        train_q_out: bool = False,
        hidden_size: int | None = None,
        cross_attention_dim: int | None = None,
        out_bias: bool = True,
        dropout: float = 0.0,
        attention_op: Callable | None = None,
    ):
        refuse_attention_op(attention_op)
        super().__init__(train_kv, train_q_out, hidden_size, cross_attention_dim, out_bias, dropout)
