"""Text and image states that cross-attention looks at, with the keys and values that layers made of them."""

from typing import Any

import mlx.core as mx

from .adapted import adapter_scale


class TextContext:
    """States (B, L, D) of texts or images together with the keys and values that attention layers made of
    them.

    These depend on the prompt and the weights alone, so one context serves all denoising steps. Make a
    new one when weights change. Pass it wherever `encoder_hidden_states` is taken.
    """

    def __init__(self, states: mx.array):
        self.states = states
        self._projected: dict[tuple[int, float], tuple[Any, mx.array, mx.array]] = {}

    def keys_values(self, attn: Any) -> tuple[mx.array, mx.array]:
        """Keys and values (B, L, E) of the layer `attn`, projected at its first call."""
        cache_key = (id(attn), adapter_scale())
        if cache_key not in self._projected:
            key, value = attn.project_keys_values(self.states)
            self._projected[cache_key] = (attn, key, value)  # holds attn: its id stays taken
        return self._projected[cache_key][1:]

    def take_apart(self) -> tuple[mx.array, tuple[tuple[int, float], ...], list[list[mx.array]]]:
        """The arguments of `put_together`: constants and arrays as `mx.compile` takes them."""
        return self.states, tuple(self._projected), [list(made[1:]) for made in self._projected.values()]

    @classmethod
    def put_together(
        cls, states: mx.array, names: tuple[tuple[int, float], ...], projected: list[list[mx.array]]
    ) -> "TextContext":
        """The context that `take_apart` was called on."""
        context = cls(states)
        context._projected = {name: (None, *made) for name, made in zip(names, projected, strict=True)}
        return context

    def rows(self, rows: slice) -> "TextContext":
        """The context of some rows, which shares the keys and values of all."""
        return _Rows(self, rows)


class _Rows(TextContext):
    def __init__(self, parent: TextContext, rows: slice):
        self.states = parent.states[rows]
        self._parent, self._rows = parent, rows

    def keys_values(self, attn: Any) -> tuple[mx.array, mx.array]:
        key, value = self._parent.keys_values(attn)
        return key[self._rows], value[self._rows]
