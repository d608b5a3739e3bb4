"""The text that cross-attention looks at, with the keys and values that layers made of it."""

from typing import Any

import mlx.core as mx

from .adapted import adapter_scale


class TextContext:
    """Text states (B, L, D) together with the keys and values that attention layers made of them.

    They depend on the prompt and the weights alone, so one context serves all denoising steps. Make a
    new one when weights change. Pass it wherever `encoder_hidden_states` is taken.
    """

    def __init__(self, states: mx.array):
        self.states = states
        self._projected: dict[tuple[int, float], tuple[Any, mx.array, mx.array]] = {}

    def keys_values(self, attn: Any) -> tuple[mx.array, mx.array]:
        cache_key = (id(attn), adapter_scale())
        if cache_key not in self._projected:
            key, value = attn.project_keys_values(self.states)
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

    def keys_values(self, attn: Any) -> tuple[mx.array, mx.array]:
        key, value = self._whole.keys_values(attn)
        return key[self._row], value[self._row]
