"""The settings of a clip as text in its file: one flat JSON object."""

import json
import math
from collections.abc import Mapping

from ..inputs import parse_json

MetadataValue = str | int | float | bool | None

# The text is an argument of ffmpeg, and Linux limits arguments to 128 KiB.
MAX_BYTES = 120_000


def encode_metadata(metadata: Mapping[str, MetadataValue]) -> str:
    """Encode as one line of JSON in ASCII, which no container or shell can damage.

    Raises:
        TypeError: a key is not a string, or a value is neither string, number, boolean nor None.
        ValueError: a number is infinite or NaN, or the text is longer than `MAX_BYTES`.
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
    """Decode the text of `encode_metadata`; ValueError for other text, or None."""
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
