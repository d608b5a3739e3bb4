"""Pipelines: videos from prompts, from images and from videos."""

from .animatediff import AnimateDiffPipeline
from .animatediff_sdxl import AnimateDiffSDXLPipeline
from .animatediff_video_to_video import AnimateDiffVideoToVideoPipeline
from .decoding import VideoOutput
from .denoising import DenoisingStep
from .i2vgen_xl import I2VGenXLPipeline
from .image import ImageStates
from .loading import DiffusionPipeline, load_pipeline
from .sampling import Sampling
from .stable_video import StableVideoDiffusionPipeline
from .text import TextStates
from .text_to_video import TextToVideoPipeline
from .video_to_video import VideoToVideoPipeline
from .windows import ContextWindows

__all__ = [
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "ContextWindows",
    "DenoisingStep",
    "DiffusionPipeline",
    "I2VGenXLPipeline",
    "ImageStates",
    "Sampling",
    "StableVideoDiffusionPipeline",
    "TextStates",
    "TextToVideoPipeline",
    "VideoOutput",
    "VideoToVideoPipeline",
    "load_pipeline",
]
