"""Which kernel MLX's Metal backend picks for a convolution and for an attention, as functions of shapes.

Read from the sources of MLX `VERSION`: mlx/backend/metal/conv.cpp (`dispatch_conv_2D_gpu`,
`dispatch_conv_3D_gpu`, `conv_1D_gpu`) and scaled_dot_product_attention.cpp (`use_fallback`). Nothing here was
run on Metal. A later MLX may choose otherwise: read them again before raising `VERSION`.
"""

from dataclasses import dataclass
from math import ceil, prod

VERSION = "0.32.2"

# Kernels of a convolution.
WINOGRAD = "winograd F(6x6,3x3)"
IMPLICIT = "implicit GEMM"
IMPLICIT_PADDED = "implicit GEMM on padded channels"
IMPLICIT_GENERAL = "implicit GEMM, general"
IMPLICIT_3D = "implicit GEMM 3D"
IMPLICIT_3D_PADDED = "implicit GEMM 3D on padded channels"
BY_PLANES = "a conv2d for each plane of the kernel"
DEPTHWISE = "depthwise"
UNFOLD = "unfold and GEMM"

# Kernels of an attention.
FUSED = "fused"
VECTOR = "fused for few queries"
UNFUSED = "unfused"


@dataclass(frozen=True)
class Conv:
    """A convolution of (N, *size, C) with a weight (O, *kernel, C / groups); 1 to 3 spatial axes."""

    n: int
    size: tuple[int, ...]
    c: int
    o: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad_low: tuple[int, ...]
    pad_high: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int = 1
    flip: bool = False

    @classmethod
    def simple(cls, n, size, c, o, kernel, stride=1, padding=0, **rest) -> "Conv":
        """Equal strides, paddings and dilations (`kernel_dilation`, `input_dilation`) along all axes."""

        def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
            return value if isinstance(value, tuple) else (value,) * len(size)

        for name in "kernel_dilation", "input_dilation":
            rest[name] = each(rest.get(name, 1))
        padding = each(padding)
        return cls(n, tuple(size), c, o, each(kernel), each(stride), padding, padding, **rest)

    @property
    def out_size(self) -> tuple[int, ...]:
        sizes = []
        for i, n in enumerate(self.size):
            span = (n - 1) * self.input_dilation[i] + 1 + self.pad_low[i] + self.pad_high[i]
            reach = (self.kernel[i] - 1) * self.kernel_dilation[i] + 1
            sizes.append((span - reach) // self.stride[i] + 1)
        return tuple(sizes)

    @property
    def rows(self) -> int:
        """Output pixels of the batch: M of the matrix product that the convolution is."""
        return self.n * prod(self.out_size)

    @property
    def depth(self) -> int:
        """K of that matrix product."""
        return prod(self.kernel) * self.c // self.groups

    @property
    def flops(self) -> int:
        """Two a multiply-add, by the definition of a convolution, whatever the kernel saves."""
        return 2 * self.rows * self.depth * self.o


def conv_route(conv: Conv, winograd_budget: int | None = None, itemsize: int = 2) -> str:
    """The kernel of a convolution on Metal.

    `winograd_budget` is what Winograd may take in bytes (MLX: three quarters of the recommended working
    set); None for plenty. `itemsize` is that of the activations.
    """
    match len(conv.size):
        case 1:
            return _conv1d_route(conv, winograd_budget, itemsize)
        case 2:
            return _conv2d_route(conv, winograd_budget, itemsize)
        case 3:
            return _conv3d_route(conv)
    raise ValueError(f"a convolution over {len(conv.size)} axes: MLX has kernels for 1, 2 and 3")


def _conv2d_route(conv: Conv, winograd_budget: int | None, itemsize: int) -> str:
    c, o = conv.c // conv.groups, conv.o // conv.groups
    ones = (1, 1)
    plain_input, plain_kernel = conv.input_dilation == ones, conv.kernel_dilation == ones
    fits = _loads(c) and _stores(o)
    if conv.groups > 1:
        if not plain_input:
            return UNFOLD
        if (
            c == o == 1
            and plain_kernel
            and max(conv.kernel) <= 7
            and max(conv.stride) <= 2
            and conv.c % 16 == 0
            and conv.c == conv.o
        ):
            return DEPTHWISE
        return IMPLICIT if fits else UNFOLD
    if (
        not conv.flip
        and conv.stride == ones
        and plain_kernel
        and plain_input
        and conv.kernel == (3, 3)
        and c % 32 == 0
        and o % 32 == 0
        and conv.n * prod(conv.size) >= 4096
        and c + o >= 256
        and (winograd_budget is None or Winograd.of(conv, n=1).bytes(itemsize) <= winograd_budget)
    ):
        return WINOGRAD
    if (
        conv.stride == ones
        and plain_input
        and conv.rows >= 256
        and prod(conv.kernel) >= 9
        and not _loads(c)
        and _stores(o)
    ):
        return IMPLICIT_PADDED
    if plain_input and fits:
        return IMPLICIT
    if (c % 16 == 0 and o % 16 == 0) or conv.rows >= 256:
        return IMPLICIT_GENERAL
    return UNFOLD


def _conv1d_route(conv: Conv, winograd_budget: int | None, itemsize: int) -> str:
    """A conv2d of width one, where that has a specialised kernel."""
    c, o = conv.c // conv.groups, conv.o // conv.groups
    plain_input = conv.input_dilation == (1,)
    if (
        plain_input
        and conv.groups == conv.c == conv.o
        and conv.stride == conv.kernel_dilation == (1,)
        and conv.pad_low == (0,)
        and not conv.flip
    ):
        return DEPTHWISE
    if not (plain_input and _loads(c) and _stores(o)):
        return UNFOLD
    flat = Conv(
        conv.n,
        (*conv.size, 1),
        conv.c,
        conv.o,
        (*conv.kernel, 1),
        (*conv.stride, 1),
        (*conv.pad_low, 0),
        (*conv.pad_high, 0),
        (*conv.kernel_dilation, 1),
        (*conv.input_dilation, 1),
        conv.groups,
        conv.flip,
    )
    return _conv2d_route(flat, winograd_budget, itemsize)


def _conv3d_route(conv: Conv) -> str:
    c, o = conv.c // conv.groups, conv.o // conv.groups
    plain_input = conv.input_dilation == (1, 1, 1)
    fits = c % 16 == 0 and _stores(o)
    if conv.groups == 1 and plain_input and not fits:
        return IMPLICIT_3D_PADDED
    if (
        conv.n == 1
        and conv.groups == 1
        and plain_input
        and fits
        and conv.kernel[0] <= 7
        and conv.stride[0] == conv.kernel_dilation[0] == 1
        and conv.pad_low[0] == conv.pad_high[0] == 0
    ):
        return BY_PLANES
    return IMPLICIT_3D if plain_input and fits else UNFOLD


def _loads(c: int) -> bool:
    """Whether the specialised implicit GEMM has a loader for `c` input channels."""
    return c <= 4 or c % 16 == 0


def _stores(o: int) -> bool:
    return o <= 16 or o % 16 == 0


@dataclass(frozen=True)
class Winograd:
    """What one Winograd convolution keeps beside its input and output, in elements of the activations."""

    tiles: int
    padded: int  # the input with a border, to whole tiles
    filters: int  # 64 for each pair of channels, made anew on every call
    inputs: int
    outputs: int

    @classmethod
    def of(cls, conv: Conv, n: int | None = None) -> "Winograd":
        """For the whole batch, or for `n` images of it."""
        n = conv.n if n is None else n
        height, width = (ceil(size / 6) for size in conv.out_size)
        tiles = n * height * width
        padded = n * (6 * height + 2) * (6 * width + 2) * conv.c
        return cls(tiles, padded, 64 * conv.c * conv.o, 64 * tiles * conv.c, 64 * tiles * conv.o)

    def bytes(self, itemsize: int) -> int:
        """All of it, which is alive at once."""
        return itemsize * (self.padded + self.filters + self.inputs + self.outputs)

    def flops(self, conv: Conv) -> int:
        """Of the 64 matrix products that replace the convolution."""
        return 2 * 64 * self.tiles * conv.c * conv.o


def attention_route(
    queries: int,
    keys: int,
    dim: int,
    value_dim: int | None = None,
    query_heads: int = 1,
    key_heads: int = 1,
    mask: str | None = None,
    gradient: bool = False,
    matrix_units: bool = False,
    force_fused: bool = False,
) -> str:
    """The kernel of `mx.fast.scaled_dot_product_attention` on Metal for fp32, fp16 and bf16.

    Args:
        queries, keys: tokens.
        dim, value_dim: channels of a head of queries and keys, and of values (None: the same).
        query_heads, key_heads: heads.
        mask: None, "causal" or "array".
        gradient: whether a gradient is being traced.
        matrix_units: whether MLX uses the matrix units of the GPU (M5 with macOS 26.2).
        force_fused: the argument of that name. ValueError where there is no kernel to force.
    """
    value_dim = dim if value_dim is None else value_dim
    causal = mask == "causal"
    if queries <= 8:
        few_rows = queries <= keys and queries * (query_heads // key_heads) <= 32
        shapes = {(d, d) for d in (64, 96, 128, 256)} | {(192, 128)}
        exists = few_rows and (dim, value_dim) in shapes | {(192, 192)}
        chosen = few_rows and (dim, value_dim) in shapes
        kernel = VECTOR
    else:
        right_mask = not causal or queries <= keys
        exists = right_mask and dim == value_dim and dim in (64, 72, 80, 96, 128, 192, 256)
        pays = dim <= 128 or (dim == 256 and causal and queries >= 1024 and matrix_units)
        chosen = exists and pays
        kernel = FUSED
    if force_fused:
        if not exists:
            raise ValueError(
                f"force_fused: no kernel for {queries} queries, {keys} keys, head dimensions {dim} and "
                f"{value_dim}, mask {mask}"
            )
        return kernel
    return kernel if chosen and not gradient else UNFUSED
