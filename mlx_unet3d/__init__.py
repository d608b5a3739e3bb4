"""3D-UNet video diffusion in MLX: diffusers' UNet3DConditionModel and what surrounds it."""

import sys
from typing import Any

from . import blas
from .backend import missing_backend

blas.preload()  # before anything imports mlx.core

from .diffusers_names import instead  # noqa: E402
from .version import __version__  # noqa: E402

if missing_backend() is None:
    from . import media, memory
    from .image_processor import CLIPImageProcessor
    from .layers.text_context import TextContext
    from .media import export_to_gif, export_to_video
    from .models.autoencoder_kl import AutoencoderKL
    from .models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
    from .models.clip_text import CLIPTextModel, CLIPTextModelOutput, CLIPTextModelWithProjection
    from .models.clip_vision import CLIPVisionModelOutput, CLIPVisionModelWithProjection
    from .models.feature_cache import FeatureCache
    from .models.motion_adapter import MotionAdapter
    from .models.unet_3d_condition import UNet3DConditionModel, UNet3DConditionOutput
    from .models.unet_i2vgen_xl import I2VGenXLUNet, I2VGenXLUNetOutput
    from .models.unet_motion import UNetMotionModel, UNetMotionOutput
    from .models.unet_spatio_temporal import (
        UNetSpatioTemporalConditionModel,
        UNetSpatioTemporalConditionOutput,
    )
    from .pipelines import (
        AnimateDiffPipeline,
        AnimateDiffSDXLPipeline,
        AnimateDiffVideoToVideoPipeline,
        ContextWindows,
        DenoisingStep,
        DiffusionPipeline,
        I2VGenXLPipeline,
        ImageStates,
        Sampling,
        StableVideoDiffusionPipeline,
        TextStates,
        TextToVideoPipeline,
        VideoOutput,
        VideoToVideoPipeline,
        load_pipeline,
    )
    from .schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )
    from .tokenizer import CLIPTokenizer

    # diffusers' names of them.
    TextToVideoSDPipeline = TextToVideoPipeline
    VideoToVideoSDPipeline = VideoToVideoPipeline


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if missing_backend() is not None:
        # Importing the package works, so that the command can say in one line how to mend it.
        raise ImportError(missing_backend())
    message = f"mlx_unet3d has no {name}{instead(name)}"
    # `from mlx_unet3d import ...` makes another message of an AttributeError.
    imported = sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap"
    raise (ImportError if imported else AttributeError)(message)


__all__ = [
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "AutoencoderKL",
    "AutoencoderKLTemporalDecoder",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTextModelOutput",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "CLIPVisionModelOutput",
    "CLIPVisionModelWithProjection",
    "ContextWindows",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DenoisingStep",
    "DiffusionPipeline",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FeatureCache",
    "HeunDiscreteScheduler",
    "I2VGenXLPipeline",
    "I2VGenXLUNet",
    "I2VGenXLUNetOutput",
    "ImageStates",
    "LCMScheduler",
    "MotionAdapter",
    "PNDMScheduler",
    "Sampling",
    "StableVideoDiffusionPipeline",
    "TCDScheduler",
    "TextContext",
    "TextStates",
    "TextToVideoPipeline",
    "TextToVideoSDPipeline",
    "UNet3DConditionModel",
    "UNet3DConditionOutput",
    "UNetMotionModel",
    "UNetMotionOutput",
    "UNetSpatioTemporalConditionModel",
    "UNetSpatioTemporalConditionOutput",
    "UniPCMultistepScheduler",
    "VideoOutput",
    "VideoToVideoPipeline",
    "VideoToVideoSDPipeline",
    "__version__",
    "export_to_gif",
    "export_to_video",
    "load_pipeline",
    "media",
    "memory",
]
