"""The settings of a video: one table for the command line, for what a file remembers, and for its limits."""

import argparse
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import DEMO
from ..errors import printable
from ..layers.convolution import MODES as CONVOLUTIONS
from ..media import CODECS
from ..pipelines.windows import FUSES, SCHEDULES, ContextWindows
from ..schedulers import scheduler_from_config
from ..values import Setting
from . import long_clips, options


def scheduler(name: str) -> str:
    """The name of a sampler."""
    scheduler_from_config({"_class_name": "DDIMScheduler"}, name)
    return name


def loras(text: str) -> str:
    """JSON of LoRAs and their weights, [["owner/name", 1.0], ...]."""
    try:
        pairs = json.loads(text)
        for path, weight in pairs:
            options.text(path)
            options.number(repr(weight))
    except (TypeError, ValueError, RecursionError, argparse.ArgumentTypeError) as error:
        raise ValueError("it must be a list of LoRAs and their weights") from error
    return text


def embeddings(text: str) -> str:
    """JSON of textual inversions and their tokens, None for their own, [["owner/name", "<cat>"], ...]."""
    try:
        pairs = json.loads(text)
        for path, token in pairs:
            options.text(path)
            if token is not None:
                options.text(token)
    except (TypeError, ValueError, RecursionError, argparse.ArgumentTypeError) as error:
        raise ValueError("it must be a list of embeddings and their tokens") from error
    return text


# Settings that a file remembers and `--from` takes up again.
SETTINGS: dict[str, Setting] = {
    "prompt": Setting(None, options.text),
    "negative_prompt": Setting(None, options.text),
    "num_frames": Setting(None, options.frames, int),
    "height": Setting(None, options.side, int),
    "width": Setting(None, options.side, int),
    "steps": Setting(None, options.count, int),
    "guidance": Setting(None, options.number, float),
    "seed": Setting(0, options.seed, int),
    "rng": Setting("torch", options.one_of("torch", "mlx")),
    "scheduler": Setting(None, scheduler),
    "eta": Setting(0.0, options.number, float),
    "clip_skip": Setting(None, options.count, int),
    "dtype": Setting(None, options.one_of(*options.DTYPES)),
    "vae_dtype": Setting("float32", options.one_of(*options.DTYPES)),
    "vae_tiling": Setting(False, bool, bool),
    "fps": Setting(None, options.rate, float),
    "scale": Setting(1, options.scale, int),
    "codec": Setting(None, options.one_of(*CODECS)),
    "model": Setting(None, options.path),
    "revision": Setting(None, options.path),
    "variant": Setting(None, options.path),
    "lora": Setting(None, loras),
    "embedding": Setting(None, embeddings),
    "convolution": Setting("auto", options.one_of(*CONVOLUTIONS)),
    "cache_interval": Setting(1, options.count, int),
    "cache_depth": Setting(1, options.count, int),
    "guidance_from": Setting(0.0, options.number, float),
    "guidance_to": Setting(1.0, options.number, float),
    "video": Setting(None, options.path),
    "strength": Setting(None, options.number, float),
    "image": Setting(None, options.path),
    "min_guidance": Setting(1.0, options.number, float),
    "motion_bucket": Setting(127.0, options.number, float),
    "noise_aug": Setting(0.02, options.number, float),
    "decode_chunk_size": Setting(None, options.count, int),
    "motion_adapter": Setting(None, options.path),
    "ip_adapter": Setting(None, options.path),
    "ip_image": Setting(None, options.path),
    "ip_scale": Setting(1.0, options.number, float),
    "context_frames": Setting(0, options.count_from_zero, int),
    "context_overlap": Setting(None, options.count_from_zero, int),
    "context_stride": Setting(ContextWindows.stride, long_clips.strides, int),
    "context_schedule": Setting(None, options.one_of(*SCHEDULES)),
    "context_fuse": Setting(ContextWindows.fuse, options.one_of(*FUSES)),
    "context_closed_loop": Setting(False, bool, bool),
    "free_noise": Setting(False, bool, bool),
    "free_noise_length": Setting(None, options.count, int),
    "free_noise_stride": Setting(None, options.count, int),
    "free_init": Setting(0, long_clips.iterations, int),
    "prompt_at": Setting(None, long_clips.prompts),
}
LISTS = ("lora", "embedding")
"""Settings of several files, each with a weight or a token, as JSON."""
MODELS = ("model", "motion_adapter", "ip_adapter")
"""Settings that name a folder, a file or a repository."""
INPUTS = ("video", "image", "ip_image")
"""Settings that name a file to start from, never a repository."""

DEFAULTS: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}

# Further records of a file about its making; text, but for the number of steps.
RECORDED = {"video": "video_frames", "image": "image_pixels", "ip_image": "ip_image_pixels"}
"""The record of an input's fingerprint."""
_RECORDS = ("weights", *RECORDED.values(), "program", "mlx")


def of_file(found: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The settings in a file, checked, and its records; what is not known is left out.

    Raises ValueError for a value that the command line would not take either.
    """
    settings: dict[str, Any] = {}
    for name, value in found.items():
        try:
            if name in SETTINGS:
                settings[name] = SETTINGS[name].of_file(value)
            elif name in _RECORDS and value is not None:
                settings[name] = Setting(None, options.text).of_file(value)
            elif name == "steps_done":
                settings[name] = Setting(None, options.count, int).of_file(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            shown = repr(value)
            raise ValueError(
                f"{path}: its {name} is {shown if len(shown) < 80 else shown[:77] + '...'}; "
                f"{printable(str(error)[:300])}; give another file"
            ) from error
    try:
        check(DEFAULTS | settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def check(settings: Mapping[str, Any]) -> None:
    """ValueError for settings that do not go together."""
    options.check_size(*(settings[name] for name in ("num_frames", "height", "width")))
    first, last = settings["guidance_from"], settings["guidance_to"]
    if not 0 <= first < last <= 1:
        raise ValueError(
            f"--guidance-from {first:g} --guidance-to {last:g}: these are shares of the run, the first below "
            "the second, both from 0 to 1"
        )
    if settings["scheduler"] is not None:
        scheduler(settings["scheduler"])
    long_clips.check(settings)


# Paths.


def is_local(path: str) -> bool:
    """Return True if a model, LoRA or video is named by a path, rather than by the id of a repository."""
    if path == DEMO:
        return False
    plain = path.startswith((".", "/", "~", "\\")) or "/" not in path or ".." in Path(path).parts
    return plain or Path(path).exists()


def _public(path: str) -> str:
    """The name alone of a path: how the folders of a machine are called is nobody's business."""
    return _name(path) if is_local(path) else path


def _name(path: str) -> str:
    return Path(os.path.abspath(Path(path).expanduser())).name


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a video carries them: of files only their names."""
    named = dict(settings)
    for name in MODELS:
        if settings.get(name) is not None:
            named[name] = _public(settings[name])
    for name in LISTS:
        if settings.get(name) is not None:
            named[name] = json.dumps([(_public(path), value) for path, value in json.loads(settings[name])])
    for name in INPUTS:
        if settings.get(name) is not None:
            named[name] = _name(settings[name])
    return named


def is_same_model(given: str, named: str | None) -> bool:
    """Return True if a model of the command line may be the one that a file names."""
    return named is not None and _public(given) == _public(named)


def trusted(settings: Mapping[str, Any], source: str | Path, given: Mapping[str, Any]) -> None:
    """Say which model, LoRAs and inputs a file of settings names, before any is read.

    Raises ValueError for one outside the current folder that the command line, `given`, does not name too: a
    file may come from anybody.
    """
    named = [(name, settings.get(name)) for name in MODELS]
    named += [(name, path) for name in LISTS for path, _ in json.loads(settings.get(name) or "[]")]
    named += [(name, settings.get(name)) for name in INPUTS]
    for name, path in named:
        if path is None or name in given:
            continue
        if (name in INPUTS or is_local(path)) and not _is_inside(path):
            raise ValueError(
                f"{source} names the {name.replace('_', ' ')} {printable(path)}, which is not in the current "
                f"folder; give it, or another, with --{name.replace('_', '-')}"
            )
        options.say(f"{name.replace('_', ' ')}: {path}, named by {source}")


def _is_inside(path: str) -> bool:
    """Return True if a path exists and lies in the current folder, links followed."""
    try:
        found = Path(path).expanduser().resolve(strict=True)
        return Path.cwd().resolve() in (found, *found.parents)
    except (OSError, RuntimeError, ValueError):  # absent, a circle of links, no path at all
        return False


def outside(settings: Mapping[str, Any]) -> list[str]:
    """The words of a command line that name the files of these settings outside the current folder."""
    words: list[str] = []
    for name in (*MODELS, *INPUTS):
        path = settings.get(name)
        if path is not None and (name in INPUTS or is_local(path)) and not _is_inside(path):
            words += [f"--{name.replace('_', '-')}", shlex.quote(path)]
    for name in LISTS:
        pairs = json.loads(settings.get(name) or "[]")
        if any(is_local(path) and not _is_inside(path) for path, _ in pairs):
            for path, value in pairs:
                own = [] if value is None else [f"{value:g}" if name == "lora" else shlex.quote(value)]
                words += [f"--{name}", shlex.quote(path), *own]
    return words


def checksum_of_frames(frames: np.ndarray) -> str:
    """Return a fingerprint of frames (F, H, W, 3) or of a picture (H, W, 3), 16 hex digits."""
    digest = hashlib.sha256(repr(frames.shape).encode())
    digest.update(memoryview(np.ascontiguousarray(frames)).cast("B"))
    return digest.hexdigest()[:16]
