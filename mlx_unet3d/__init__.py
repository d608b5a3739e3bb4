"""3D-UNet video diffusion in MLX: diffusers' UNet3DConditionModel and what surrounds it."""

from typing import Any

from . import blas
from .backend import missing_backend

blas.preload()  # before anything imports mlx.core

from .version import __version__  # noqa: E402

if missing_backend() is None:
    from . import media, memory
    from .layers.attention import TextContext
    from .models.autoencoder_kl import AutoencoderKL
    from .models.clip_text import CLIPTextModel
    from .models.feature_cache import FeatureCache
    from .models.unet_3d_condition import UNet3DConditionModel, UNet3DConditionOutput
    from .pipelines import DenoisingStep, TextToVideoPipeline, VideoOutput, VideoToVideoPipeline
    from .schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )
    from .tokenizer import CLIPTokenizer
else:
    # Importing the package works, so that the command can say in one line how to mend it.
    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(missing_backend())


__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DenoisingStep",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FeatureCache",
    "LCMScheduler",
    "PNDMScheduler",
    "TextContext",
    "TextToVideoPipeline",
    "UNet3DConditionModel",
    "UNet3DConditionOutput",
    "UniPCMultistepScheduler",
    "VideoOutput",
    "VideoToVideoPipeline",
    "__version__",
    "media",
    "memory",
]
