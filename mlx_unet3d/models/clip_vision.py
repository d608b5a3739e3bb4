"""CLIPVisionModelWithProjection: the image encoder of Stable Video Diffusion, I2VGen-XL and IP-Adapter.

Source: transformers' class of that name; Radford et al., arXiv:2103.00020. Letters: B batch, C channels of
an image, L = 1 + patches, E = hidden_size, P = projection_dim.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.config import ModelConfig, key
from ..layers.clip import CLIPEncoder, PatchEmbedding
from ..layers.normalization import LayerNorm
from .clip_text import CLIP_IGNORED_KEYS, check_clip_config
from .outputs import ModelOutput
from .pretrained import PretrainedModel

_MOST_PIXELS = 2**14  # of a side; far above any network


@dataclass
class CLIPVisionConfig(ModelConfig):
    """The keys of `config.json` that shape the network; defaults are those of transformers."""

    hidden_size: int = key(768, "E, channels of the states; a multiple of `num_attention_heads`", least=1)
    intermediate_size: int = key(3072, "channels between the two linears of an MLP", least=1)
    projection_dim: int = key(512, "P, channels of the embedding of an image", least=1)
    num_hidden_layers: int = key(12, "layers of the transformer", least=1)
    num_attention_heads: int = key(12, "heads of a layer", least=1)
    num_channels: int = key(3, "C, channels of an image", least=1)
    image_size: int = key(224, "height and width of an image in pixels", least=1)
    patch_size: int = key(32, "height and width of a patch in pixels, at most `image_size`", least=1)
    hidden_act: str = key("quick_gelu", '"gelu" (by erf; OpenCLIP) or "quick_gelu" (OpenAI)')
    layer_norm_eps: float = key(1e-5, "of all LayerNorms")

    ignored_keys: ClassVar[frozenset[str]] = CLIP_IGNORED_KEYS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip_config(self)
        if not self.patch_size <= self.image_size <= _MOST_PIXELS:
            raise ValueError(
                f"image_size={self.image_size} must be at least patch_size={self.patch_size}, and at most "
                f"{_MOST_PIXELS}"
            )


@dataclass
class CLIPVisionModelOutput(ModelOutput):
    """Embeddings and states of images.

    Attributes:
        image_embeds: (B, P).
        last_hidden_state: (B, L, E) after the last layer; the class token first, then patches by rows.
        hidden_states: (B, L, E) before the first and after each layer; None unless `output_hidden_states`.
    """

    image_embeds: mx.array
    last_hidden_state: mx.array
    hidden_states: tuple[mx.array, ...] | None = None


class CLIPVisionEmbeddings(nn.Module):
    """A class token and the patches, plus learned position embeddings."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.class_embedding = mx.random.normal((width,)) * width**-0.5
        self.patch_embedding = PatchEmbedding(config.num_channels, width, config.patch_size)
        patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Embedding(1 + patches, width)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, L, E)."""
        patches = self.patch_embedding(x)
        batch, _, _, width = patches.shape
        token = mx.broadcast_to(self.class_embedding, (batch, 1, width))
        x = mx.concatenate([token, patches.reshape(batch, -1, width)], axis=1)
        return x + self.position_embedding.weight


class CLIPVisionTransformer(nn.Module):
    """Embeddings, layers, and a LayerNorm before them and after."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(width, eps=eps)  # spelled like this in all files
        self.encoder = CLIPEncoder(
            config.num_hidden_layers,
            width,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_act,
            eps,
            causal=False,
        )
        self.post_layernorm = LayerNorm(width, eps=eps)


class CLIPVisionModelWithProjection(PretrainedModel):
    """The embedding of an image, and the states of its patches; transformers' class of that name.

    Raises ValueError where the numbers of its config do not fit together.
    """

    config_class = CLIPVisionConfig
    weights_stem = "model"
    class_names = ("CLIPVisionModelWithProjection",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vision_model = CLIPVisionTransformer(self.config)
        self.visual_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def __call__(
        self, pixel_values: mx.array, *, output_hidden_states: bool = False
    ) -> CLIPVisionModelOutput:
        """One forward.

        Args:
            pixel_values: normalized images (B, C, image_size, image_size), see `CLIPImageProcessor`; cast to
                the dtype of the network.
            output_hidden_states: also return the states of all layers.

        Returns embeddings and states in the dtype of the network. Raises ValueError for another shape.
        """
        model, config = self.vision_model, self.config
        wanted = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted or pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, "
                f"{', '.join(map(str, wanted))}): resize images with the CLIPImageProcessor of this encoder"
            )
        x = pixel_values.astype(self.dtype).transpose(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        x, states = model.pre_layrnorm(model.embeddings(x)), None
        if output_hidden_states:
            states = model.encoder.hidden_states(x)
            x = states[-1]
        else:
            x = model.encoder(x)
        embeds = self.visual_projection(model.post_layernorm(x[:, 0]))  # of the class token
        return CLIPVisionModelOutput(embeds, x, states)

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Return the parameter name of a file's tensor `key`; None for position ids, no parameters."""
        if key.startswith("visual_projection."):
            return key
        bare = key.removeprefix("vision_model.")
        return None if bare == "embeddings.position_ids" else f"vision_model.{bare}"
