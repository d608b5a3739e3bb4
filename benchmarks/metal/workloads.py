"""Forwards of the networks at the reference sizes, traced without weights."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    I2VGenXLUNet,
    TextContext,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from mlx.utils import tree_flatten, tree_unflatten
from mlx_unet3d.memory.forwards import Latents, unet_inputs
from mlx_unet3d.models.video_unet import VideoUNet

from .predict import Prediction, hoisted, predict
from .trace import hollow, trace


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


def animatediff() -> UNetMotionModel:
    """Stable Diffusion 1.5 with a motion adapter of the second version: 1.31 B parameters."""
    return UNetMotionModel(cross_attention_dim=768)


def animatediff_sdxl() -> UNetMotionModel:
    """Stable Diffusion XL with its motion adapter: 2.80 B parameters."""
    return UNetMotionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
        num_attention_heads=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        use_motion_mid_block=False,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


FAMILY: dict[str, tuple[Callable[[], VideoUNet], Workload]] = {
    "animatediff": (animatediff, Workload(512, 512, 16)),
    "animatediff-sdxl": (animatediff_sdxl, Workload(1024, 1024, 16)),
    "svd": (UNetSpatioTemporalConditionModel, Workload(576, 1024, 14)),
    "svd-xt": (UNetSpatioTemporalConditionModel, Workload(576, 1024, 25)),
    "i2vgen-xl": (I2VGenXLUNet, Workload(704, 1280, 16)),
}
"""The other UNets at the sizes of their checkpoints."""


def full_vae() -> AutoencoderKL:
    """Stable Diffusion's and ModelScope's."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=256,
    )


def full_temporal_vae() -> AutoencoderKLTemporalDecoder:
    """Stable Video Diffusion's."""
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=768,
    )


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array that takes one number's memory."""
    array = mx.broadcast_to(mx.zeros((), dtype=dtype), shape)
    mx.eval(array)
    return array


def predict_unet(
    unet: VideoUNet, work: Workload, dtype: mx.Dtype = mx.float16, scale: int = 8, **options
) -> tuple[Prediction, Prediction]:
    """A step of denoising, and what is done once for a prompt. The network is emptied of its weights.

    `scale` is the VAE's; `options` are those of `predict`.
    """
    hollow(unet, dtype)
    latents = Latents(2 if work.guidance else 1, work.frames, work.height // scale, work.width // scale)
    inputs = unet_inputs(type(unet), unet.config, latents, dtype)
    names, arrays = zip(*tree_flatten(inputs), strict=True)

    def step(unet: VideoUNet, *arrays: mx.array) -> mx.array:
        made = tree_unflatten(list(zip(names, arrays, strict=True)))
        if isinstance(unet, I2VGenXLUNet):  # made once for all steps, with the tokens of the image
            made["encoder_hidden_states"] = TextContext(made["encoder_hidden_states"])
        return unet(**made).sample

    graph = trace(step, *(empty(a.shape, a.dtype) for a in arrays), model=unet)
    parts = hoisted(graph, graph.inputs[names.index("encoder_hidden_states")])
    return tuple(predict(part, **options) for part in parts)


def predict_decode(
    vae: AutoencoderKL, work: Workload, dtype: mx.Dtype = mx.float32, **options
) -> tuple[Prediction, int]:
    """The decoding of one chunk of frames, as large as the pipelines make it, and the number of chunks.

    A temporal decoder takes the whole clip, or as much of it as MLX can index.
    """
    hollow(vae, dtype)
    scale = vae.spatial_factor
    temporal = isinstance(vae, AutoencoderKLTemporalDecoder)
    most = (vae.check_frame if temporal else vae.frames_per_chunk)(work.height, work.width)
    frames = min(work.frames, most)
    latents = empty((frames, vae.config.latent_channels, work.height // scale, work.width // scale), dtype)
    more = (frames,) if temporal else ()
    graph = trace(lambda vae, latents: vae.decode(latents, *more), latents, model=vae)
    return predict(graph, **options), -(-work.frames // frames)


def demo() -> tuple[UNet3DConditionModel, AutoencoderKL]:
    """The networks that come with the package."""
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained("demo")
    return pipe.unet, pipe.vae
