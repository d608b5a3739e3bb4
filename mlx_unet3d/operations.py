"""Operations that are one to whoever traces a network, where MLX would show their parts.

Attention, layer norm and chains of element-wise operations are one kernel each on a GPU, but
`mx.export_function` takes them apart. Networks call them by the functions here, which ask a context variable
for a tracer: a trace in one thread changes nothing in another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import mlx.core as mx


class Tracer:
    """Stands in for the operations while it is active; by default each is done as ever."""

    def attention(
        self, query: mx.array, key: mx.array, value: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask)

    def layer_norm(self, x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
        return mx.fast.layer_norm(x, weight, bias, eps)

    def fused(self, function: Callable[..., Any], *args: mx.array) -> Any:
        """A function made by `one_operation`."""
        return function(*args)

    def compiled(self, forward: Callable[..., Any], *args: Any) -> Any:
        """The forward of a network that is compiled."""
        return forward(*args)


_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


def active_tracer() -> Tracer | None:
    """The tracer of this thread, if it has one."""
    return _tracer.get()


@contextmanager
def traced_by(tracer: Tracer) -> Iterator[None]:
    """Hand operations to `tracer`, in this thread alone."""
    token = _tracer.set(tracer)
    try:
        yield
    finally:
        _tracer.reset(token)


def one_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, an element-wise one of `mx.compile`, as one operation."""

    @wraps(function)
    def call(*args: mx.array) -> Any:
        tracer = _tracer.get()
        return function(*args) if tracer is None else tracer.fused(function, *args)

    return call


_MLX = Tracer()


def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
) -> mx.array:
    """Softmax attention by `mx.fast.scaled_dot_product_attention`, (B, H, S, D) -> (B, H, S, D)."""
    return (_tracer.get() or _MLX).attention(query, key, value, scale, mask)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """`mx.fast.layer_norm` over the last axis."""
    return (_tracer.get() or _MLX).layer_norm(x, weight, bias, eps)


Gradient = Callable[[tuple[mx.array, ...], mx.array, mx.array], Sequence[mx.array]]
"""Of the arguments of a function, from them, the gradient of its result, and its result."""


def differentiable(gradient: Gradient) -> Callable[..., Callable[..., mx.array]]:
    """A decorator for a function of arrays that MLX cannot differentiate, or not well.

    MLX keeps the arguments until the result is there: decorate what needs them that long anyhow.
    """

    def decorate(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        custom = mx.custom_function(function)

        @custom.vjp
        def vjp(primals: Any, cotangent: mx.array, result: mx.array) -> Any:
            if isinstance(primals, mx.array):
                return gradient((primals,), cotangent, result)[0]
            return tuple(gradient(primals, cotangent, result))

        @wraps(function)
        def call(*args: mx.array) -> mx.array:
            # MLX cannot export it, and a trace takes no gradient.
            return custom(*args) if _tracer.get() is None else function(*args)

        return call

    return decorate
