"""Prompts of SDXL: the states of two text encoders side by side, and the pooled state of the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..diffusers_names import answers_diffusers
from ..layers.adapted import scaled_adapters
from ..scalars import as_count
from .sampling import Sampling
from .text import TextPrompts, TextStates, checked_states, checked_texts, repeated_rows, token_ids


class PooledTextStates(NamedTuple):
    """The four that diffusers' `encode_prompt` returns for SDXL.

    Attributes:
        prompt_embeds: (B, L, D), D the channels of both encoders.
        negative_prompt_embeds: the same shape, or None where nothing is guided.
        pooled_prompt_embeds: (B, P).
        negative_pooled_prompt_embeds: the same shape, or None.
    """

    prompt_embeds: mx.array
    negative_prompt_embeds: mx.array | None
    pooled_prompt_embeds: mx.array
    negative_pooled_prompt_embeds: mx.array | None

    def repeated(self, copies: int) -> PooledTextStates:
        """Return the states with each row so many times, one after the other."""
        return PooledTextStates(*repeated_rows(self, copies))


def checked_pooled(states: Any, sampling: Sampling) -> tuple[TextStates, TextStates]:
    """Return states and pooled states, each without the negative ones where nothing is guided.

    Raises TypeError for anything but the four of `encode_prompt`, ValueError where guidance lacks some.
    """
    if not isinstance(states, tuple) or len(states) != 4:
        raise TypeError(
            f"text states are a {type(states).__name__}; give the four arrays that encode_prompt returns"
        )
    return checked_states(states[:2], sampling), checked_states(states[2:], sampling)


class PooledTextPrompts(TextPrompts):
    """A pipeline with the two CLIP tokenizers and text encoders of SDXL."""

    index_options: ClassVar[dict[str, Any]] = {"force_zeros_for_empty_prompt": True}

    def _encoded_width(self) -> int | None:
        if self.text_encoder is None or self.text_encoder_2 is None:
            return None
        return self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size

    @answers_diffusers
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        pooled_prompt_embeds: mx.array | None = None,
        negative_pooled_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
    ) -> PooledTextStates:
        """Return the text states of SDXL, as diffusers' pipelines do.

        The negative ones are None for a `guidance_scale` of at most 1, and for a UNet that takes it as an
        embedding. The second encoder reads `prompt_2`
        and `negative_prompt_2`, where given. Without any negative prompt its states are zeros, or with
        `force_zeros_for_empty_prompt=False` in the index those of "". `clip_skip` counts layers to leave out
        before the last but one, for the positive prompt. `lora_scale` scales the LoRA of both encoders.
        """
        given = prompt_embeds, pooled_prompt_embeds
        positive = self._states_of_both("prompt", (prompt, prompt_2), given, clip_skip, lora_scale)
        if not self.is_guided(guidance_scale):
            return PooledTextStates(positive[0], None, positive[1], None)
        given = negative_prompt_embeds, negative_pooled_prompt_embeds
        texts = negative_prompt, negative_prompt_2
        if all(x is None for x in (*texts, *given)) and self.force_zeros_for_empty_prompt:
            negative = [mx.zeros_like(x) for x in positive]
        else:
            if negative_prompt is None and given[0] is None:
                texts = "", negative_prompt_2
            batch = positive[0].shape[0]
            texts = [[text] * batch if isinstance(text, str) else text for text in texts]
            negative = self._states_of_both("negative_prompt", texts, given, None, lora_scale)
        shapes = [[tuple(x.shape) for x in states] for states in (negative, positive)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"negative prompts give states {shapes[0]}, prompts {shapes[1]}; give one negative prompt, "
                "or one a prompt"
            )
        return PooledTextStates(positive[0], negative[0], positive[1], negative[1])

    def _states_of_both(
        self,
        name: str,
        texts: Sequence[Any],
        given: Sequence[Any],
        clip_skip: int | None,
        lora_scale: float | None,
    ) -> tuple[mx.array, mx.array]:
        """The states (B, L, D) and the pooled states (B, P) of texts for both encoders, or those given."""
        text, text_2 = texts
        if (text is None) == (given[0] is None) or (given[0] is not None and text_2 is not None):
            raise ValueError(f"give either {name}, with {name}_2 or without, or {name}_embeds, and not both")
        if (given[0] is None) != (given[1] is None):
            pooled = name.replace("prompt", "pooled_prompt")
            raise ValueError(
                f"give {name}_embeds and {pooled}_embeds together, as encode_prompt returns them"
            )
        if given[0] is not None:
            return self._checked_embeds(name, given[0]), mx.array(given[1])
        self._need("text_encoder", "text_encoder_2")
        first = checked_texts(name, text)
        second = first if text_2 is None else checked_texts(f"{name}_2", text_2)
        second = second * len(first) if len(second) == 1 else second
        if len(second) != len(first):
            raise ValueError(f"{name}_2 has {len(second)} texts, {name} {len(first)}; give one, or one each")
        self._warn_of_unknown_words([*first, *second])
        layer = self._layer(clip_skip)
        with scaled_adapters(lora_scale):
            one = self.text_encoder(token_ids(self.tokenizer, first), output_hidden_states=True)
            two = self.text_encoder_2(token_ids(self.tokenizer_2, second), output_hidden_states=True)
        states = mx.concatenate([one.hidden_states[layer], two.hidden_states[layer]], axis=-1)
        mx.eval(states, two.text_embeds)
        return states, two.text_embeds

    def _layer(self, clip_skip: int | None) -> int:
        """Which hidden states to take: the last but one, or `clip_skip` earlier ones."""
        encoders = (self.text_encoder, self.text_encoder_2)
        fewest = min(encoder.config.num_hidden_layers for encoder in encoders)
        skipped = as_count("clip_skip", clip_skip, least=0) if clip_skip else 0
        if skipped > fewest - 1:
            raise ValueError(
                f"clip_skip={clip_skip} must be 0 to {fewest - 1}: the text encoders have {fewest} layers or "
                "more, and the states are those before the last"
            )
        return -(skipped + 2)
