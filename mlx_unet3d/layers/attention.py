"""Multi-head attention: the projections, and the processor that computes with them.

`Attention` owns the projections; a processor (see `attention_processors`) computes attention, as in
diffusers. Shapes: B batch, S query tokens, L key tokens, D head dimension, E = heads * D.
"""

import inspect
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapted import PROCESSORS, AdaptedLayer, scaled_adapters
from .attention_processors import AttnAddedKVProcessor2_0, AttnProcessor, AttnProcessor2_0
from .normalization import LayerNorm, group_norm
from .text_context import TextContext


class Attention(nn.Module):
    """Multi-head attention with a replaceable processor; diffusers' class of that name.

    Args:
        query_dim: channels of the input and of the output.
        cross_attention_dim: channels of the context; None for self-attention.
        heads, dim_head: number of heads, and channels of each.
        bias, out_bias: biases of the q, k, v projections, and of the output projection.
        upcast_attention, upcast_softmax: compute scores, or their softmax, in fp32 (explicit processors only;
            softmax always accumulates in fp32 here, so `upcast_softmax` only changes the stored dtype).
        cross_attention_norm: None, "layer_norm" or "group_norm" over the context.
        added_kv_proj_dim: channels of a second context whose keys and values are added (unCLIP).
        norm_num_groups: groups of a GroupNorm over the input; None for none.
        scale_qk: divide the scores by sqrt(dim_head).
        only_cross_attention: with `added_kv_proj_dim`, attend to the second context alone.
        eps, rescale_output_factor, residual_connection: of the group norm, and of the skip around the layer.
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
        self.padding = "auto"  # see `AttentionControl.set_attention_padding`

        if processor is None:
            processor = AttnAddedKVProcessor2_0() if self.has_added_kv else AttnProcessor2_0()
        self.set_processor(processor)

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array | TextContext | None = None,
        attention_mask: mx.array | None = None,
        **cross_attention_kwargs: Any,
    ) -> mx.array:
        """Attend from (B, ..., query_dim) to the context (B, L, cross_attention_dim), or to itself.

        `attention_mask` (B, 1, L) or (B, S, L), in the dtype of the input, is added to the scores. Other
        keywords go to the processor; `scale` multiplies adapters. Returns the shape of `hidden_states`.
        """
        takes_context = getattr(self.processor, "takes_text_context", False)
        if isinstance(encoder_hidden_states, TextContext) and not takes_context:
            encoder_hidden_states = encoder_hidden_states.states
        with scaled_adapters(cross_attention_kwargs.get("scale")):
            return self.processor(
                self,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **self._keywords(cross_attention_kwargs),
            )

    def _keywords(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords for the processor; `scale` only if it takes that, for its own computation."""
        if not keywords:
            return keywords
        known = inspect.signature(self.processor.__call__).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return {name: value for name, value in keywords.items() if name in known or name != "scale"}
        unknown = sorted(set(keywords) - set(known) - {"scale"})
        if unknown:
            raise TypeError(
                f"cross_attention_kwargs has {unknown}, which {type(self.processor).__name__} "
                f"does not take; it takes {sorted({*known, 'scale'} - _PROCESSOR_ARGUMENTS)}"
            )
        return {name: value for name, value in keywords.items() if name in known}

    # Parts of the computation, for processors.

    def project_keys_values(self, context: mx.array | TextContext) -> tuple[mx.array, mx.array]:
        """Return keys and values (B, L, E) of a context (B, L, C); a `TextContext` projects them only
        once."""
        if isinstance(context, TextContext):
            return context.keys_values(self)
        context = self.norm_context(context)
        if self.uses_fused("to_kv"):
            return tuple(mx.split(self.to_kv(context), 2, axis=-1))
        return self.to_k(context), self.to_v(context)

    def uses_fused(self, name: str) -> bool:
        """Return True if the layer has a `to_qkv` or `to_kv`, and no adapters beside the projections in
        it."""
        return name in self and not any(isinstance(self[part], AdaptedLayer) for part in _FUSED[name])

    @property
    def one_token_is_linear(self) -> bool:
        """Return True if `of_one_token` computes attention to a single token: for softmax attention without
        extras."""
        return (
            getattr(self.processor, "attends_to_text_alone", False)
            and not self.residual_connection
            and self.rescale_output_factor == 1
        )

    def of_one_token(self, context: mx.array | TextContext) -> mx.array:
        """Attend to a context (B, 1, C), with the same result (B, 1, query_dim) for every query."""
        return self.project_out(self.project_keys_values(context)[1])

    def norm_context(self, context: mx.array) -> mx.array:
        return self.norm_cross(context) if "norm_cross" in self else context

    def project_out(self, x: mx.array) -> mx.array:
        return self.to_out[1](self.to_out[0](x))

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
        """(..., S, D) and (..., L, D) -> softmax (..., S, L) of the scaled scores plus `mask`."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.astype(mx.float32), key.astype(mx.float32)
        # Scale the query, not the scores, which could overflow in half precision.
        scores = (query * self.scale) @ key.swapaxes(-1, -2)
        if mask is not None:
            scores = scores + mask.astype(scores.dtype)
        if self.upcast_softmax:
            scores = scores.astype(mx.float32)
        return mx.softmax(scores, axis=-1, precise=True).astype(dtype)

    # Processors.

    def set_processor(self, processor: Any, _remove_lora: bool = False) -> None:
        """Use `processor`.

        The layers of a LoRA processor become an adapter beside the projections, and its base processor is
        used. They stay when the processor is replaced, until `_remove_lora=True`, as in diffusers 0.23. An
        IP-Adapter also stays, on top of `processor`. Raises ValueError as `check_processor`.
        """
        self.check_processor(processor, _remove_lora)
        for name, layer in self.projections().items() if _remove_lora else ():
            if isinstance(layer, AdaptedLayer):
                layer.branches.pop(PROCESSORS, None)
                if not layer.branches:
                    self.replace_projection(name, layer.base)
        if hasattr(processor, "put_beside"):
            processor = processor.put_beside(self)
        current = getattr(self, "processor", None)
        if hasattr(current, "standing_on") and not hasattr(processor, "standing_on"):
            processor = current.standing_on(processor)
        self.processor = processor

    def check_processor(self, processor: Any, _remove_lora: bool = False) -> None:
        """Raise ValueError for a processor that does not suit this layer, or LoRA while adapters are
        fused."""
        if getattr(processor, "added_kv", self.has_added_kv) != self.has_added_kv:
            needs = "needs" if not self.has_added_kv else "does not know"
            raise ValueError(
                f"{type(processor).__name__} {needs} an Attention built with added_kv_proj_dim; "
                "this one was built " + ("with" if self.has_added_kv else "without")
            )
        if hasattr(processor, "check"):
            processor.check(self)
        elif not isinstance(processor, AttnProcessor) and hasattr(self.get("processor"), "standing_on"):
            raise ValueError(
                f"{type(processor).__name__} does not know the IP-Adapter that is loaded; call "
                "unload_ip_adapter first"
            )
        layers = [layer for layer in self.projections().values() if isinstance(layer, AdaptedLayer)]
        changed = hasattr(processor, "put_beside") or (
            _remove_lora and any(PROCESSORS in layer.branches for layer in layers)
        )
        if changed and any(layer.fused for layer in layers):
            raise ValueError("adapters are fused; call unfuse_lora before you set or remove LoRA processors")

    def get_processor(self) -> Any:
        """Return the processor in use; for LoRA, its base."""
        return self.processor

    def projections(self) -> dict[str, nn.Module]:
        """ "to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj", those that there are."""
        found = {name: self[name] for name in _PROJECTIONS if name in self}
        return found | {"to_out": self.to_out[0]}

    def replace_projection(self, name: str, layer: nn.Module) -> None:
        """Replace the layer of one of `projections`."""
        if name == "to_out":
            self.to_out[0] = layer
        else:
            self[name] = layer

    def fuse_projections(self) -> None:
        """Fuse q, k, v (self-attention) or k, v (cross-attention) into one matrix product."""
        names = _FUSED["to_kv" if self.is_cross_attention else "to_qkv"]
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
        """Undo `fuse_projections`."""
        self.pop("to_qkv", None)
        self.pop("to_kv", None)


_FUSED = {"to_kv": ("to_k", "to_v"), "to_qkv": ("to_q", "to_k", "to_v")}
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj")
_PROCESSOR_ARGUMENTS = {"attn", "hidden_states", "encoder_hidden_states", "attention_mask"}
