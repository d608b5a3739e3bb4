"""Operations of the networks in the forms that suit MLX's CPU backend.

That backend runs each element-wise operation on one thread, calls exp, erf and tanh element by element
(12 to 30 ns each), and unfolds attention scores and convolutions in memory as a whole. The forms here
give the same results, to about 1e-6 of the largest, from operations that vectorize and in pieces that stay
in the cache. They take over for float32 arrays while `active`; GPUs always get MLX's own operations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import e, log, log2

import mlx.core as mx

from . import operations
from .operations import differentiable, one_operation

_forced: ContextVar[bool | None] = ContextVar("forced", default=None)

Part = tuple[slice, ...]

# Elements of a piece of scores or activations, 4 MB: what stays in the cache from one operation to the next.
PIECE = 2**20

# Below this many elements the number of operations counts, not their cost.
_SMALL = 2**13


def chosen() -> bool:
    """Return True if the default device is the CPU, or the answer that `routes` gives in its place."""
    forced = _forced.get()
    return mx.default_device() == mx.Device(mx.cpu) if forced is None else forced


def active(x: mx.array) -> bool:
    """Return True if `x` is to be computed in these forms: float32, on the CPU."""
    return x.dtype == mx.float32 and chosen()


@contextmanager
def routes(use: bool) -> Iterator[None]:
    """Use these forms, or MLX's own operations (as on a GPU), whatever the default device is."""
    token = _forced.set(use)
    try:
        yield
    finally:
        _forced.reset(token)


# Activations. A fraction of two polynomials needs no more than products and sums, and one division, and
# compiles to one loop over four numbers at a time. The coefficients are weighted least-squares fits to tanh
# on [-9, 9] and erf on [-3.92, 3.92], beyond which both are 1 in float32; of arguments x / 2 and x / sqrt(2).

_TANH = (
    (0.499999999, 0.0171010714, 0.000120922161, 2.18994934e-07, 5.98489813e-11, -5.97968157e-15),
    (1.0, 0.117535473, 0.001703135, 6.15736885e-06, 5.03530745e-09),
    18.0,
)
_ERF = (
    (0.797884545, 0.06732587, 0.00932522141, 0.000332915948, 1.25913772e-05, 4.52992938e-08),
    (1.0, 0.251046829, 0.0285293484, 0.00187137123, 7.26730796e-05, 1.1903884e-06),
    3.92 * 2**0.5,
)


def _polynomial(coefficients: Sequence[float], x: mx.array) -> mx.array:
    """Estrin's scheme, lowest first: half as deep as Horner's. MLX cuts a chain deeper than 11 in two."""
    terms = list(coefficients)
    while len(terms) > 1:
        paired = [a + b * x for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = paired + terms[len(terms) & ~1 :]
        x = x * x
    return terms[0]


def _gated(fit: tuple, half: mx.array, clipped: mx.array) -> mx.array:
    """x / 2 + x / 2 * s(x), s being the fitted function."""
    above, below, _ = fit
    square = clipped * clipped
    return half + half * (clipped * _polynomial(above, square) / _polynomial(below, square))


def _activation(fit: tuple, exact: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """The function of `fit`, with the gradient of `exact`: that of two polynomials would keep each step."""
    gated = mx.compile(partial(_gated, fit))
    gated_whole = mx.compile(lambda x, clipped: _gated(fit, 0.5 * x, clipped))
    limit = fit[2]

    @differentiable(lambda primals, cotangent, _: mx.vjp(exact, list(primals), [cotangent])[1])
    def of_contiguous(x: mx.array) -> mx.array:
        return gated_whole(x, mx.clip(x, -limit, limit))

    def activation(x: mx.array) -> mx.array:
        tracer = operations.active_tracer()
        if tracer is not None:  # as many arrays as in the line below, and each can be exported
            return tracer.fused(gated, 0.5 * x, mx.clip(x, -limit, limit))
        return of_contiguous(mx.contiguous(x))  # over views, loops do not vectorize

    return activation


_silu = _activation(_TANH, lambda x: x * mx.sigmoid(x))
_gelu = _activation(_ERF, lambda x: x * (0.5 + 0.5 * mx.erf(x * 0.5**0.5)))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), to 2e-7 of |x|."""
    return _silu(x)


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), Phi by erf, to 3e-7 of |x|."""
    return _gelu(x)


# 2^x = 2^n * 2^f, n the nearest integer: a polynomial for 2^f, and n added to its exponent bits. Adding and
# taking away 1.5 * 2^23 rounds, and the sum holds n in its lowest bits. Least-squares fit, f in [-0.5, 0.5].

_EXP2 = (1.0, 0.6931472, 0.240226511, 0.0555034054, 0.00961803977, 0.00133953408, 0.000154653734)
_ROUNDER = 12582912.0


@one_operation
@mx.compile
def _exp2_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    shifted = x + _ROUNDER
    return _polynomial(_EXP2, x - (shifted - _ROUNDER)), shifted


@one_operation
@mx.compile
def _add_exponent(bits: mx.array, shifted: mx.array) -> mx.array:
    return bits + mx.left_shift(shifted, 23)


def exp2(x: mx.array) -> mx.array:
    """2^x for x <= 0, to 2e-7; 2^-126 below that. It has no gradient."""
    mantissa, shifted = _exp2_parts(mx.maximum(x, -126.0))
    return _add_exponent(mantissa.view(mx.int32), shifted.view(mx.int32)).view(mx.float32)


def _scores(query: mx.array, key: mx.array, mask: Sequence[mx.array]) -> mx.array:
    scores = query @ key.swapaxes(-1, -2)
    return scores + mask[0] if mask else scores


def _attend_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, result: mx.array
) -> Sequence[mx.array]:
    """It makes the scores again, as the forward keeps none."""
    query, key, value, *mask = primals
    weights = mx.softmax(log(2) * _scores(query, key, mask), axis=-1)
    of_weights = cotangent @ value.swapaxes(-1, -2) - (cotangent * result).sum(axis=-1, keepdims=True)
    of_scores = log(2) * weights * of_weights
    of_key, of_value = (of.swapaxes(-1, -2) @ x for of, x in ((of_scores, query), (weights, cotangent)))
    return [of_scores @ key, of_key, of_value, *(of_scores for _ in mask)]


@differentiable(_attend_gradient)
def _attend(query: mx.array, key: mx.array, value: mx.array, *mask: mx.array) -> mx.array:
    """Softmax attention with scores that are exponents of two."""
    scores = _scores(query, key, mask)
    weights = exp2(scores - scores.max(axis=-1, keepdims=True))
    return (weights @ value) / weights.sum(axis=-1, keepdims=True)


def attention(
    query: mx.array, key: mx.array, value: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Softmax attention, in pieces of at most `PIECE` scores where a row has no more.

    (B, H, S, D), (B, H, L, D) and (B, H, L, D) -> (B, H, S, D); `mask` is added to the scores and
    broadcasts to (B, H, S, L).
    """
    batch, heads, queries, _ = query.shape
    length = key.shape[2]
    if batch * heads * queries * length < _SMALL:
        return operations.attention(query, key, value, scale=scale, mask=mask)
    query = query * (scale * log2(e))
    if mask is not None:
        mask = mx.broadcast_to(mask * log2(e), (batch, heads, queries, length))

    def piece(query: mx.array, part: Part) -> mx.array:
        masks = () if mask is None else (mask[part],)
        return _attend(query, key[part[:2]], value[part[:2]], *masks)

    # As many samples as make a piece; or one, and as many heads; or one of each, and as many queries
    sizes = (heads * queries * length, queries * length, length)
    axis = next((i for i, size in enumerate(sizes) if size <= PIECE), 2)
    return in_turn(piece, query, (1,) * axis + (max(PIECE // sizes[axis], 1),))


def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalization of (N, ..., C), statistics over all but N; each pass reads along C.

    The mean of each channel is taken away before squares are summed, so that nothing cancels.
    """
    n, channels = x.shape[0], x.shape[-1]
    y = x.reshape(n, -1, channels)
    mean = _mean_of_rows(y)
    y = y - mean
    variance = _mean_of_rows(y * y).reshape(n, groups, -1)
    by_group = mean.reshape(n, groups, -1)
    offset = by_group - by_group.mean(axis=-1, keepdims=True)
    variance = (variance + offset * offset).mean(axis=-1, keepdims=True)
    gain = mx.broadcast_to(mx.rsqrt(variance + eps), offset.shape).reshape(n, 1, channels) * weight
    return (y * gain + (offset.reshape(n, 1, channels) * gain + bias)).reshape(x.shape)


def _mean_of_rows(x: mx.array) -> mx.array:
    """(N, L, C) -> (N, 1, C); in two stages, since a sum over rows is taken one row after the other."""
    n, length, channels = x.shape
    inner = 2 ** (((length & -length).bit_length() - 1 + 1) // 2)  # about the root, a divisor
    if inner > 1:
        x = x.reshape(n, length // inner, inner, channels).sum(axis=2)
    return x.sum(axis=1, keepdims=True) * (1 / length)


def in_turn(
    fn: Callable[[mx.array, Part], mx.array], x: mx.array, steps: Sequence[int], overlap: int = 0
) -> mx.array:
    """`fn(x[part], part)` of parts of `steps` along the first axes, put together again. Along the last of
    these axes a part also has the first `overlap` of the next.

    One part begins when the one before is done: MLX would evaluate them side by side, and what lies between
    input and output would be in memory for all of them at once.
    """
    parts: list[Part] = [()]
    counts = []
    for axis, step in enumerate(steps):
        more = overlap if axis == len(steps) - 1 else 0
        slices = [slice(i, i + step + more) for i in range(0, x.shape[axis] - more, step)]
        parts = [(*part, s) for part in parts for s in slices]
        counts.append(len(slices))
    results: list[mx.array] = []
    for part in parts:
        piece = mx.depends([x[part]], [results[-1]])[0] if results else x[part]
        results.append(fn(piece, part))
    for axis, count in reversed(list(enumerate(counts))):
        if count > 1:
            groups = [results[i : i + count] for i in range(0, len(results), count)]
            results = [mx.concatenate(group, axis=axis) for group in groups]
    return results[0]


def in_rows(fn: Callable[[mx.array], mx.array], x: mx.array, rows: int) -> mx.array:
    """`fn` of (M, C) for `rows` rows of x (..., C) at a time."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= rows:
        return fn(x)
    return in_turn(lambda piece, _: fn(piece), flat, (rows,)).reshape(*x.shape[:-1], -1)
