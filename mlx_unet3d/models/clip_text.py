"""CLIPTextModel and CLIPTextModelWithProjection: the text encoders of ModelScope text-to-video, Stable
Diffusion and SDXL.

Source: transformers' classes of these names; Radford et al., arXiv:2103.00020. Letters: B batch, L tokens,
E = hidden_size, P = projection_dim.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.config import ModelConfig, key
from ..layers.clip import ACTIVATIONS, CLIPEncoder
from ..layers.normalization import LayerNorm
from ..scalars import as_python
from .adapters import LoRAMixin
from .outputs import ModelOutput
from .pretrained import PretrainedModel

# Far above any network, and few enough to be built before the weights are compared with them.
_MOST_LAYERS = 1000

CLIP_IGNORED_KEYS = frozenset(
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
"""Keys of training, of the pooled output or of transformers itself."""


def check_clip_config(config: Any) -> None:
    """Raise ValueError where the numbers of a text or image encoder contradict each other."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not known; use one of {sorted(ACTIVATIONS)}")
    if config.num_hidden_layers > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={config.num_hidden_layers} is above {_MOST_LAYERS}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} does not divide "
            f"hidden_size={config.hidden_size}"
        )


@dataclass
class CLIPTextConfig(ModelConfig):
    """The keys of `config.json` that shape the network; defaults are those of transformers."""

    vocab_size: int = key(49408, "number of token ids", least=1)
    hidden_size: int = key(512, "E, channels of the states; a multiple of `num_attention_heads`", least=1)
    intermediate_size: int = key(2048, "channels between the two linears of an MLP", least=1)
    num_hidden_layers: int = key(12, "layers of the transformer", least=1)
    num_attention_heads: int = key(8, "heads of a layer", least=1)
    max_position_embeddings: int = key(77, "the most tokens a text can have", least=1)
    hidden_act: str = key("quick_gelu", '"gelu" (by erf; OpenCLIP) or "quick_gelu" (OpenAI)')
    layer_norm_eps: float = key(1e-5, "of all LayerNorms")

    ignored_keys: ClassVar[frozenset[str]] = CLIP_IGNORED_KEYS

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """See `ModelConfig.from_dict`; takes the text part of a complete CLIP's config."""
        part = config.get("text_config")
        return super().from_dict(part if isinstance(part, Mapping) else config)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip_config(self)


@dataclass
class CLIPTextWithProjectionConfig(CLIPTextConfig):
    """The keys of `config.json` of a text encoder with a projection; defaults are those of transformers."""

    projection_dim: int = key(512, "P, channels of the embedding of a text", least=1)
    eos_token_id: int = key(
        49407,
        "the token whose first occurrence gives the embedding of a text; 2, which older files have for any "
        "tokenizer, stands for the largest id of a text",
        least=0,
    )


@dataclass
class CLIPTextModelOutput(ModelOutput):
    """States of texts.

    Attributes:
        text_embeds: (B, P) from a network with projection; None from others.
        last_hidden_state: (B, L, E), after the final LayerNorm.
        hidden_states: (B, L, E) after the embeddings and after each layer, before the final LayerNorm; None
            unless `output_hidden_states`.
    """

    text_embeds: mx.array | None
    last_hidden_state: mx.array
    hidden_states: tuple[mx.array, ...] | None = None


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


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and the final LayerNorm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_act,
            config.layer_norm_eps,
            causal=True,
        )
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, input_ids: mx.array, num_layers: int | None = None) -> mx.array:
        """(B, L) -> (B, L, E) after the first `num_layers` layers, all by default."""
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), num_layers))

    def with_hidden_states(
        self, input_ids: mx.array, num_layers: int | None = None
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Return the same, and the states (B, L, E) after the embeddings and each layer, before the norm."""
        states = self.encoder.hidden_states(self.embeddings(input_ids))
        return self.final_layer_norm(states[-1 if num_layers is None else num_layers]), states


class _CLIPTextEncoder(LoRAMixin, PretrainedModel):
    """A text encoder under the parameter names of the files on the hub (`text_model.encoder.layers.0...`)."""

    weights_stem = "model"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_model = CLIPTextTransformer(self.config)

    def set_token_embeddings(self, ids: Sequence[int], embeddings: mx.array) -> None:
        """Set the embeddings (T, E) of token ids; `vocab_size` grows to include the largest id.

        Raises ValueError for another shape.
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

    def _checked_ids(self, input_ids: mx.array | np.ndarray) -> np.ndarray:
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
        return ids.astype(np.int32)

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Return the parameter name of a file's tensor `key`; None for position ids, no parameters."""
        bare = key.removeprefix("text_model.")
        return None if bare == "embeddings.position_ids" else f"text_model.{bare}"


class CLIPTextModel(_CLIPTextEncoder):
    """Text states of token ids, for the cross-attention of a UNet; transformers' class of that name.

    Files without the prefix `text_model.`, as transformers 5 writes them, load as well, and those of a
    network with projection without their projection.

    Raises ValueError where the numbers of its config do not fit together.
    """

    config_class = CLIPTextConfig
    class_names = ("CLIPTextModel", "CLIPModel")
    lora_component = "text_encoder"

    def __call__(
        self,
        input_ids: mx.array | np.ndarray,
        *,
        clip_skip: int | None = None,
        output_hidden_states: bool = False,
    ) -> mx.array | CLIPTextModelOutput:
        """Return the states of texts.

        Args:
            input_ids: integers (B, L) in [0, vocab_size), L <= max_position_embeddings. They are checked
                before the forward, which `mx.compile` does not allow.
            clip_skip: number of last layers to leave out, 0 to num_hidden_layers - 1; None for 0. As in
                diffusers, the final LayerNorm is applied anyway.
            output_hidden_states: also return the states of all layers, which SDXL uses.

        Returns the states (B, L, E) after the final LayerNorm, in the dtype of the network; as a
        `CLIPTextModelOutput` with `output_hidden_states`.
        Raises ValueError for ids, lengths and `clip_skip` out of range, TypeError for ids that are not
        integers.
        """
        num_layers = self.config.num_hidden_layers
        skipped = 0 if clip_skip is None else as_python(clip_skip)
        if isinstance(skipped, bool) or not isinstance(skipped, int):
            raise TypeError(f"clip_skip={clip_skip!r} must be an integer or None")
        if not 0 <= skipped < num_layers:
            raise ValueError(
                f"clip_skip={clip_skip} must be 0 to {num_layers - 1}: this text encoder has "
                f"{num_layers} layers and needs one of them"
            )
        ids = mx.array(self._checked_ids(input_ids))
        if not output_hidden_states:
            return self.text_model(ids, num_layers - skipped)
        return CLIPTextModelOutput(None, *self.text_model.with_hidden_states(ids, num_layers - skipped))

    def other_layer_names(self, paths: Collection[str]) -> dict[str, str]:
        """Return the names of layers in transformers 5, OpenCLIP, the web UI and diffusers' first text
        LoRAs."""
        made = {}
        for path in paths:
            bare = path.removeprefix("text_model.")
            block = bare.replace("encoder.layers.", "resblocks.").replace(".self_attn.", ".attn.")
            original = block.replace(".mlp.fc1", ".mlp.c_fc").replace(".mlp.fc2", ".mlp.c_proj")
            processor = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", path)
            names = bare, block, original, f"transformer.{block}", f"transformer.{original}", processor
            made |= dict.fromkeys((*names, processor.removeprefix("text_model.")), path)
        return made

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Return the parameter name of a file's tensor `key`; None for tensors that last hidden states do not
        need."""
        if key.startswith(("vision_model.", "visual_projection.")) or key == "logit_scale":  # of a full CLIP
            return None
        projection = key.removeprefix("text_model.").startswith("text_projection.")
        return None if projection else super().rename_key(key, keys)


class CLIPTextModelWithProjection(_CLIPTextEncoder):
    """SDXL's second text encoder: states of texts and an embedding of each; transformers' class of that name.

    Raises ValueError where the numbers of its config do not fit together.
    """

    config_class = CLIPTextWithProjectionConfig
    class_names = ("CLIPTextModelWithProjection",)
    lora_component = "text_encoder_2"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def __call__(
        self, input_ids: mx.array | np.ndarray, *, output_hidden_states: bool = False
    ) -> CLIPTextModelOutput:
        """Return the states and embeddings of texts.

        Args:
            input_ids: integers (B, L), see `CLIPTextModel`. The embedding comes from the first token with
                `eos_token_id`, or from the first token of the text if it has none; with `eos_token_id` 2,
                from the largest id, which a learned token beyond the vocabulary would be.
            output_hidden_states: also return the states of all layers.

        Raises ValueError for ids and lengths out of range, TypeError for ids that are not integers.
        """
        ids = self._checked_ids(input_ids)
        eos = self.config.eos_token_id
        places = (ids if eos == 2 else ids == eos).argmax(axis=1)  # the first of several
        if output_hidden_states:
            last, states = self.text_model.with_hidden_states(mx.array(ids))
        else:
            last, states = self.text_model(mx.array(ids)), None
        pooled = last[mx.arange(len(ids)), mx.array(places)]  # (B, E)
        return CLIPTextModelOutput(self.text_projection(pooled), last, states)

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Return the parameter name of a file's tensor `key`; None for position ids, no parameters."""
        return key if key.startswith("text_projection.") else super().rename_key(key, keys)
