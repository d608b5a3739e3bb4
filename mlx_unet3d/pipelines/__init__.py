"""Pipelines: videos from prompts, from images and from videos."""

from .decoding import VideoOutput
from .denoising import DenoisingStep
from .text_to_video import TextToVideoPipeline
from .video_to_video import VideoToVideoPipeline

__all__ = ["DenoisingStep", "TextToVideoPipeline", "VideoOutput", "VideoToVideoPipeline"]
