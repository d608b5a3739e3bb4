"""Previews of a run while it is denoised: in the terminal, and as a small file."""

import base64
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import media
from ..errors import NonFiniteError
from ..media import gif
from ..pipelines import DenoisingStep
from ..pipelines.previews import VAE, Previews
from . import options

SUFFIXES = (".gif", ".webp")
EVERY_SECONDS = {"terminal": 0.25, "file": 3.0}
_SHARE = 0.05
"""Of the time of a run that its previews may take."""
_ROWS = 16
_FILE_SIDE = 128
"""Pixels of the longer side of a small file, about."""
_IMAGE = 7341
"""Our number of the picture in the terminal."""


def protocol(stream: TextIO, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return how a terminal shows pictures: "kitty", "iterm2", "blocks", or None for not at all."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not stream.isatty() or term in ("", "dumb"):
        return None
    if not term.startswith(("tmux", "screen")):  # they pass no pictures on
        if environment.get("KITTY_WINDOW_ID") or term == "xterm-kitty" or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm"):
            return "iterm2"
    return "blocks" if "utf" in (stream.encoding or "").lower() else None


class Screen:
    """A place in a terminal above the progress bar where pictures replace one another.

    Args:
        stream: the terminal.
        how: of `protocol`.
        colours: 24 for bits of colour, 8 for the palette of old terminals.
    """

    def __init__(self, stream: TextIO, how: str, colours: int = 24):
        self.stream, self.how, self.colours = stream, how, colours
        self._rows = 0

    def show(self, picture: np.ndarray) -> None:
        """Show a picture uint8 (H, W, 3)."""
        columns, rows = _cells(*picture.shape[:2])
        with tqdm.external_write_mode(self.stream):
            if rows != self._rows:
                self._erase()
                self.stream.write("\n" * rows)  # room, at the bottom of the screen as well
                self._rows = rows
            # Every protocol draws from here, and leaves the cursor elsewhere.
            self.stream.write(f"\x1b[{rows}A\r\x1b7{self._drawing(picture, columns, rows)}\x1b8\x1b[{rows}B")
            self.stream.flush()

    def close(self) -> None:
        """Take the picture away."""
        with tqdm.external_write_mode(self.stream):
            self._erase()
            self.stream.flush()

    def _erase(self) -> None:
        if self._rows:
            if self.how == "kitty":
                self.stream.write(f"\x1b_Ga=d,d=I,i={_IMAGE},q=2\x1b\\")
            self.stream.write(f"\x1b[{self._rows}A\r\x1b[J")
        self._rows = 0

    def _drawing(self, picture: np.ndarray, columns: int, rows: int) -> str:
        if self.how == "blocks":
            return _blocks(picture, columns, rows, self.colours)
        factor = max(1, 128 // max(picture.shape[:2]))  # terminals blur what they enlarge
        file = io.BytesIO()
        Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1)).save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode()
        if self.how == "iterm2":
            size = f"size={len(file.getvalue())};width={columns};height={rows};preserveAspectRatio=0"
            return f"\x1b]1337;File=inline=1;{size}:{text}\x07"
        parts = [text[i : i + 4096] for i in range(0, len(text), 4096)]
        heads = [f"a=T,f=100,q=2,C=1,i={_IMAGE},p=1,c={columns},r={rows},", *[""] * (len(parts) - 1)]
        return "".join(
            f"\x1b_G{head}m={int(i < len(parts) - 1)};{part}\x1b\\"
            for i, (head, part) in enumerate(zip(heads, parts, strict=True))
        )


def _cells(height: int, width: int) -> tuple[int, int]:
    """Columns and rows of a picture; a cell is twice as high as wide."""
    size = shutil.get_terminal_size()
    rows = max(1, min(_ROWS, size.lines - 3))
    columns = max(1, round(2 * rows * width / height))
    if columns > size.columns - 1:
        columns = max(1, size.columns - 1)
        rows = max(1, min(rows, round(columns * height / width / 2)))
    return columns, rows


def _blocks(picture: np.ndarray, columns: int, rows: int, colours: int) -> str:
    """Half blocks: each cell is the upper pixel, on the lower one."""
    filtering = Image.Resampling.BOX if columns < picture.shape[1] else Image.Resampling.NEAREST
    pixels = np.asarray(Image.fromarray(picture).resize((columns, 2 * rows), filtering))

    def colour(kind: int, rgb: np.ndarray) -> str:
        red, green, blue = map(int, rgb)
        if colours == 24:
            return f"{kind};2;{red};{green};{blue}"
        cube = [round(level / 255 * 5) for level in (red, green, blue)]
        return f"{kind};5;{16 + 36 * cube[0] + 6 * cube[1] + cube[2]}"

    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[{colour(38, a)};{colour(48, b)}m\N{UPPER HALF BLOCK}"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\r\n".join(lines)


def check_file(path: str | None, outputs: list[str], overwrite: bool) -> None:
    """Raise ValueError or OSError for a --preview-file that cannot be written, or is an output."""
    if path is None:
        return
    if Path(path).suffix.lower() not in SUFFIXES or path.endswith("/"):
        raise ValueError(f"--preview-file {path} must end in {' or '.join(SUFFIXES)}")
    if os.path.abspath(path) in map(os.path.abspath, outputs):
        raise ValueError(f"--preview-file {path} is the video itself; give another name")
    media.check_writable(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"--preview-file {path} is there; give another name, or replace it with --overwrite"
        )


class Preview:
    """Shows the guess of a run after its steps, as often as that takes little of its time.

    Args:
        vae: of the pipeline, and `frames_axis` that of its latents.
        terminal: show it on stderr, where that is a terminal with colours and the command is not quiet.
        file: .gif or .webp to write; None for none.
        fps: of the file.
    """

    def __init__(self, vae: VAE, frames_axis: int, terminal: bool, file: str | None, fps: float):
        self._file, self._fps = file, min(max(fps, 1.0), gif.MAX_FPS)
        self._screen = _screen() if terminal and not options.is_quiet() else None
        self._axis = frames_axis
        self._due = {"terminal": 0.0, "file": time.monotonic() + 1}  # the first steps show noise
        self._complained = False
        self._previews = None
        if self._screen is not None or file is not None:
            self._previews = Previews(vae, frames_axis)

    def step(self, record: DenoisingStep) -> None:
        """Show a step where it is time; what goes wrong here does not end the run."""
        last = record.step == record.total - 1
        try:
            if self._screen is not None:
                self._when_due("terminal", lambda: self._show(record), False)
            if self._file is not None:
                self._when_due("file", lambda: self._write(record), last)
        except (OSError, ValueError, NonFiniteError) as error:
            if not self._complained:
                options.say(f"the run goes on without a preview: {error}")
            self._complained = True

    def close(self) -> None:
        """Take the picture off the terminal; the file stays."""
        if self._screen is not None:
            self._screen.close()

    def _when_due(self, name: str, action: Callable[[], None], anyway: bool) -> None:
        start = time.monotonic()
        if start < self._due[name] and not anyway:
            return
        try:
            action()
        finally:
            end = time.monotonic()
            self._due[name] = end + max(EVERY_SECONDS[name], (end - start) / _SHARE)

    def _show(self, record: DenoisingStep) -> None:
        middle = record.denoised.shape[self._axis] // 2
        self._screen.show(self._previews(record.denoised, middle)[0])

    def _write(self, record: DenoisingStep) -> None:
        frames = self._previews(record.denoised)
        scale = max(1, math.floor(_FILE_SIDE / max(frames.shape[1:3])))
        media.write_video(self._file, frames, fps=self._fps, scale=scale)


def _screen() -> Screen | None:
    how = protocol(sys.stderr)
    if how is None:
        options.say("--preview: stderr is no terminal with colours; give --preview-file for a file")
        return None
    old = os.environ.get("TERM_PROGRAM") == "Apple_Terminal" and "COLORTERM" not in os.environ
    return Screen(sys.stderr, how, 8 if old else 24)
