"""Layer normalization, and group normalization with torch's groups, fused with adjacent operations."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .. import cpu, operations
from .activations import silu
from .fused import affine, affine_silu


class LayerNorm(nn.LayerNorm):
    """MLX's layer norm, a single operation to a tracer."""

    def __call__(self, x: mx.array) -> mx.array:
        return operations.layer_norm(x, self.get("weight"), self.get("bias"), self.eps)


class GroupNorm(nn.GroupNorm):
    """Normalizes groups of adjacent channels of (N, ..., C), with statistics in fp32 over all axes except N.

    A layer norm computes it, between two copies that make each group contiguous and restore the order. The
    addition before, and the scale, shift and activation after, are part of these copies.
    """

    def __call__(
        self,
        x: mx.array,
        *,
        shift: mx.array | None = None,
        act: Callable[[mx.array], mx.array] | None = None,
        swap: bool = False,
    ) -> mx.array:
        """act(norm(x + shift)), (N, ..., C) -> (N, ..., C).

        Args:
            shift: (C,) or (B, C) with B dividing N; None for none.
            act: None for none.
            swap: (B, F, L, C) -> (B, L, F, C), the second and third axes of the result exchanged.
        """
        if cpu.active(x):
            return self._on_cpu(x, shift, act, swap)
        n, channels = x.shape[0], x.shape[-1]
        groups, width = self.num_groups, x.shape[-1] // self.num_groups
        # (N, ..., C) -> (N, G, S, C/G), a view
        y = x.reshape(n, -1, groups, width).transpose(0, 2, 1, 3)
        length = y.shape[2]
        if shift is not None:
            shift = shift.reshape(-1, 1, groups, 1, width)
            y = y.reshape(shift.shape[0], -1, groups, length, width) + shift
        y = operations.layer_norm(y.reshape(n, groups, length * width), None, None, self.eps)
        if swap:
            # (B, G, F*L*C/G) -> (B, L, F, G, C/G)
            _, frames, pixels, _ = x.shape
            y = y.reshape(n, groups, frames, pixels, width).transpose(0, 3, 2, 1, 4)
            shape = (n, pixels, frames, channels)
        else:
            y = y.reshape(n, groups, length, width).transpose(0, 2, 1, 3)
            shape = x.shape
        weight, bias = self.weight.reshape(groups, width), self.bias.reshape(groups, width)
        if act is silu or act is nn.silu:
            return affine_silu(y, weight, bias).reshape(shape)
        y = affine(y, weight, bias).reshape(shape)
        return y if act is None else act(y)

    def _on_cpu(
        self, x: mx.array, shift: mx.array | None, act: Callable[[mx.array], mx.array] | None, swap: bool
    ) -> mx.array:
        if shift is not None:
            shift = shift.reshape(-1, 1, x.shape[-1])
            # (N, ..., C) -> (B, S, C) and back
            x = (x.reshape(shift.shape[0], -1, x.shape[-1]) + shift).reshape(x.shape)
        y = cpu.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        y = y if act is None else act(y)
        return y.transpose(0, 2, 1, 3) if swap else y


def group_norm(num_groups: int, channels: int, eps: float = 1e-5) -> GroupNorm:
    """Return a `GroupNorm`; ValueError where the groups do not divide the channels."""
    if channels % num_groups:
        raise ValueError(
            f"norm_num_groups={num_groups} does not divide {channels} channels; "
            "every entry of block_out_channels must be a multiple of it"
        )
    return GroupNorm(num_groups, channels, eps=eps, pytorch_compatible=True)
