"""A plan of a run, and its parts: the video, the memory settings, the stages."""

from dataclasses import dataclass
from typing import Any

MARGIN = 0.9
"""The share of a budget that a plan uses: predictions are within a tenth of measured peaks."""


@dataclass(frozen=True)
class Settings:
    """Memory options of a pipeline, none of which changes the video beyond rounding.

    Attributes:
        sequential_guidance: two passes a step, for the negative prompt and the prompt.
        frames, pixels: taken at a time by spatial and by temporal layers; None for all.
    """

    sequential_guidance: bool = False
    frames: int | None = None
    pixels: int | None = None

    def __str__(self) -> str:
        parts = []
        if self.sequential_guidance:
            parts.append("guidance in two passes")
        if self.frames is not None:
            parts.append(f"spatial layers {self.frames} frame{'s' * (self.frames > 1)} at a time")
        if self.pixels is not None:
            parts.append(f"temporal layers {self.pixels} pixels at a time")
        return ", ".join(parts) or "defaults"

    def apply(self, pipe: Any) -> None:
        """Set them on a pipeline, on top of its own."""
        if self.sequential_guidance:
            pipe.enable_sequential_guidance()
        if self.frames is not None:
            pipe.unet.enable_frame_chunking(self.frames)
        if self.pixels is not None:
            pipe.unet.enable_pixel_chunking(self.pixels)


@dataclass(frozen=True)
class Video:
    """A video to make.

    Attributes:
        frames, height, width: of each video; height and width in pixels.
        batch: videos at once.
        guidance: True where the network sees a negative prompt too.
        encoded: True where it starts from a video, which the VAE encodes.
    """

    frames: int
    height: int
    width: int
    batch: int = 1
    guidance: bool = True
    encoded: bool = False

    def __str__(self) -> str:
        count = f"{self.batch} videos of " if self.batch > 1 else ""
        frames = f"{self.frames} frame{'s' * (self.frames > 1)}"
        return f"{count}{frames} of {self.width}x{self.height}"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: "prompt", "image", "encode", "denoise" or "decode".
        weights: bytes of the networks that are in memory.
        peak: bytes at its worst moment, weights included.
        largest: bytes of its largest single buffer.
        at: the operation of the worst moment.
    """

    name: str
    weights: int
    peak: int
    largest: int
    at: str


@dataclass(frozen=True)
class Plan:
    """A prediction, see `plan`.

    Attributes:
        video: as asked for.
        settings: the cheapest ones with which it fits; those that take least memory where none fits.
        stages: in order.
        budget: bytes that may be used; None for any.
        nearest: the largest video like this one that fits, where this one does not, and None where none does.
        step_seconds: of a denoising step at the peak rates of the chip; None without a chip.
    """

    video: Video
    settings: Settings
    stages: tuple[Stage, ...]
    budget: int | None = None
    nearest: Video | None = None
    step_seconds: float | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of all stages."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """True where the peak is within nine tenths of the budget, or there is none."""
        return self.budget is None or self.peak <= MARGIN * self.budget
