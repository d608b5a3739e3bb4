"""Group normalization as torch groups it."""

import mlx.nn as nn


def group_norm(num_groups: int, channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm over a channels-last array (N, ..., C), statistics in fp32 over all but N.

    `pytorch_compatible` is essential: MLX's default puts other channels into a group and takes the
    variance in half precision.
    """
    if channels % num_groups:
        raise ValueError(
            f"norm_num_groups={num_groups} does not divide {channels} channels; "
            "every entry of block_out_channels must be a multiple of it"
        )
    return nn.GroupNorm(num_groups, channels, eps=eps, pytorch_compatible=True)
