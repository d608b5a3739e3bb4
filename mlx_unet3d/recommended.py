"""A checkpoint's recommendations for its use, in `model_index.json` under "_recommended"."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .scalars import as_python
from .values import Setting, check_size, count, frames, number, rate, side, text

KEY = "_recommended"
_MOST_WORDS = 100_000


@dataclass(frozen=True)
class Recommended:
    """A checkpoint's recommendation for its use; the values obey the rules of the command line's options.

    Attributes:
        num_frames, num_inference_steps, guidance_scale, height, width: defaults of a call, the size in
            pixels; None for diffusers' own.
        fps: frames a second of the video.
        vocabulary: all words that it knows, lower case, where these are few; empty for a model of any text.

    Raises ValueError for other values.
    """

    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = as_python(getattr(self, name))
            try:
                rule.of_file(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"{name}={_shown(value)}: {error}") from error
            object.__setattr__(self, name, value)
        words = self.vocabulary
        if not isinstance(words, list | tuple) or len(words) > _MOST_WORDS:
            raise ValueError(f"vocabulary={_shown(words)}: it must be a list of at most {_MOST_WORDS} words")
        for word in words:
            try:
                Setting(None, text).of_file(word if word is not None else 0)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"vocabulary has {_shown(word)}: {error}") from error
        object.__setattr__(self, "vocabulary", tuple(words))
        check_size(self.num_frames, self.height, self.width)

    @classmethod
    def of_index(cls, index: Mapping[str, Any], path: str | Path) -> Recommended:
        """Return the recommendation in a `model_index.json` read from `path`; an empty one without any.

        Raises CheckpointError, which names the file, the key, the value and the rule.
        """
        values, known = index.get(KEY, {}), [field.name for field in fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(known):
            raise CheckpointError(
                f"{path}: {KEY} is {_shown(values)}; it must be an object of {', '.join(known)}: correct it "
                "or download it again"
            )
        try:
            return cls(
                **{
                    name: () if value is None and name == "vocabulary" else value
                    for name, value in values.items()
                }
            )
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {KEY}: {str(error)[:300]}; correct it or download it again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that say something."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}


_RULES = {
    "num_frames": Setting(None, frames, int),
    "num_inference_steps": Setting(None, count, int),
    "guidance_scale": Setting(None, number, float),
    "height": Setting(None, side, int),
    "width": Setting(None, side, int),
    "fps": Setting(None, rate, float),
}


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}..."
