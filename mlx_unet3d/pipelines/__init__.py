"""Pipelines: videos from prompts and from videos."""

from .base import VideoOutput
from .denoising import DenoisingStep
from .text_to_video import TextToVideoPipeline
from .video_to_video import VideoToVideoPipeline

__all__ = ["DenoisingStep", "TextToVideoPipeline", "VideoOutput", "VideoToVideoPipeline"]
