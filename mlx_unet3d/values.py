"""Values of settings, by the same rules from a command line and from a file."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Far above the training of any network, and low enough to plan quickly.
_MOST_FRAMES, _LONGEST_SIDE, _MOST_PIXELS = 4096, 2**15, 2**28
LONGEST_TEXT = 100_000
_MOST = 1_000_000


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        default: None for the model's own, or for what follows from the other settings.
        parse: its value of the text of a command line; ValueError or ArgumentTypeError for any other.
        kind: of the value in a file: text, a number, or bool, which no text is parsed for.
    """

    default: Any
    parse: Callable[[str], Any]
    kind: type = str

    def of_file(self, value: Any) -> Any:
        """The value that a file has, by the same rules as one of the command line."""
        if value is None:
            return self.default
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError("it must be true or false")
            return value
        if isinstance(value, bool) or not isinstance(value, str if self.kind is str else int | float):
            raise ValueError("it must be text" if self.kind is str else "it must be a number")
        if self.kind is int and not isinstance(value, int):
            raise ValueError("it must be an integer")
        return self.parse(value if self.kind is str else repr(value))


def integer(text: str) -> int:
    """Parse an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be an integer") from None


def count(text: str) -> int:
    """Parse an integer from 1 up to a generous limit."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return at_most(value, _MOST)


def count_from_zero(text: str) -> int:
    """Parse an integer from 0 up to a generous limit."""
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return at_most(value, _MOST)


def text(value: str) -> str:
    """Parse text that can be encoded and is not too long."""
    if not isinstance(value, str):  # from a file
        raise argparse.ArgumentTypeError("it must be text")
    if len(value) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(f"{len(value)} characters are more than {LONGEST_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("it holds half a character, and is no text") from error
    return value


def frames(text: str) -> int:
    """Parse a number of frames."""
    return at_most(count(text), _MOST_FRAMES)


def side(text: str) -> int:
    """Parse the pixels of one side of a frame."""
    return at_most(count(text), _LONGEST_SIDE)


def at_most(value: int, most: int) -> int:
    """Return an integer; ArgumentTypeError for one above `most`."""
    if value > most:
        raise argparse.ArgumentTypeError(f"{str(value)[:40]} must be at most {most}")
    return value


def number(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


def rate(text: str) -> float:
    """Parse a finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def check_size(num_frames: int | None, height: int | None, width: int | None) -> None:
    """Raise ValueError for a video with more pixels than any machine can hold."""
    pixels = (num_frames or 1) * (height or 1) * (width or 1)
    if pixels > _MOST_PIXELS:
        raise ValueError(
            f"{num_frames or 1} frames of {width or 1}x{height or 1} are {pixels / 1e9:.1f} billion pixels, "
            f"more than {_MOST_PIXELS / 1e9:.1f}; make a smaller or shorter video"
        )
