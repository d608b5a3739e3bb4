"""A run on disk while it is made: what it takes to go on after any end of the process."""

import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..latents import save_latents
from ..pipelines import DenoisingStep
from . import options
from .settings import INPUTS, LISTS, MODELS, outside

EVERY_SECONDS = 5.0
_SHARE = 0.05
"""Of the time of a run that writing may take."""


class Keeper:
    """Writes latents and predictions of a run every few seconds, each time as a file that is whole.

    Args:
        path: of the file.
        settings: of the run.
        given: predictions that an earlier run left.
        left: the file that it left, which goes when this run is finished.
        frames_axis: axis of the frames in latents; files have (B, C, F, h, w).
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        given: Sequence[mx.array] = (),
        left: Path | None = None,
        frames_axis: int = 2,
    ):
        self.path, self.settings, self.given = path, settings, len(given)
        self.newest = self._left = left
        """The file from which the run can go on, or be decoded; None before the first."""
        self.is_finished = False
        self._frames_axis = frames_axis
        self._made: list[mx.array] = []
        self._record: DenoisingStep | None = None
        self._saved, self._due = 0, time.monotonic() + EVERY_SECONDS
        self._complained = False

    def step(self, record: DenoisingStep) -> None:
        """Note a step, and write what there is if it is time; a full disk does not end the run."""
        self._made.append(record.prediction)
        self._record = record
        if time.monotonic() < self._due:
            return
        start = time.monotonic()
        try:
            self._save(self.path)
        except OSError as error:
            if not self._complained:
                options.say(f"the run goes on, but cannot be kept in {self.path}: {error}", options.QUIET)
            self._complained = True
        end = time.monotonic()
        self._due = end + max(EVERY_SECONDS, (end - start) / _SHARE)

    def stop(self) -> None:
        """Write what a run that is cut off has done, and say how to go on from it."""
        if self._record is None:
            return
        self._somewhere(self._save)
        if self.newest is not None:
            done, total = len(self._made), self._record.total
            options.say(
                f"stopped after step {done} of {total}. To finish it, or see it so far:\n"
                f"  {self._command('generate --resume')}\n  {self._command('decode')}",
                options.QUIET,
            )

    def finish(self, latents: mx.array) -> None:
        """Write the finished latents; where that fails, the last file of the run stays."""

        def save(path: Path) -> None:
            save_latents(path, swapped(latents, self._frames_axis), self.settings)
            self.newest, self.is_finished = path, True

        self._somewhere(save)

    def discard(self) -> None:
        """Delete what this run wrote: what follows from it is no video."""
        if self._saved:
            self.newest.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete what is no longer needed once the video is written."""
        for path in {self.path, self.newest, self._left} - {None}:
            path.unlink(missing_ok=True)

    def hint(self) -> str:
        """How to see a finished run whose video could not be written."""
        if self.newest is None:
            return "its latents could not be written either"
        if self.is_finished:
            return f"finished latents are in {self.newest}: {self._command('decode')}"
        return f"what it takes to finish is in {self.newest}: {self._command('generate --resume')}"

    def _save(self, path: Path) -> None:
        done = len(self._made)
        if done <= max(self._saved, self.given if self.newest is not None else 0):
            return  # what is on disk goes further
        # The guess of the finished latents: the noisy ones would decode to noise.
        denoised, *made = (swapped(x, self._frames_axis) for x in (self._record.denoised, *self._made))
        save_latents(path, denoised, dict(self.settings) | {"steps_done": done}, made)
        self.newest, self._saved = path, done

    def _somewhere(self, save: Any) -> None:
        """Save at the place, or where that is full or gone in the folder for temporary files."""
        other = Path(tempfile.gettempdir()) / self.path.name
        try:
            save(self.path)
        except OSError as error:
            options.say(f"{self.path} cannot be written: {error}", options.QUIET)
            if other.exists():
                return
            try:
                save(other)
            except OSError:
                options.say(f"neither can {other}", options.QUIET)

    def _command(self, command: str) -> str:
        """A command line that goes on from the file, naming what lies outside the current folder."""
        names = ("model",) if command == "decode" else (*MODELS, *INPUTS, *LISTS)
        words = outside({name: self.settings.get(name) for name in names})
        return " ".join(["mlx-unet3d", command, shlex.quote(str(self.newest)), *words])


def swapped(latents: mx.array, frames_axis: int) -> mx.array:
    """Exchange frames and channels where a pipeline has its frames on axis 1, for files have theirs on 2."""
    return latents.transpose(0, 2, 1, 3, 4) if frames_axis == 1 else latents
