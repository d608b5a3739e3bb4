"""How a network sees a long clip: in windows, with FreeNoise, with a text a frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..layers.free_noise import FreeNoise
from ..layers.text_context import TextContext
from ..models.pretrained import PretrainedModel
from ..models.unet_motion import UNetMotionModel
from .forwards import Inputs
from .plans import Video

if TYPE_CHECKING:
    from ..pipelines.windows import ContextWindows


@dataclass(frozen=True)
class LongClip:
    """Settings that decide how many frames and texts a forward takes; see `plan` for the attributes."""

    free_noise: FreeNoise | None = None
    context_windows: ContextWindows | None = None
    text_of_frames: bool = False

    def check(self, kind: type[PretrainedModel]) -> None:
        """Raise ValueError for what a class of networks does not have."""
        for name in ("free_noise", "text_of_frames"):
            if getattr(self, name) and not issubclass(kind, UNetMotionModel):
                raise ValueError(f"{name} is for a UNetMotionModel alone, not a {kind.__name__}")

    def seen(self, video: Video) -> Video:
        """The frames of a video that a forward takes."""
        windows = self.context_windows
        return video if windows is None else replace(video, frames=min(windows.length, video.frames))

    def forwards(self, video: Video) -> int:
        """The windows of a step."""
        return 1 if self.context_windows is None else len(self.context_windows.windows(video.frames, 0))

    def of_frames(self, inputs: Inputs, frames: int) -> Inputs:
        """The inputs of a forward, with a text a frame where there is one."""
        if not self.text_of_frames:
            return inputs
        rows, *rest = inputs["encoder_hidden_states"].shape
        text = mx.zeros((rows * frames, *rest), inputs["encoder_hidden_states"].dtype)
        return inputs | {"encoder_hidden_states": text}

    @property
    def projects_anew(self) -> bool:
        """True if keys and values of the text are made for each window; else they stay for all steps."""
        return self.text_of_frames and self.context_windows is not None

    def context(self, text: mx.array) -> Any:
        """The text as a forward takes it."""
        return text if self.projects_anew else TextContext(text)
