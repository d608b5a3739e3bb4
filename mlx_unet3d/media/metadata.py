"""The settings that made a clip, as text inside its file: one flat JSON object."""

import json
import math
from collections.abc import Mapping

from ..inputs import parse_json

MetadataValue = str | int | float | bool | None

# A process takes arguments of 128 KiB on Linux, and ffmpeg takes the text as one.
MAX_BYTES = 120_000


def encode_metadata(metadata: Mapping[str, MetadataValue]) -> str:
    """One line of JSON in ASCII, which no container or shell can damage.

    Raises:
        TypeError: a key is no string, or a value neither string, number, boolean nor None.
        ValueError: a number is infinite or NaN, or the text longer than `MAX_BYTES`.
    """
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"metadata has the key {key!r}; keys are strings")
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise TypeError(
                f"metadata[{key!r}] is a {type(value).__name__}; values are strings, numbers, "
                "booleans or None"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metadata[{key!r}] is {value}; JSON has finite numbers only")
    text = json.dumps(dict(metadata))
    if len(text) > MAX_BYTES:
        longest = max(metadata, key=lambda key: len(json.dumps(metadata[key])))
        raise ValueError(
            f"the metadata take {len(text)} bytes of JSON, at most {MAX_BYTES} go into a file; "
            f"shorten {longest!r}"
        )
    return text


def decode_metadata(text: str | bytes | None, path: object) -> dict[str, MetadataValue]:
    """The object that `encode_metadata` wrote; ValueError where `text` is another's, or nothing."""
    if isinstance(text, str | bytes) and len(text) <= MAX_BYTES:
        try:
            found = parse_json(text)
        except ValueError:
            found = None
        if isinstance(found, dict) and all(isinstance(v, MetadataValue) for v in found.values()):
            return found
    raise ValueError(
        f"{path} holds no settings: it was not made by this program, or went through another one "
        "that dropped them"
    )
