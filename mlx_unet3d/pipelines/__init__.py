"""Pipelines: videos from prompts, from images and from videos."""

from .animatediff import AnimateDiffPipeline
from .animatediff_sdxl import AnimateDiffSDXLPipeline
from .decoding import VideoOutput
from .denoising import DenoisingStep
from .text_to_video import TextToVideoPipeline
from .video_to_video import VideoToVideoPipeline
from .windows import ContextWindows

__all__ = [
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "ContextWindows",
    "DenoisingStep",
    "TextToVideoPipeline",
    "VideoOutput",
    "VideoToVideoPipeline",
]
