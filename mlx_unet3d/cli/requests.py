"""The settings that a command line of `generate` asks for, on top of those of a replayed or stopped run."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import media
from ..latents import SavedLatents
from . import long_clips, options
from .config import preference
from .options import flag
from .outputs import drop_codec
from .settings import (
    DEFAULTS,
    INPUTS,
    LISTS,
    MODELS,
    RECORDED,
    SETTINGS,
    check,
    is_same_model,
    of_file,
    trusted,
)


def collect_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Defaults, then what a replayed file says, then the command line."""
    settings = dict(DEFAULTS)
    if "replay" in args:
        found = of_file(media.read_metadata(args.replay), args.replay)
        if "prompt" not in found:
            raise ValueError(f"{args.replay} has no settings of mlx-unet3d in it; give a video that it made")
        settings |= {key: value for key, value in found.items() if key in SETTINGS}
        settings |= replayed(found)
        drop_codec(args.output, settings)
        if "model" in args and not is_same_model(args.model, settings["model"]):
            settings |= {"revision": None, "variant": None}  # they were the other model's
    settings |= given(args)
    if settings["model"] is None:
        settings["model"], source = preference("model")
        options.say(
            f"model: {settings['model']}, set by {source}"
            if source
            else "no --model: using the small demo model, which draws one moving shape; give a pipeline "
            "folder or a hub id for anything else"
        )
    if "strength" in args and settings["video"] is None:
        raise ValueError(f"--strength {args.strength:g} says how much to change a video; give --video too")
    long_clips.check_given(given(args), settings)
    check(settings)
    if "replay" in args:
        trusted(settings, args.replay, given(args))
    if settings["dtype"] is None:
        settings["dtype"] = "float16" if mx.default_device() == mx.gpu else "float32"
    return settings


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the command line."""
    found = {key: value for key, value in vars(args).items() if key in SETTINGS and value is not None}
    if "lora" in found:  # as text, for the settings go into the video
        found["lora"] = json.dumps([lora_setting(values) for values in args.lora])
    if "embedding" in found:
        found["embedding"] = json.dumps([embedding_setting(values) for values in args.embedding])
    if "prompt_at" in found:
        found["prompt_at"] = long_clips.prompts_setting(args.prompt_at)
    return found


def take_prompt(args: argparse.Namespace) -> None:
    """Put the text of --prompt-file in the place of the prompt; "-" is standard input, which is read once.

    Raises ValueError where there is no text, or a prompt already.
    """
    path = args.prompt_file
    if getattr(args, "prompt", None) is not None:
        raise ValueError(f"--prompt-file {path}: there is a prompt already; leave one out")
    with contextlib.ExitStack() as files:
        try:
            source = sys.stdin.buffer
            if path != "-":
                source = files.enter_context(open(Path(path).expanduser(), "rb"))
            data = source.read(options.LONGEST_TEXT * 4 + 1)
        except OSError as error:
            raise ValueError(f"--prompt-file {path} cannot be read: {error.strerror}") from error
    try:
        found = options.text(data.decode().strip())
    except (UnicodeDecodeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--prompt-file {path}: {error}; give a short text in UTF-8") from error
    if not found:
        raise ValueError(f"--prompt-file {path}: there is no text in it; write the prompt there")
    args.prompt = found


def lora_setting(values: Sequence[Any]) -> tuple[str, float]:
    """The values of one --lora."""
    path, *rest = values
    if len(rest) > 1:
        raise ValueError(f"--lora {' '.join(map(str, values))}: give one LoRA and one weight; repeat --lora")
    try:
        return str(path), options.number(str(rest[0])) if rest else 1.0
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--lora {path} {rest[0]}: the weight must be a finite number") from error


def embedding_setting(values: Sequence[str]) -> tuple[str, str | None]:
    """The values of one --embedding."""
    path, *rest = values
    if len(rest) > 1 or "" in rest:
        raise ValueError(
            f"--embedding {' '.join(values)}: give one file and one token without spaces; repeat --embedding"
        )
    return path, rest[0] if rest else None


# Settings that name files; the rest of a run is as it was begun.
_PLACES = {*MODELS, *LISTS, *INPUTS}


def resumed_settings(args: argparse.Namespace, saved: SavedLatents) -> dict[str, Any]:
    """Return the settings of an unfinished run."""
    own = given(args)
    changed = sorted(own.keys() - _PLACES)
    changed += ["from"] * ("replay" in args) + ["num-videos"] * (args.num_videos > 1)
    if changed:
        names = [flag(key) for key in changed]
        raise ValueError(
            f"--resume finishes the run of {args.resume} as it was begun; leave out {', '.join(names)}"
        )
    found = of_file(saved.settings, saved.path)
    settings = DEFAULTS | found | own
    missing = [name for name in ("model", "dtype") if settings[name] is None]
    if missing:
        raise ValueError(f"{saved.path} does not say its {', '.join(missing)}; it cannot be finished")
    check(settings)
    options.check_latents(saved.path, saved.shape, settings)
    trusted(settings, saved.path, own)
    settings |= replayed(found)
    settings.pop("steps_done", None)
    return settings


def replayed(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says of weights and inputs, to hold against those of this run."""
    return {f"replayed_{name}": found.get(name) for name in ("weights", *RECORDED.values())}
