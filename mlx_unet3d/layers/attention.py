"""Attention, feed-forward and the transformer block.

`Attention` owns the projections; a processor (see `attention_processors`) decides how they are used,
as in diffusers. Shapes: B batch, S query tokens, L key tokens, D head dimension, E = heads * D.
"""

import inspect
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import cpu
from .activations import geglu
from .normalization import LayerNorm, group_norm
from .slicing import evaluate, in_sequence


class TextContext:
    """Text states (B, L, D) together with the keys and values that attention layers made of them.

    They depend on the prompt and the weights alone, so one context serves all denoising steps. Make a
    new one when weights change. Pass it wherever `encoder_hidden_states` is taken.
    """

    def __init__(self, states: mx.array):
        self.states = states
        self._projected: dict[tuple[int, float], tuple[Any, mx.array, mx.array]] = {}

    def keys_values(self, attn: "Attention", scale: float) -> tuple[mx.array, mx.array]:
        cache_key = (id(attn), scale)
        if cache_key not in self._projected:
            key, value = attn.project_keys_values(self.states, scale)
            self._projected[cache_key] = (attn, key, value)  # holds attn: its id stays taken
        return self._projected[cache_key][1:]

    def take_apart(self) -> tuple[mx.array, tuple[tuple[int, float], ...], list[list[mx.array]]]:
        """What `put_together` makes it of again, in constants and arrays as `mx.compile` takes them."""
        return self.states, tuple(self._projected), [list(made[1:]) for made in self._projected.values()]

    @classmethod
    def put_together(
        cls, states: mx.array, names: tuple[tuple[int, float], ...], projected: list[list[mx.array]]
    ) -> "TextContext":
        context = cls(states)
        context._projected = {name: (None, *made) for name, made in zip(names, projected, strict=True)}
        return context

    def of_sample(self, i: int) -> "TextContext":
        """The context of one sample, (1, L, D), which shares the keys and values of all."""
        return _SampleContext(self, i)


class _SampleContext(TextContext):
    def __init__(self, whole: TextContext, i: int):
        self.states = whole.states[i : i + 1]
        self._whole, self._row = whole, slice(i, i + 1)

    def keys_values(self, attn: "Attention", scale: float) -> tuple[mx.array, mx.array]:
        key, value = self._whole.keys_values(attn, scale)
        return key[self._row], value[self._row]


class Attention(nn.Module):
    """Multi-head attention with a replaceable processor; diffusers' class of that name.

    Args:
        query_dim: channels of the input and of the output.
        cross_attention_dim: channels of the context; None for self-attention.
        heads, dim_head: number of heads, and channels of each.
        bias, out_bias: biases of the q, k, v projections, and of the output projection.
        upcast_attention, upcast_softmax: scores, or their softmax, in fp32 (explicit processors only;
            softmax always accumulates in fp32 here, so the second changes the stored dtype only).
        cross_attention_norm: None, "layer_norm" or "group_norm" over the context.
        added_kv_proj_dim: channels of a second context whose keys and values are added (unCLIP).
        norm_num_groups: groups of a GroupNorm over the input; None for none.
        scale_qk: divide the scores by sqrt(dim_head).
        only_cross_attention: with `added_kv_proj_dim`, attend to the second context alone.
        eps, rescale_output_factor, residual_connection: of the group norm, and of the skip around all.
        processor: None for the fused one.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast_attention: bool = False,
        upcast_softmax: bool = False,
        cross_attention_norm: str | None = None,
        cross_attention_norm_num_groups: int = 32,
        added_kv_proj_dim: int | None = None,
        norm_num_groups: int | None = None,
        out_bias: bool = True,
        scale_qk: bool = True,
        only_cross_attention: bool = False,
        eps: float = 1e-5,
        rescale_output_factor: float = 1.0,
        residual_connection: bool = False,
        processor: Any = None,
    ):
        super().__init__()
        if only_cross_attention and added_kv_proj_dim is None:
            raise ValueError(
                "only_cross_attention=True needs added_kv_proj_dim: there is nothing else to attend to"
            )
        inner = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        if norm_num_groups is not None:
            self.group_norm = group_norm(norm_num_groups, query_dim, eps)
        if cross_attention_norm == "layer_norm":
            self.norm_cross = LayerNorm(context_dim)
        elif cross_attention_norm == "group_norm":
            channels = added_kv_proj_dim if added_kv_proj_dim is not None else context_dim
            self.norm_cross = group_norm(cross_attention_norm_num_groups, channels)
        elif cross_attention_norm is not None:
            raise ValueError(
                f"cross_attention_norm={cross_attention_norm!r} is not known; "
                "use None, 'layer_norm' or 'group_norm'"
            )
        self.to_q = nn.Linear(query_dim, inner, bias=bias)
        if not only_cross_attention:
            self.to_k = nn.Linear(context_dim, inner, bias=bias)
            self.to_v = nn.Linear(context_dim, inner, bias=bias)
        if added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(added_kv_proj_dim, inner)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, inner)
        self.to_out = [nn.Linear(inner, query_dim, bias=out_bias), nn.Dropout(dropout)]

        self.heads = heads
        self.dim_head = dim_head
        self.scale = 1 / math.sqrt(dim_head) if scale_qk else 1.0
        self.query_dim = query_dim
        self.cross_attention_dim = context_dim
        self.is_cross_attention = cross_attention_dim is not None
        self.has_added_kv = added_kv_proj_dim is not None
        self.only_cross_attention = only_cross_attention
        self.upcast_attention = upcast_attention
        self.upcast_softmax = upcast_softmax
        self.rescale_output_factor = rescale_output_factor
        self.residual_connection = residual_connection
        self.lora = None  # a LoRA processor whose layers are added to the projections

        from . import attention_processors as processors  # it imports this module

        if processor is None:
            default = processors.AttnAddedKVProcessor2_0 if self.has_added_kv else processors.AttnProcessor2_0
            processor = default()
        self.set_processor(processor)

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: "mx.array | TextContext | None" = None,
        attention_mask: mx.array | None = None,
        **cross_attention_kwargs: Any,
    ) -> mx.array:
        """Attend from (B, ..., query_dim) to the context (B, L, cross_attention_dim), or to itself.

        `attention_mask` is added to the scores: (B, 1, L) or (B, S, L), in the dtype of the input.
        Further keywords go to the processor. Returns the shape of `hidden_states`.
        """
        takes_context = getattr(self.processor, "takes_text_context", False)
        if isinstance(encoder_hidden_states, TextContext) and not takes_context:
            encoder_hidden_states = encoder_hidden_states.states
        self._check_keywords(cross_attention_kwargs)
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **cross_attention_kwargs,
        )

    def _check_keywords(self, keywords: dict[str, Any]) -> None:
        if not keywords:
            return
        known = inspect.signature(self.processor.__call__).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            raise TypeError(
                f"cross_attention_kwargs has {unknown}, which {type(self.processor).__name__} "
                f"does not take; it takes {sorted(set(known) - _PROCESSOR_ARGUMENTS)}"
            )

    # The pieces that processors are made of.

    def project(self, name: str, x: mx.array, scale: float = 1.0) -> mx.array:
        """`to_q`, `to_k`, `to_v`, `to_out`, `add_k_proj` or `add_v_proj`, with LoRA where there is one."""
        linear = self.to_out[0] if name == "to_out" else self[name]
        y = linear(x)
        return y if self.lora is None else y + self.lora.delta(name, x, scale)

    def project_keys_values(
        self, context: "mx.array | TextContext", scale: float = 1.0
    ) -> tuple[mx.array, mx.array]:
        """Keys and values (B, L, E) of a context (B, L, C), once only where it is a TextContext."""
        if isinstance(context, TextContext):
            return context.keys_values(self, scale)
        context = self.norm_context(context)
        if "to_kv" in self and self.lora is None:
            return tuple(mx.split(self.to_kv(context), 2, axis=-1))
        return self.project("to_k", context, scale), self.project("to_v", context, scale)

    def norm_context(self, context: mx.array) -> mx.array:
        return self.norm_cross(context) if "norm_cross" in self else context

    def project_out(self, x: mx.array, scale: float = 1.0) -> mx.array:
        return self.to_out[1](self.project("to_out", x, scale))

    def split_heads(self, x: mx.array) -> mx.array:
        """(B, L, E) -> (B, heads, L, D), a view."""
        batch, length, _ = x.shape
        return x.reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)

    @staticmethod
    def merge_heads(x: mx.array) -> mx.array:
        """(B, heads, L, D) -> (B, L, E)."""
        batch, heads, length, dim = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * dim)

    def attention_probs(self, query: mx.array, key: mx.array, mask: mx.array | None) -> mx.array:
        """Softmax of the scaled scores of (..., S, D) and (..., L, D), plus `mask` -> (..., S, L)."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.astype(mx.float32), key.astype(mx.float32)
        # The query is scaled, not the scores: half precision has less room for those.
        scores = (query * self.scale) @ key.swapaxes(-1, -2)
        if mask is not None:
            scores = scores + mask.astype(scores.dtype)
        if self.upcast_softmax:
            scores = scores.astype(mx.float32)
        return mx.softmax(scores, axis=-1, precise=True).astype(dtype)

    # Processors.

    def set_processor(self, processor: Any, _remove_lora: bool = False) -> None:
        """Use `processor`. A LoRA processor adds its layers to the projections, and they stay active under
        later processors until `_remove_lora=True`, as in diffusers 0.23."""
        if getattr(processor, "added_kv", self.has_added_kv) != self.has_added_kv:
            needs = "needs" if not self.has_added_kv else "does not know"
            raise ValueError(
                f"{type(processor).__name__} {needs} an Attention built with added_kv_proj_dim; "
                "this one was built " + ("with" if self.has_added_kv else "without")
            )
        if _remove_lora:
            self.lora = None
        if hasattr(processor, "delta"):
            self.lora = processor
            processor = processor.base_processor()
        self.processor = processor

    def get_processor(self) -> Any:
        """The processor in use; the LoRA processor where there is one."""
        return self.processor if self.lora is None else self.lora

    def fuse_projections(self) -> None:
        """Put q, k, v (self-attention) or k, v (cross-attention) into one matrix product."""
        names = ("to_k", "to_v") if self.is_cross_attention else ("to_q", "to_k", "to_v")
        parts = [self[name] for name in names]
        if any("scales" in part for part in parts):
            raise ValueError("quantized projections cannot be fused; fuse them before quantizing")
        if any("branches" in part for part in parts):
            raise ValueError("projections with adapters cannot be fused; fuse and unload the adapters first")
        weight = mx.concatenate([part.weight for part in parts])
        fused = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in parts[0])
        fused.weight = weight
        if "bias" in parts[0]:
            fused.bias = mx.concatenate([part.bias for part in parts])
        if self.is_cross_attention:
            self.to_kv = fused
        else:
            self.to_qkv = fused
        mx.eval(fused.parameters())

    def unfuse_projections(self) -> None:
        """Back to separate products."""
        self.pop("to_qkv", None)
        self.pop("to_kv", None)


_PROCESSOR_ARGUMENTS = {"attn", "hidden_states", "encoder_hidden_states", "attention_mask"}


class GEGLU(nn.Module):
    """Linear to twice the width, one half gating the other through GELU (arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.proj(x), 2, axis=-1)
        return geglu(value, gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; diffusers' class with its default activation."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = [GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)]

    def __call__(self, x: mx.array) -> mx.array:
        # Unlike a GPU, the CPU gains by keeping what lies between the products in its cache.
        rows = max(512, 2 * cpu.PIECE // (8 * x.shape[-1])) if cpu.active(x) else x.size
        return cpu.in_rows(self._all, x, rows)

    def _all(self, x: mx.array) -> mx.array:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and around a skip.

    `cross_attention_dim` None with `double_self_attention`: the second attention looks at the input as
    well; without: there is no second attention. diffusers' class of that name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        cross_attention_dim: int | None = None,
        double_self_attention: bool = False,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, None, heads, dim_head)
        if cross_attention_dim is not None or double_self_attention:
            self.norm2 = LayerNorm(dim)
            context_dim = None if double_self_attention else cross_attention_dim
            self.attn2 = Attention(dim, context_dim, heads, dim_head)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.chunk_size: int | None = None
        self.chunk_dim = 0

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Run the feed-forward on pieces of `chunk_size` along axis `dim`; None for all at once."""
        self.chunk_size, self.chunk_dim = chunk_size, dim

    def __call__(
        self,
        x: mx.array,
        context: mx.array | TextContext | None = None,
        context_mask: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        blockwise: bool = False,
    ) -> mx.array:
        """(N, S, C) and a context (B, L, D) with B dividing N -> (N, S, C).

        `context_mask` (B, 1, L) is added to the scores of the second attention; `blockwise` evaluates after
        each attention.
        """
        keywords = cross_attention_kwargs or {}
        x = x + self.attn1(self.norm1(x), **keywords)
        if blockwise:
            evaluate(x)
        if "attn2" in self:
            x = x + self._second_attention(self.norm2(x), context, context_mask, keywords)
        if blockwise:
            evaluate(x)
        return x + self._feed_forward(self.norm3(x))

    def _second_attention(
        self,
        x: mx.array,
        context: mx.array | TextContext | None,
        context_mask: mx.array | None,
        keywords: dict[str, Any],
    ) -> mx.array:
        if context is None or not self.attn2.is_cross_attention:
            return self.attn2(x, **keywords)
        states = context.states if isinstance(context, TextContext) else context
        # (N, S, C) -> (B, F*S, C): all frames of a sample ask the same keys
        query = x.reshape(states.shape[0], -1, x.shape[-1])
        return self.attn2(query, context, context_mask, **keywords).reshape(x.shape)

    def _feed_forward(self, x: mx.array) -> mx.array:
        if self.chunk_size is None:
            return self.ff(x)
        length = x.shape[self.chunk_dim]
        if length % self.chunk_size:
            raise ValueError(
                f"forward chunking: axis {self.chunk_dim} has {length} entries here, not a multiple of "
                f"chunk_size={self.chunk_size}; call enable_forward_chunking with a divisor of it"
            )
        pieces = mx.split(x, length // self.chunk_size, axis=self.chunk_dim)
        return mx.concatenate(in_sequence(self.ff, ([p] for p in pieces)), axis=self.chunk_dim)
