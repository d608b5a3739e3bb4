"""Text and image states that cross-attention looks at, with the keys and values that layers made of them."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .adapted import adapter_scale

Projection = Callable[[mx.array], tuple[mx.array, mx.array]]


class TextContext:
    """States (B, L, D) of texts or images together with the keys and values that attention layers made of
    them.

    These depend on the prompt and the weights alone, so one context serves all denoising steps. Make a
    new one when weights change. Pass it wherever `encoder_hidden_states` is taken.

    Attributes:
        states: of the text.
        images: contexts of the tokens (B, L, D) of images beside the text, one an IP-Adapter.
    """

    def __init__(self, states: mx.array, images: "Sequence[TextContext]" = ()):
        self.states = states
        self.images = tuple(images)
        self._projected: dict[tuple[int, float], tuple[Any, mx.array, mx.array]] = {}
        self._with_images: tuple[tuple[Any, ...], TextContext] | None = None

    def keys_values(self, layer: Any, project: Projection | None = None) -> tuple[mx.array, mx.array]:
        """Keys and values (B, L, E) for a layer, projected at its first call; `project` is
        `layer.project_keys_values` where None."""
        cache_key = (id(layer), adapter_scale())
        if cache_key not in self._projected:
            key, value = (layer.project_keys_values if project is None else project)(self.states)
            self._projected[cache_key] = (layer, key, value)  # holds the layer: its id stays taken
        return self._projected[cache_key][1:]

    def with_images(
        self,
        make: Callable[[mx.array | Sequence[mx.array]], Sequence[mx.array]],
        images: mx.array | Sequence[mx.array],
    ) -> "TextContext":
        """This text with the tokens that `make` makes of images beside it: the same for the same arrays."""
        made_of = (make, images) if isinstance(images, mx.array) else (make, *images)
        known = self._with_images
        if known is None or not _same(known[0], made_of):
            context = TextContext(self.states, [TextContext(tokens) for tokens in make(images)])
            context._projected = self._projected
            self._with_images = known = made_of, context
        return known[1]

    def take_apart(self) -> tuple[Any, ...]:
        """The arguments of `put_together`: constants and arrays as `mx.compile` takes them."""
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
        """The context that `take_apart` was called on."""
        context = cls(states, [cls.put_together(*image) for image in images])
        context._projected = {name: (None, *made) for name, made in zip(names, projected, strict=True)}
        return context

    def rows(self, rows: Callable[[mx.array], slice]) -> "TextContext":
        """The context of some rows, as `rows` tells them of states, which shares the keys and values of
        all."""
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
    """Whether they are the same objects in the same order."""
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
