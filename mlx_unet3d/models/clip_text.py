"""CLIPTextModel: the text encoder of ModelScope text-to-video (OpenCLIP ViT-H) and of Stable
Diffusion.

Source: transformers' class of that name; Radford et al., arXiv:2103.00020. Letters: B batch, L
tokens, E = hidden_size.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import operations
from ..checkpoints import ModelConfig
from ..layers.normalization import LayerNorm
from ..operations import one_operation
from .adapters import LoRAMixin
from .pretrained import PretrainedModel

# Far above any network, and few enough to be built before the weights are held against it.
_MOST_LAYERS = 1000

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": one_operation(nn.gelu),  # the exact one, by erf
    "quick_gelu": one_operation(nn.gelu_fast_approx),  # x * sigmoid(1.702 x)
}


@dataclass
class CLIPTextConfig(ModelConfig):
    """The keys of `config.json` that shape the network; defaults are those of transformers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    # Of training, of the pooled output or of transformers itself.
    ignored_keys: ClassVar[frozenset[str]] = frozenset(
        (
            "architectures",
            "attention_dropout",
            "bos_token_id",
            "dropout",
            "dtype",
            "eos_token_id",
            "initializer_factor",
            "initializer_range",
            "model_type",
            "pad_token_id",
            "projection_dim",
            "torch_dtype",
            "transformers_version",
        )
    )

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not known; use one of {sorted(_ACTIVATIONS)}"
            )
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r} must be an integer of at least 1")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is above {_MOST_LAYERS}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}"
            )


class CLIPTextEmbeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, input_ids: mx.array) -> mx.array:
        """(B, L) -> (B, L, E)."""
        positions = mx.arange(input_ids.shape[1])
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class CLIPAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.heads = config.num_attention_heads
        self.scale = (width // self.heads) ** -0.5

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, E) -> (B, L, E)."""
        batch, length, width = x.shape
        query, key, value = (
            # (B, L, E) -> (B, heads, L, E / heads)
            proj(x).reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = operations.attention(query, key, value, scale=self.scale, mask="causal")
        # (B, heads, L, E / heads) -> (B, L, E)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(batch, length, width))


class CLIPMLP(nn.Module):
    """Two linears with the activation between."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a skip."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = [CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, num_layers: int) -> mx.array:
        """(B, L, E) through the first `num_layers` layers."""
        for layer in self.layers[:num_layers]:
            x = layer(x)
        return x


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and the final LayerNorm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, input_ids: mx.array, num_layers: int) -> mx.array:
        """(B, L) -> (B, L, E)."""
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), num_layers))


class CLIPTextModel(LoRAMixin, PretrainedModel):
    """Text states of token ids, for the cross-attention of a UNet; transformers' class of that
    name.

    Parameter names are those of the files on the hub (`text_model.encoder.layers.0...`). Files
    without the prefix `text_model.`, as transformers 5 writes them, load as well.

    Args:
        vocab_size: number of token ids.
        hidden_size: E, channels of the states; a multiple of `num_attention_heads`.
        intermediate_size: channels between the two linears of an MLP.
        num_hidden_layers, num_attention_heads: of the transformer.
        max_position_embeddings: the most tokens a text can have.
        hidden_act: "gelu" (by erf; OpenCLIP) or "quick_gelu" (OpenAI).
        layer_norm_eps: of all LayerNorms.

    Raises ValueError where these do not fit together.
    """

    config_class = CLIPTextConfig
    weights_stem = "model"
    class_names = ("CLIPTextModel",)
    lora_component = "text_encoder"

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=max_position_embeddings,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
        )
        self.text_model = CLIPTextTransformer(self.config)

    def __call__(self, input_ids: mx.array | np.ndarray, *, clip_skip: int | None = None) -> mx.array:
        """Text states of whole texts.

        Args:
            input_ids: integers (B, L) in [0, vocab_size), L <= max_position_embeddings. They are
                looked at before the forward, so this cannot be inside `mx.compile`.
            clip_skip: how many of the last layers to leave out, 0 to num_hidden_layers - 1; None
                for 0. As in diffusers, the final LayerNorm is applied all the same.

        Returns the states (B, L, E) after the final LayerNorm, in the dtype of the network.
        Raises ValueError for ids, lengths and `clip_skip` out of range, TypeError for ids not
        integers.
        """
        num_layers = self.config.num_hidden_layers
        skipped = 0 if clip_skip is None else clip_skip
        if isinstance(skipped, bool) or not isinstance(skipped, int):
            raise TypeError(f"clip_skip={clip_skip!r} must be an integer or None")
        if not 0 <= skipped < num_layers:
            raise ValueError(
                f"clip_skip={clip_skip} must be 0 to {num_layers - 1}: this text encoder has "
                f"{num_layers} layers and needs one of them"
            )
        return self.text_model(self._checked_ids(input_ids), num_layers - skipped)

    def set_token_embeddings(self, ids: Sequence[int], embeddings: mx.array) -> None:
        """Give token ids their embeddings (T, E); `vocab_size` grows to take in the largest id.

        Raises ValueError where the shape does not fit.
        """
        layer, width = self.text_model.embeddings.token_embedding, self.config.hidden_size
        if embeddings.shape != (len(ids), width):
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}; they must be {(len(ids), width)}")
        weight = layer.weight
        missing = max(ids) + 1 - weight.shape[0]
        if missing > 0:
            weight = mx.concatenate([weight, mx.zeros((missing, width), weight.dtype)])
        weight[mx.array(ids)] = embeddings.astype(weight.dtype)
        layer.weight = weight
        self.config = replace(self.config, vocab_size=weight.shape[0])

    def _checked_ids(self, input_ids: mx.array | np.ndarray) -> mx.array:
        ids = np.array(input_ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"input_ids must be integers, not {ids.dtype}")
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"input_ids has shape {ids.shape}; it must be (batch, tokens), not empty")
        longest = self.config.max_position_embeddings
        if ids.shape[1] > longest:
            raise ValueError(
                f"input_ids has {ids.shape[1]} tokens a text, more than this text encoder's "
                f"{longest} positions; truncate to max_length={longest} in the tokenizer"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"input_ids holds {wrong}, which is not in [0, vocab_size="
                f"{self.config.vocab_size}); is the tokenizer that of this text encoder?"
            )
        return mx.array(ids.astype(np.int32))

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Name of a file's tensor `key` here; None for what last hidden states do not need."""
        bare = key.removeprefix("text_model.")
        if bare in ("embeddings.position_ids", "text_projection.weight"):
            return None
        return f"text_model.{bare}"
