"""Prompts to text states, as they go from `encode_prompt` to the denoising loop."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..diffusers_names import answers_diffusers
from ..layers.adapted import scaled_adapters
from ..tokenizer import CLIPTokenizer
from .embedded_guidance import EmbeddedGuidance
from .sampling import Sampling


class TextStates(NamedTuple):
    """The pair that diffusers' `encode_prompt` returns.

    As a NumPy array, it is those of the two that are there, stacked.

    Attributes:
        prompt_embeds: (B, L, D).
        negative_prompt_embeds: the same shape, or None where nothing is guided.
    """

    prompt_embeds: mx.array
    negative_prompt_embeds: mx.array | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array([np.array(states) for states in self if states is not None], dtype=dtype)

    def repeated(self, copies: int) -> TextStates:
        """Return the states with each row so many times, one after the other."""
        return TextStates(*repeated_rows(self, copies))


def repeated_rows(states: Sequence[mx.array | None], copies: int) -> list[mx.array | None]:
    """Return arrays (B, ...) with each row so many times, one after the other."""
    return [None if x is None else mx.repeat(x, copies, axis=0) for x in states]


def checked_states(states: tuple[mx.array, mx.array | None], sampling: Sampling) -> TextStates:
    """Return the pair of `encode_prompt`, without negative states where nothing is guided.

    Raises TypeError for anything but a pair, ValueError where guidance lacks negative states.
    """
    if not isinstance(states, tuple) or len(states) != 2:
        raise TypeError(
            f"text states are a {type(states).__name__}; give the pair that encode_prompt returns"
        )
    positive, negative = states
    if not sampling.is_guided:
        return TextStates(positive)
    if negative is None or negative.shape != positive.shape:
        shape = None if negative is None else tuple(negative.shape)
        raise ValueError(
            f"guidance_scale={sampling.guidance_scale:g} needs negative states of shape "
            f"{tuple(positive.shape)}, not {shape}; call encode_prompt with the same guidance_scale"
        )
    return TextStates(positive, negative)


class TextPrompts(EmbeddedGuidance):
    """A pipeline with a CLIP tokenizer and text encoder."""

    negatives_skip = False
    """True if `clip_skip` counts for negative prompts too."""
    _text_axes: tuple[int, ...] = (3,)
    """Numbers of axes that text states may have: 4 where each frame may have a text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.unet.config.cross_attention_dim
        self._text_width: int = width[-1] if isinstance(width, tuple) else width

    def _encoded_width(self) -> int | None:
        """Channels of the states that the text encoder makes; None without one."""
        return None if self.text_encoder is None else self.text_encoder.config.hidden_size

    def _check_parts(self) -> None:
        unet, latent_channels = self.unet.config, self.vae.config.latent_channels
        if not unet.in_channels == unet.out_channels == latent_channels:
            raise ValueError(
                f"the unet takes {unet.in_channels} and returns {unet.out_channels} channels, "
                f"the vae has {latent_channels}; these parts do not belong together"
            )
        width, wanted = self._encoded_width(), unet.cross_attention_dim
        wanted = wanted[-1] if isinstance(wanted, tuple) else wanted
        if width is not None and wanted != width:
            raise ValueError(
                f"the unet attends to text of {wanted} channels "
                f"(cross_attention_dim), the text encoder has {width}; these parts do not belong together"
            )

    @answers_diffusers
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
    ) -> TextStates:
        """Return the text states (prompt_embeds, negative_prompt_embeds), as diffusers' pipelines do.

        Each is (B, L, D); the second is None for a `guidance_scale` of at most 1, and for a UNet that takes
        guidance as an embedding. `steps` takes the pair, a call its parts by their names. `clip_skip` counts
        layers to leave out at the end of the text encoder, for the positive prompt (in I2VGen-XL for both).
        `lora_scale` scales the text encoder's LoRA. A model of few words warns of others.
        """
        positive = self._states("prompt", prompt, prompt_embeds, clip_skip, lora_scale)
        if not self.is_guided(guidance_scale):
            return TextStates(positive)
        batch = positive.shape[0]
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * batch
        skip = clip_skip if self.negatives_skip else None
        negative = self._states("negative_prompt", negative_prompt, negative_prompt_embeds, skip, lora_scale)
        if negative.shape != positive.shape:
            raise ValueError(
                f"negative prompts give states {tuple(negative.shape)}, prompts {tuple(positive.shape)}; "
                "give one negative prompt, or one a prompt"
            )
        return TextStates(positive, negative)

    def _states(
        self,
        name: str,
        text: str | Sequence[str] | None,
        states: mx.array | None,
        clip_skip: int | None,
        lora_scale: float | None,
    ) -> mx.array:
        if (text is None) == (states is None):
            raise ValueError(f"give either {name} or {name}_embeds, and not both")
        if states is not None:
            return self._checked_embeds(name, states)
        texts = checked_texts(name, text)
        self._need("text_encoder")
        self._warn_of_unknown_words(texts)
        with scaled_adapters(lora_scale):
            states = self.text_encoder(token_ids(self.tokenizer, texts), clip_skip=clip_skip)
        mx.eval(states)
        return states

    def _checked_embeds(self, name: str, states: Any) -> mx.array:
        states = mx.array(states) if isinstance(states, np.ndarray) else states
        width = self._text_width
        if not isinstance(states, mx.array):
            raise TypeError(
                f"{name}_embeds is a {type(states).__name__}; give an mx.array: of the pair that "
                "encode_prompt returns, the first is prompt_embeds, the second negative_prompt_embeds"
            )
        if states.ndim not in self._text_axes or states.shape[-1] != width:
            per_frame = f" or (batch, frames, tokens, {width})" if 4 in self._text_axes else ""
            raise ValueError(
                f"{name}_embeds has shape {tuple(states.shape)}; it must be "
                f"(batch, tokens, {width}){per_frame}"
            )
        return states

    def _warn_of_unknown_words(self, texts: Sequence[str]) -> None:
        known = self.recommended.vocabulary
        for token in self.tokenizer.added_tokens:
            texts = [text.replace(token, " ") for text in texts]
        words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text.lower()))
        unknown = [word for word in words if word not in known]
        if known and unknown:
            warnings.warn(
                f"this model does not know {', '.join(map(repr, unknown))}; it knows {', '.join(known)}",
                stacklevel=5,
            )


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> mx.array:
    """Return the ids (B, L) of texts, in which learned tokens of several vectors are written out."""
    return mx.array(tokenizer([written_out(tokenizer, text) for text in texts]))


def written_out(tokenizer: CLIPTokenizer, text: str) -> str:
    """Return a text with the tokens of all vectors for a learned token of several."""
    added = tokenizer.added_tokens
    for token in added:
        rest = []
        while f"{token}_{len(rest) + 1}" in added:
            rest.append(f"{token}_{len(rest) + 1}")
        if rest:
            text = text.replace(token, " ".join([token, *rest]))
    return text


def checked_texts(name: str, text: Any) -> list[str]:
    """Return a list of texts; TypeError for anything but a string or a list of some."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
        raise TypeError(f"{name}={text!r} must be a string or a list of strings")
    return list(texts)
