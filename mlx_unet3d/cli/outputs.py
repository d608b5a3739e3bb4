"""Names of videos, given or made of prompt and seed; and the line that says a video is there."""

import argparse
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from .. import media
from ..atomic import claim
from ..errors import printable
from . import options
from .config import preference
from .settings import public

_LONGEST = 60
"""Characters of a prompt that a name takes over: names end at 255 bytes, and latents lie beside."""


def hold_outputs(args: argparse.Namespace, settings: Mapping[str, Any], claims: ExitStack) -> list[str]:
    """Return the paths of the videos to make, which no other run has until `claims` ends.

    Names that the command line does not give are free ones, in the user's folder and format.
    """
    if args.output is None and "resume" not in args:
        folder, suffix = preference("folder")[0], f".{preference('format')[0]}"
        suffixes = media.codec_suffixes(settings["codec"])
        if settings["codec"] is not None and suffix not in suffixes:
            suffix = suffixes[0]
        stems = [f"{title(settings)}_seed{settings['seed'] + i}" for i in range(args.num_videos)]
        return [claims.enter_context(free_output(folder, stem, suffix)) for stem in stems]
    output = options.output_of(args.resume) if args.output is None else args.output
    outputs = named_outputs(output, settings["seed"], args.num_videos)
    for output in outputs:
        claims.enter_context(claim(options.latents_path(output)))
    return outputs


def file_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `media.write_video` takes of the settings about files."""
    return {name: settings[name] for name in ("scale", "codec")}


def drop_codec(output: str | None, settings: dict[str, Any]) -> None:
    """Leave out the codec of a replayed video where the new output is of a kind that does not hold it."""
    if settings["codec"] is not None and output is not None:
        suffix = "" if output.endswith("/") else os.path.splitext(output)[1].lower()
        if suffix not in media.codec_suffixes(settings["codec"]):
            settings["codec"] = None


def check_free(output: str, overwrite: bool) -> None:
    """Raise FileExistsError for an output that is there already, unless it may be replaced."""
    if os.path.lexists(output) and not overwrite:
        raise FileExistsError(f"{output} is there; give another name with -o, or replace it with --overwrite")


def announce(
    args: argparse.Namespace, output: str, settings: Mapping[str, Any], stages: Mapping[str, Any]
) -> None:
    """Print the path of a finished video, or with --json its settings and measured stages as well."""
    if args.json:
        made = {"output": output, "settings": public(settings), "stages": stages}
        print(json.dumps(made, ensure_ascii=True), flush=True)
    else:
        print(printable(output), flush=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json, which `announce` obeys."""
    parser.add_argument(
        "--json",
        action="store_true",
        default=False,
        help="print a line of JSON a video: its output, settings, and the seconds and peak memory of stages",
    )


def named_outputs(output: str, seed: int, videos: int) -> list[str]:
    """One path a video; with the seed in the name where there are several."""
    if videos == 1:
        return [output]
    # A slash at the end asks for a folder, whatever the name looks like.
    stem, suffix = (output.rstrip("/"), "/") if output.endswith("/") else os.path.splitext(output)
    return [f"{stem}_seed{seed + i}{suffix}" for i in range(videos)]


def title(settings: Mapping[str, Any]) -> str:
    """A name of letters, digits and hyphens, of the prompt or else of the input image or video."""
    source = settings["prompt"] or Path(settings["image"] or settings["video"] or "video").stem
    words = re.findall(r"\w+", unicodedata.normalize("NFC", source).lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word
        if len(longer.encode()) > _LONGEST:
            break
        name = longer
    # One word alone may be too long
    return name or "".join(words)[: _LONGEST // 4] or "video"


@contextmanager
def free_output(folder: str, stem: str, suffix: str) -> Iterator[str]:
    """Hold the first of stem.gif, stem_2.gif, ... that no file, no unfinished run and no other process has.

    Raises FileNotFoundError and PermissionError as `claim`.
    """
    for number in count(1):
        name = f"{stem}{suffix}" if number == 1 else f"{stem}_{number}{suffix}"
        output = os.path.normpath(os.path.join(folder, name))
        left = options.latents_path(output)
        if os.path.lexists(output) or os.path.lexists(left):
            continue
        with ExitStack() as held:
            try:
                held.enter_context(claim(left))
            except FileExistsError:
                continue
            if os.path.lexists(output):  # finished while we looked
                continue
            yield output
            return
