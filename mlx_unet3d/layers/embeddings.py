"""Time embeddings: a sinusoid of the timestep, then a two-layer MLP."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .activations import get_activation


def timestep_sinusoid(timesteps: mx.array, dim: int, max_period: float = 10_000.0) -> mx.array:
    """Sinusoid of (B,) timesteps -> (B, dim) in fp32: cosines first, then sines.

    Equals diffusers' `Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)`; for odd `dim` the
    last column is zero. The timesteps stay in fp32: bf16 cannot tell 999 from 1000.
    """
    half = dim // 2
    # In fp32 on purpose: at t = 999 the rounding of a frequency changes the fifth digit of its cosine, and
    # the networks were trained with torch's rounding.
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = timesteps.astype(mx.float32)[:, None] * mx.array(np.exp(exponent))[None]
    columns = [mx.cos(angles), mx.sin(angles)]
    if dim % 2:
        columns.append(mx.zeros((angles.shape[0], 1), dtype=mx.float32))
    return mx.concatenate(columns, axis=-1)


NARROWEST = 4
"""Columns of the narrowest embedding of a guidance scale: sine and cosine of two frequencies."""


def guidance_embedding(scale: float, dim: int, rows: int) -> mx.array:
    """Sinusoid of a guidance scale, the same in all rows -> (rows, dim) in fp32: sines first, then cosines.

    The frequencies are 1000 / 10000^(k / (n - 1)), k = 0 ... n - 1 of n = dim // 2; for odd `dim` the last
    column is zero. Equals `get_guidance_scale_embedding` of diffusers' pipelines and `get_w_embedding` of
    T2V-Turbo. Raises ValueError for fewer than `NARROWEST` columns.
    """
    half = dim // 2
    if dim < NARROWEST:
        raise ValueError(
            f"time_cond_proj_dim={dim} is too narrow for a guidance scale; it must be at least {NARROWEST}"
        )
    # Rounded to fp32 where torch rounds: at 1000 * scale the last bit of a frequency is seen in its sine.
    spacing = np.float32(math.log(10_000.0)) / np.float32(half - 1)
    exponent = np.arange(half, dtype=np.float32) * -spacing
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = (np.float32(scale) * np.float32(1000) * frequencies).astype(np.float64)
    row = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2)]).astype(np.float32)
    return mx.array(np.tile(row, (rows, 1)))


class TimestepEmbedding(nn.Module):
    """MLP over the sinusoid, (B, in_channels) -> (B, out_dim); diffusers' class of that name.

    `out_dim` None stands for `time_embed_dim`.
    `cond_proj_dim` adds the projection of a second condition (B, cond_proj_dim) to the input, such as the
    guidance embedding of consistency models.
    """

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        cond_proj_dim: int | None = None,
        out_dim: int | None = None,
    ):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        if cond_proj_dim is not None:
            self.cond_proj = nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim if out_dim is None else out_dim)
        self.act = get_activation(act_fn)

    def __call__(self, sample: mx.array, condition: mx.array | None = None) -> mx.array:
        if condition is not None:
            sample = sample + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(sample)))
