"""Processors compute attention: explicit, fused, sliced, and with added keys and values.

A processor is called as `processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None)`
with (B, S, C) or (B, H, W, C) states and returns their shape. Names and meanings are those of
diffusers' `models/attention_processor.py`; the xformers names run MLX's fused attention. `attn` is an
`Attention`, which imports this module.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import cpu, operations
from ..scalars import as_count
from .chunking import in_sequence, ranges
from .text_context import TextContext

FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)
"""Channels of a head for which Metal has an attention kernel that keeps no scores; MLX 0.32."""

PADDINGS = ("auto", "always", "never")

# "auto" pads above this number of keys: with fewer, writing the scores costs less than wider heads.
_KEYS_IN_MEMORY = 256
# Up to this number of queries, Metal uses another kernel with other widths.
_FEW_QUERIES = 8

# Number of scores after which slices are evaluated, and the most that the CPU holds: 16 MB in fp32.
_SCORES_AT_ONCE = 2**22


def explicit_attention(
    attn: Any, query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None
) -> mx.array:
    """Compute softmax attention of (B, heads, S, D) with all scores in memory; `mask` (B, 1 or S, L)."""
    if mask is not None:
        mask = mask[:, None]  # over heads
    return attn.attention_probs(query, key, mask) @ value


def fused_attention(
    attn: Any, query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None
) -> mx.array:
    """Compute the same by `mx.fast.scaled_dot_product_attention`.

    The CPU has no fused kernel and takes a few rows of the batch at a time to limit the scores in memory.
    Heads are padded with zeros as `set_attention_padding` says, which does not change the result.
    """
    if mask is not None:
        mask = mask[:, None].astype(query.dtype)
    dim = query.shape[-1]
    wider = padded_head_dim(attn.padding, dim, query.shape[2], key.shape[2])
    if wider != dim:
        query, key, value = (mx.pad(x, [(0, 0)] * 3 + [(0, wider - dim)]) for x in (query, key, value))
    y = _fused_attention(attn, query, key, value, mask)
    return y if wider == dim else y[..., :dim]


def padded_head_dim(padding: str, dim: int, queries: int, keys: int) -> int:
    """Return the width to which heads of `dim` channels are padded, see `set_attention_padding`."""
    if padding == "auto" and (cpu.chosen() or keys <= _KEYS_IN_MEMORY or queries <= _FEW_QUERIES):
        return dim
    if padding == "never" or dim in FUSED_HEAD_DIMS:
        return dim
    return next((wider for wider in FUSED_HEAD_DIMS if wider > dim), dim)


def _fused_attention(
    attn: Any, query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None
) -> mx.array:
    if cpu.active(query):
        return cpu.attention(query, key, value, attn.scale, mask)

    def attend(query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None = None) -> mx.array:
        return operations.attention(query, key, value, scale=attn.scale, mask=mask)

    states = [query, key, value] if mask is None else [query, key, value, mask]
    batch, heads, queries, _ = query.shape
    rows = max(1, _SCORES_AT_ONCE // (heads * queries * key.shape[2]))
    if rows >= batch or not cpu.chosen():
        return attend(*states)
    return mx.concatenate(in_sequence(attend, ([x[r] for x in states] for r in ranges(batch, rows)), None))


class SlicedAttention:
    """Explicit attention on `slice_size` of the B * heads matrices at a time; the last slice may be
    smaller."""

    def __init__(self, slice_size: int):
        self.slice_size = as_count("slice_size", slice_size)

    def __call__(
        self,
        attn: Any,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        mask: mx.array | None,
    ) -> mx.array:
        batch, heads, queries, dim = query.shape
        if mask is not None:
            mask = mx.repeat(mask, heads, axis=0)  # (B, 1, L) -> (B * heads, 1, L)
        # (B, heads, L, D) -> (B * heads, L, D)
        query, key, value = (x.reshape(batch * heads, -1, dim) for x in (query, key, value))

        def of_slice(
            query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None = None
        ) -> mx.array:
            return attn.attention_probs(query, key, mask) @ value

        states = [query, key, value] if mask is None else [query, key, value, mask]
        starts = range(0, batch * heads, self.slice_size)
        slices = ([x[start : start + self.slice_size] for x in states] for start in starts)
        every = max(1, _SCORES_AT_ONCE // (self.slice_size * queries * key.shape[1]))
        done = in_sequence(of_slice, slices, every)
        return mx.concatenate(done).reshape(batch, heads, queries, dim)


class AttnProcessor:
    """Explicit scores and softmax; honours `upcast_attention` and `upcast_softmax`."""

    added_kv = False
    takes_text_context = True
    attends_to_text_alone = True
    attention = staticmethod(explicit_attention)

    def __call__(
        self,
        attn: Any,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array | TextContext | None = None,
        attention_mask: mx.array | None = None,
    ) -> mx.array:
        x = hidden_states.reshape(hidden_states.shape[0], -1, hidden_states.shape[-1])  # (B, S, C)
        if "group_norm" in attn:
            x = attn.group_norm(x)
        if encoder_hidden_states is None and attn.uses_fused("to_qkv"):
            query, key, value = mx.split(attn.to_qkv(x), 3, axis=-1)
        else:
            context = x if encoder_hidden_states is None else encoder_hidden_states
            query = attn.to_q(x)
            key, value = attn.project_keys_values(context)
        y = self._attend(attn, query, key, value, attention_mask)
        y = self._add_images(attn, query, encoder_hidden_states, y)
        y = attn.project_out(y).reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor

    def _attend(
        self, attn: Any, query: mx.array, key: mx.array, value: mx.array, mask: mx.array | None = None
    ) -> mx.array:
        """(B, S, E), twice (B, L, E) -> (B, S, E)."""
        query, key, value = map(attn.split_heads, (query, key, value))
        return attn.merge_heads(self.attention(attn, query, key, value, mask))

    def _add_images(
        self, attn: Any, query: mx.array, context: mx.array | TextContext | None, y: mx.array
    ) -> mx.array:
        """Return the attention y (B, S, E) to the text plus the attention to images."""
        return y


class AttnProcessor2_0(AttnProcessor):
    """The default: MLX's fused attention, which never holds the scores in memory on a GPU. It accumulates in
    fp32, so the upcast flags have no effect."""

    attention = staticmethod(fused_attention)


class FusedAttnProcessor2_0(AttnProcessor2_0):
    """The fused attention on fused projections; set by `fuse_qkv_projections`."""


class SlicedAttnProcessor(AttnProcessor):
    """The explicit attention, `slice_size` (>= 1) of the batch * heads score matrices at a time."""

    def __init__(self, slice_size: int):
        self.attention = SlicedAttention(slice_size)

    @property
    def slice_size(self) -> int:
        return self.attention.slice_size


class AttnAddedKVProcessor:
    """Puts keys and values of a second context before those of the input, and adds the skip (unCLIP)."""

    added_kv = True
    attention = staticmethod(explicit_attention)

    def __call__(
        self,
        attn: Any,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array | None = None,
        attention_mask: mx.array | None = None,
    ) -> mx.array:
        x = hidden_states.reshape(hidden_states.shape[0], -1, hidden_states.shape[-1])  # (B, S, C)
        context = x if encoder_hidden_states is None else attn.norm_context(encoder_hidden_states)
        if "group_norm" in attn:
            x = attn.group_norm(x)
        query = attn.to_q(x)
        key = attn.add_k_proj(context)
        value = attn.add_v_proj(context)
        if not attn.only_cross_attention:
            # (B, L, E) and (B, S, E) -> (B, L + S, E)
            key = mx.concatenate([key, attn.to_k(x)], axis=1)
            value = mx.concatenate([value, attn.to_v(x)], axis=1)
        query, key, value = map(attn.split_heads, (query, key, value))
        y = attn.merge_heads(self.attention(attn, query, key, value, attention_mask))
        return attn.project_out(y).reshape(hidden_states.shape) + hidden_states


class AttnAddedKVProcessor2_0(AttnAddedKVProcessor):
    """The fused form of `AttnAddedKVProcessor`."""

    attention = staticmethod(fused_attention)


class SlicedAttnAddedKVProcessor(AttnAddedKVProcessor):
    """The sliced form of `AttnAddedKVProcessor`."""

    def __init__(self, slice_size: int):
        self.attention = SlicedAttention(slice_size)

    @property
    def slice_size(self) -> int:
        return self.attention.slice_size


def refuse_attention_op(attention_op: Callable | None) -> None:
    """Raise ValueError for an operator of xformers, which does not exist here."""
    if attention_op is not None:
        raise ValueError(
            f"attention_op={attention_op!r}: xformers operators do not run on MLX; leave it None to use "
            "MLX's fused attention"
        )


class XFormersAttnProcessor(AttnProcessor2_0):
    """The fused attention under xformers' name; `attention_op` must be None."""

    def __init__(self, attention_op: Callable | None = None):
        refuse_attention_op(attention_op)


class XFormersAttnAddedKVProcessor(AttnAddedKVProcessor2_0):
    """The fused added-KV attention under xformers' name; `attention_op` must be None."""

    def __init__(self, attention_op: Callable | None = None):
        refuse_attention_op(attention_op)


def processor_path(attention_path: str) -> str:
    """Return the key of an attention layer's processor in `attn_processors`."""
    return f"{attention_path}.processor"


Processor = Any
"""A callable as described at the top of this file."""
