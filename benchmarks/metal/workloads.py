"""Forwards of the networks at the reference sizes, traced without weights."""

from dataclasses import dataclass

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d import AutoencoderKL, UNet3DConditionModel

from .predict import Prediction, hoisted, predict
from .trace import hollow, trace

TOKENS = 77


@dataclass(frozen=True)
class Workload:
    """A clip in pixels and frames; with guidance two samples go through the network."""

    height: int
    width: int
    frames: int
    guidance: bool = True

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}" + ("" if self.guidance else ", no guidance")


REFERENCE = (Workload(256, 256, 16), Workload(320, 576, 24), Workload(576, 1024, 24))


def full_unet() -> UNet3DConditionModel:
    """ModelScope's size: 1.41 B parameters, none of them drawn."""
    return UNet3DConditionModel()


def full_vae() -> AutoencoderKL:
    """Stable Diffusion's and ModelScope's."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=256,
    )


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array that takes one number's memory."""
    array = mx.broadcast_to(mx.zeros((), dtype=dtype), shape)
    mx.eval(array)
    return array


def predict_unet(
    unet: UNet3DConditionModel, work: Workload, dtype: mx.Dtype = mx.float16, scale: int = 8, **options
) -> tuple[Prediction, Prediction]:
    """A step of denoising, and what is done once for a prompt. The network is emptied of its weights.

    `scale` is the VAE's; `options` are those of `predict`.
    """
    hollow(unet, dtype)
    batch = 2 if work.guidance else 1
    config = unet.config
    sample = empty((batch, config.in_channels, work.frames, work.height // scale, work.width // scale), dtype)
    text = empty((batch, TOKENS, config.cross_attention_dim), dtype)
    timestep = empty((), mx.float32)

    def step(unet: UNet3DConditionModel, sample: mx.array, timestep: mx.array, text: mx.array) -> mx.array:
        return unet(sample, timestep, text).sample

    graph = trace(step, sample, timestep, text, model=unet)
    parts = hoisted(graph, graph.inputs[2])
    return tuple(predict(part, **options) for part in parts)


def predict_decode(
    vae: AutoencoderKL, work: Workload, dtype: mx.Dtype = mx.float32, **options
) -> tuple[Prediction, int]:
    """The decoding of one chunk of frames, as large as the pipelines make it, and the number of chunks."""
    hollow(vae, dtype)
    scale = vae.spatial_factor
    frames = min(work.frames, vae.frames_per_chunk(work.height, work.width))
    latents = empty((frames, vae.config.latent_channels, work.height // scale, work.width // scale), dtype)
    graph = trace(lambda vae, latents: vae.decode(latents), latents, model=vae)
    return predict(graph, **options), -(-work.frames // frames)


def demo() -> tuple[UNet3DConditionModel, AutoencoderKL]:
    """The networks that come with the package."""
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained("demo")
    return pipe.unet, pipe.vae
