"""Small networks, and the memory that they take at their peak."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_unet3d import DDIMScheduler, UNet3DConditionModel
from mlx_unet3d.pipelines.denoising import denoise
from mlx_unet3d.pipelines.guidance import Guidance
from mlx_unet3d.pipelines.sampling import Sampling
from mlx_unet3d.pipelines.windows import ContextWindows, Windowed
from tiny import SCHEDULER

UNET = dict(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=12,
    attention_head_dim=8,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=16,
)
VAE = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=4,
)


def peak_of(fn: Callable[[], mx.array]) -> tuple[mx.array, int]:
    """Result, and bytes at the peak above what was there."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = fn()
    mx.eval(result)
    mx.synchronize()
    return result, mx.get_peak_memory() - before


def run_step(
    unet: UNet3DConditionModel,
    guidance: float,
    sequential: bool,
    frames: int = 4,
    size: int = 16,
    steps: int = 1,
    context: ContextWindows | None = None,
    text_of_frames: bool = False,
    **savings: int,
) -> Callable[[], mx.array]:
    """The latents after so many steps, as a function."""
    rng = np.random.default_rng(0)
    latents = mx.array(rng.standard_normal((1, 4, frames, size, size), dtype=np.float32))
    rows = 2 if guidance > 1 else 1
    texts = (frames, 77, 12) if text_of_frames else (77, 12)
    states = mx.array(rng.standard_normal((rows, *texts), dtype=np.float32))
    mx.eval(latents, states)
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    sampling = Sampling(num_inference_steps=steps, guidance_scale=guidance, **savings)
    negative, positive = ({"encoder_hidden_states": states[i : i + 1]} for i in (0, rows - 1))

    def network(*args, **inputs):
        return unet(*args, **inputs).sample

    def run():
        predict = Guidance(
            network, sampling, positive, negative, steps=steps, dtype=unet.dtype, sequential=sequential
        )
        if context is not None:
            predict = Windowed(predict, context)
        return [record.latents for record in denoise(predict, scheduler, latents, folded=True)][-1]

    return run
