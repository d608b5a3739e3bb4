"""Standard normal noise from a seed: torch's CPU stream, number for number, or MLX's own."""

import operator
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

RNGS = ("torch", "mlx")

Float32Array = NDArray[np.float32]

# Elements turned into normals at a time: the float64 intermediates then stay in the cache.
CHUNK = 1 << 15


class NoiseSource(Protocol):
    """Standard normal draws: float32, of the shape asked for; successive calls go on in one stream."""

    def __call__(self, shape: tuple[int, ...]) -> mx.array: ...


class Generator(NoiseSource, Protocol):
    """A source that draws permutations from its stream as well."""

    def permutation(self, length: int) -> NDArray[np.int64]:
        """Return the numbers 0 to `length` - 1 in random order."""
        ...


def noise_source(seed: int, rng: str = "torch") -> Generator:
    """A stream of standard normal float32 numbers, fixed by its seed.

    Args:
        seed: -2**63 to 2**64 - 1, the range of `torch.manual_seed`; negative seeds wrap modulo 2**64.
        rng: "torch" gives the numbers of `torch.randn(shape, generator=g)`, call after call, with
            `g = torch.Generator("cpu").manual_seed(seed)`. They are the same bits on every machine:
            those of torch on an x86 CPU with AVX2. On other CPUs, Apple's among them, torch's own
            numbers differ from these in their last bits (by 2.3e-6 at most). Like torch, it reads
            only the low 32 bits of the seed. A half-precision draw of torch is this one cast where
            its size is a multiple of 16. torch's CUDA generator is another one, not offered. Its
            `permutation(n)` is `torch.randperm(n, generator=g)`.
            "mlx" draws with `mx.random.normal`, on the device, from a key split once a call.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is out of range, or `rng` unknown.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed={seed!r} is a {type(seed).__name__}; give an integer")
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} needs more than 64 bits; use 0 <= seed < 2**64")
    if rng == "torch":
        return TorchNoise(seed % 2**64)
    if rng == "mlx":
        return MLXNoise(seed % 2**64)
    raise ValueError(f"rng={rng!r} is not known; use one of {', '.join(map(repr, RNGS))}")


class MLXNoise:
    """MLX's counter-based generator; see `noise_source`."""

    def __init__(self, seed: int) -> None:
        self._key = mx.random.key(seed)

    def __call__(self, shape: tuple[int, ...]) -> mx.array:
        return mx.random.normal(_checked_shape(shape), dtype=mx.float32, key=self._next_key())

    def permutation(self, length: int) -> NDArray[np.int64]:
        (length,) = _checked_shape((length,))
        return np.array(mx.random.permutation(length, key=self._next_key()), np.int64)

    def _next_key(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        mx.eval(self._key)  # or the next draw could only be made in this thread
        return key


class TorchNoise:
    """torch's CPU generator, a Mersenne twister, and its two ways from words to normals; see `noise_source`.

    Draws of 16 and more use single precision in blocks of 16, shorter ones double precision in
    pairs, of which one number may be left over for the next short draw.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._left_over: float | None = None

    def __call__(self, shape: tuple[int, ...]) -> mx.array:
        shape = _checked_shape(shape)
        size = int(np.prod(shape, dtype=np.int64))
        numbers = self._draw_many(size) if size >= 16 else self._draw_few(size)
        return mx.array(numbers.reshape(shape))

    def permutation(self, length: int) -> NDArray[np.int64]:
        """Shuffle as Fisher and Yates do, from the first place on, a word for each place but the last."""
        (length,) = _checked_shape((length,))
        order = np.arange(length)
        for place, word in enumerate(self._words(max(length - 1, 0)).tolist()):
            other = place + word % (length - place)
            order[[place, other]] = order[[other, place]]
        return order

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _draw_many(self, size: int) -> Float32Array:
        numbers = np.empty(size, np.float32)
        whole = size - size % 16
        words = self._words(size)  # torch draws a word for each element of the tail, too
        for start in range(0, whole, CHUNK):
            stop = min(start + CHUNK, whole)
            numbers[start:stop] = _normals_of_blocks(words[start:stop])
        if whole < size:
            numbers[-16:] = _normals_of_blocks(self._words(16))
        return numbers

    def _draw_few(self, size: int) -> Float32Array:
        kept = [] if self._left_over is None or size == 0 else [self._left_over]
        pairs = (size - len(kept) + 1) // 2
        high, low = self._words(4 * pairs).astype(np.uint64).reshape(-1, 2).T
        bits = (high << np.uint64(32) | low) & np.uint64(2**53 - 1)
        u1, u2 = (bits * 2.0**-53).reshape(-1, 2).T
        radius, angle = np.sqrt(-2.0 * np.log1p(-u2)), 2.0 * np.pi * u1
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        numbers = np.concatenate([kept, drawn.reshape(-1)])
        if size > 0:
            self._left_over = float(numbers[size]) if len(numbers) > size else None
        return numbers[:size].astype(np.float32)


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape={shape!r} is a {type(shape).__name__}; give a tuple of integers")
    for size in shape:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"shape={tuple(shape)} holds {size!r}; sizes are integers")
        if size < 0:
            raise ValueError(f"shape={tuple(shape)} holds {size}; sizes are 0 or more")
    return tuple(operator.index(size) for size in shape)


def _normals_of_blocks(words: NDArray[np.uint32]) -> Float32Array:
    """Box-Muller in blocks of 16: eight radii, then eight angles; eight cosines out, then eight sines."""
    uniform = (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)
    for_radius, for_angle = np.ascontiguousarray(uniform.reshape(-1, 2, 8).swapaxes(0, 1))
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - for_radius))
    sine, cosine = _sine_cosine(np.float32(2 * np.pi) * for_angle)
    normals = np.stack([radius * cosine, radius * sine], axis=1)
    return normals.reshape(-1) + np.float32(0)  # torch adds the mean: -0.0 becomes 0.0


# torch's AVX2 code takes log, sin and cos from the single-precision polynomials of the Cephes
# library, compiled with fused multiply-adds. An exactly rounded log or cos would be nearer to the
# truth and up to 2 units in the last place away from torch; so the polynomials are evaluated here
# with the same roundings in the same order.


def _fma(a: Float32Array, b: Float32Array | float, c: Float32Array | float) -> Float32Array:
    """a * b + c rounded once: the product of two float32 numbers is exact in float64."""
    wide = np.multiply(a, b, dtype=np.float64)
    np.add(wide, c, out=wide)
    return wide.astype(np.float32)


def _constants(*values: float) -> list[float]:
    return [float(np.float32(value)) for value in values]


LOG_LEAD, *LOG_REST = _constants(
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_LOW, LN2_HIGH = _constants(-2.12194440e-4, 0.693359375)
COSINE = _constants(2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SINE = _constants(-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
MINUS_QUARTER_PI = _constants(-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)


def _horner(x: Float32Array, lead: float, *rest: float) -> Float32Array:
    y: Float32Array | np.float32 = np.float32(lead)
    for coefficient in rest:
        y = _fma(x, y, coefficient)
    return y


def _log(x: Float32Array) -> Float32Array:
    """ln x for normal positive x: x = 2**exponent * mantissa, sqrt(1/2) <= mantissa < sqrt(2)."""
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 126).astype(np.float32)
    mantissa = (bits & 0x007FFFFF | 0x3F000000).view(np.float32)
    low = mantissa < np.float32(np.sqrt(0.5))
    exponent -= low
    t = mantissa - np.float32(1)
    t += np.where(low, mantissa, np.float32(0))
    square = t * t
    y = _horner(t, LOG_LEAD, *LOG_REST) * t
    y = _fma(y, square, exponent * np.float32(LN2_LOW))
    y = _fma(square, -0.5, y)
    return _fma(exponent, LN2_HIGH, t + y)


def _sine_cosine(x: Float32Array) -> tuple[Float32Array, Float32Array]:
    """sin x and cos x for 0 <= x <= 2 pi: reduced to |x| <= pi / 4, then polynomials by octant."""
    octant = (x * np.float32(4 / np.pi)).astype(np.int32)
    octant = (octant + 1) & ~1
    count = octant.astype(np.float32)
    for part in MINUS_QUARTER_PI:
        x = _fma(count, part, x)
    square = x * x
    cosine = _horner(square, *COSINE) * square
    cosine = _fma(cosine, square, square * np.float32(-0.5)) + np.float32(1)
    sine = _horner(square, *SINE) * square
    sine = _fma(sine, x, x)
    swap = (octant & 2) != 0
    sign_of_sine = np.where(octant & 4, np.float32(-1), np.float32(1))
    sign_of_cosine = np.where((octant - 2) & 4, np.float32(1), np.float32(-1))
    return (
        np.where(swap, cosine, sine) * sign_of_sine,
        np.where(swap, sine, cosine) * sign_of_cosine,
    )
