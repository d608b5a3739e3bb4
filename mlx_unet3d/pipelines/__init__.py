"""Pipelines: what turns prompts and videos into videos."""

from .base import VideoOutput
from .denoising import DenoisingStep
from .text_to_video import TextToVideoPipeline
from .video_to_video import VideoToVideoPipeline

__all__ = ["DenoisingStep", "TextToVideoPipeline", "VideoOutput", "VideoToVideoPipeline"]
