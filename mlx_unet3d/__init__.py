"""3D-UNet video diffusion in MLX: diffusers' UNet3DConditionModel and what surrounds it."""

from . import blas

blas.preload()  # before anything imports mlx.core

from . import media, memory  # noqa: E402
from .image_processor import CLIPImageProcessor  # noqa: E402
from .layers.text_context import TextContext  # noqa: E402
from .models.autoencoder_kl import AutoencoderKL  # noqa: E402
from .models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder  # noqa: E402
from .models.clip_text import CLIPTextModel, CLIPTextModelOutput, CLIPTextModelWithProjection  # noqa: E402
from .models.clip_vision import CLIPVisionModelOutput, CLIPVisionModelWithProjection  # noqa: E402
from .models.feature_cache import FeatureCache  # noqa: E402
from .models.motion_adapter import MotionAdapter  # noqa: E402
from .models.unet_3d_condition import UNet3DConditionModel, UNet3DConditionOutput  # noqa: E402
from .models.unet_i2vgen_xl import I2VGenXLUNet, I2VGenXLUNetOutput  # noqa: E402
from .models.unet_motion import UNetMotionModel, UNetMotionOutput  # noqa: E402
from .models.unet_spatio_temporal import (  # noqa: E402
    UNetSpatioTemporalConditionModel,
    UNetSpatioTemporalConditionOutput,
)
from .pipelines import DenoisingStep, TextToVideoPipeline, VideoOutput, VideoToVideoPipeline  # noqa: E402
from .schedulers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from .tokenizer import CLIPTokenizer  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLTemporalDecoder",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTextModelOutput",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "CLIPVisionModelOutput",
    "CLIPVisionModelWithProjection",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DenoisingStep",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FeatureCache",
    "I2VGenXLUNet",
    "I2VGenXLUNetOutput",
    "LCMScheduler",
    "MotionAdapter",
    "PNDMScheduler",
    "TextContext",
    "TextToVideoPipeline",
    "UNet3DConditionModel",
    "UNet3DConditionOutput",
    "UNetMotionModel",
    "UNetMotionOutput",
    "UNetSpatioTemporalConditionModel",
    "UNetSpatioTemporalConditionOutput",
    "UniPCMultistepScheduler",
    "VideoOutput",
    "VideoToVideoPipeline",
    "__version__",
    "media",
    "memory",
]
