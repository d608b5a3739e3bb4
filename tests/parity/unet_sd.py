"""ModelScope's original UNet in torch: its modules in their order, and its forward.

Written after Wang et al., arXiv:2308.06571, so that it has the names of the published file by construction.
Letters: B batch, F frames, N = B*F, C channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


class CrossAttention(nn.Module):
    def __init__(self, width: int, context_dim: int | None, heads: int):
        super().__init__()
        context_dim = width if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout())

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * functional.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_dim: int | None, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(width, None, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GEGLU(width), nn.Dropout(), nn.Linear(4 * width, width))
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context=None):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Among the pixels of a frame, and from them to the text."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, context):
        # (N, C, H, W) -> (N, H*W, C)
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        h = self.proj_out(self.transformer_blocks[0](h, context))
        return x + h.transpose(1, 2).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Among the frames of a pixel, through 1-D convolutions of size 1."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.proj_in = nn.Conv1d(channels, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, None, heads)])
        self.proj_out = nn.Conv1d(width, channels, 1)

    def forward(self, x):
        """(B, C, F, H, W), as it came."""
        b, c, f, height, w = x.shape
        h = self.norm(x).permute(0, 3, 4, 1, 2).reshape(b * height * w, c, f)
        h = self.transformer_blocks[0](self.proj_in(h).transpose(1, 2))
        h = self.proj_out(h.transpose(1, 2))
        return x + h.reshape(b, height, w, c, f).permute(0, 3, 4, 1, 2)


class TemporalConv(nn.Module):
    def __init__(self, channels: int):
        super().__init__()

        def stage(*middle: nn.Module) -> nn.Sequential:
            convolution = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
            return nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), *middle, convolution)

        self.conv1 = stage()
        self.conv2, self.conv3, self.conv4 = (stage(nn.Dropout()) for _ in range(3))

    def forward(self, x):
        """(B, C, F, H, W), as it came."""
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


class ResBlock(nn.Module):
    def __init__(self, channels: int, embed_dim: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity()
        if out_channels != channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)
        self.temopral_conv = TemporalConv(out_channels)

    def forward(self, x, embedding):
        h = self.in_layers(x) + self.emb_layers(embedding)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNetSD(nn.Module):
    """Transformers are in the finest `attention_levels` resolutions, and in the middle."""

    def __init__(
        self,
        dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: int,
        context_dim: int,
        head_dim: int = 8,
    ):
        super().__init__()
        self.dim, embed_dim = dim, 4 * dim
        self.time_embed = nn.Sequential(nn.Linear(dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))

        def layer(channels: int, out_channels: int, level: int) -> list[nn.Module]:
            modules: list[nn.Module] = [ResBlock(channels, embed_dim, out_channels)]
            if level < attention_levels:
                modules.append(SpatialTransformer(out_channels, out_channels // head_dim, context_dim))
                modules.append(TemporalTransformer(out_channels, out_channels // head_dim, head_dim))
            return modules

        widths = [dim * factor for factor in dim_mult]
        last = len(widths) - 1
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(4, dim, 3, padding=1), TemporalTransformer(dim, 8, head_dim)])]
        )
        channels, skips = dim, [dim]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(nn.ModuleList(layer(channels, width, level)))
                channels = width
                skips.append(channels)
            if level != last:
                self.input_blocks.append(Downsample(channels))
                skips.append(channels)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(channels, embed_dim, channels),
                SpatialTransformer(channels, channels // head_dim, context_dim),
                TemporalTransformer(channels, channels // head_dim, head_dim),
                ResBlock(channels, embed_dim, channels),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(num_res_blocks + 1):
                modules = layer(channels + skips.pop(), widths[level], level)
                channels = widths[level]
                if level and i == num_res_blocks:
                    modules.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(modules))
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, 4, 3, padding=1))

    def forward(self, x, timesteps, context):
        """(B, 4, F, H, W), (B,), (B, L, context_dim) -> (B, 4, F, H, W)."""
        batch, _, frames = x.shape[:3]
        half = self.dim // 2
        angles = timesteps[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        embedding, context = (y.repeat_interleave(frames, 0) for y in (embedding, context))

        def over_time(module: nn.Module, x):
            # (N, C, H, W) -> (B, C, F, H, W), and back
            return module(x.unflatten(0, (batch, frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)

        def run(module: nn.Module, x):
            if isinstance(module, nn.ModuleList):
                for part in module:
                    x = run(part, x)
                return x
            if isinstance(module, ResBlock):
                return over_time(module.temopral_conv, module(x, embedding))
            if isinstance(module, SpatialTransformer):
                return module(x, context)
            return over_time(module, x) if isinstance(module, TemporalTransformer) else module(x)

        x = x.transpose(1, 2).flatten(0, 1)
        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], 1))
        return self.out(x).unflatten(0, (batch, frames)).transpose(1, 2)
