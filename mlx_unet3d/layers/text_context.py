"""The context of cross-attention: text and image states with the keys and values that layers project."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .adapted import adapter_scale

Projection = Callable[[mx.array], tuple[mx.array, mx.array]]


class TextContext:
    """States (B, L, D) of texts or images, and the keys and values that attention layers projected from them.

    Keys and values depend on the prompt and the weights alone, so one context serves all denoising steps.
    Make a new one when weights change. Pass it as `encoder_hidden_states`.

    Attributes:
        states: of the text.
        images: contexts of image tokens (B, L, D) beside the text, one an IP-Adapter.
    """

    def __init__(self, states: mx.array, images: "Sequence[TextContext]" = ()):
        self.states = states
        self.images = tuple(images)
        self._projected: dict[tuple[int, float], tuple[Any, mx.array, mx.array]] = {}
        self._with_images: tuple[tuple[Any, ...], TextContext] | None = None

    def keys_values(self, layer: Any, project: Projection | None = None) -> tuple[mx.array, mx.array]:
        """Return keys and values (B, L, E) for a layer, projected at its first call by `project` (None:
        `layer.project_keys_values`)."""
        cache_key = (id(layer), adapter_scale())
        if cache_key not in self._projected:
            key, value = (layer.project_keys_values if project is None else project)(self.states)
            self._projected[cache_key] = (layer, key, value)  # holds the layer, so that its id stays taken
        return self._projected[cache_key][1:]

    def with_images(
        self,
        make: Callable[[mx.array | Sequence[mx.array]], Sequence[mx.array]],
        images: mx.array | Sequence[mx.array],
    ) -> "TextContext":
        """Return this text with the image tokens `make(images)` beside it: the same context for the same
        arrays."""
        made_of = (make, images) if isinstance(images, mx.array) else (make, *images)
        known = self._with_images
        if known is None or not _same(known[0], made_of):
            context = TextContext(self.states, [TextContext(tokens) for tokens in make(images)])
            context._projected = self._projected
            self._with_images = known = made_of, context
        return known[1]

    def take_apart(self) -> tuple[Any, ...]:
        """Return the arguments of `put_together`: constants and arrays, which `mx.compile` accepts."""
        projected = [list(made[1:]) for made in self._projected.values()]
        return self.states, tuple(self._projected), projected, [i.take_apart() for i in self.images]

    @classmethod
    def put_together(
        cls,
        states: mx.array,
        names: tuple[tuple[int, float], ...],
        projected: list[list[mx.array]],
        images: Sequence[tuple[Any, ...]],
    ) -> "TextContext":
        """Restore a context from the result of `take_apart`."""
        context = cls(states, [cls.put_together(*image) for image in images])
        context._projected = {name: (None, *made) for name, made in zip(names, projected, strict=True)}
        return context

    def rows(self, rows: Callable[[mx.array], slice]) -> "TextContext":
        """Return the context of the rows `rows(states)`, which shares the keys and values of all rows."""
        return _Rows(self, rows)


class _Rows(TextContext):
    def __init__(self, parent: TextContext, rows: Callable[[mx.array], slice]):
        self._parent, self._rows = parent, rows(parent.states)
        self.states = parent.states[self._rows]
        self.images = tuple(image.rows(rows) for image in parent.images)

    def keys_values(self, layer: Any, project: Projection | None = None) -> tuple[mx.array, mx.array]:
        key, value = self._parent.keys_values(layer, project)
        return key[self._rows], value[self._rows]


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Return True for the same objects in the same order."""
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
