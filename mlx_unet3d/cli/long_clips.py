"""Long clips on the command line: context windows, FreeNoise, FreeInit, prompts at frames."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..layers.free_noise import FreeNoise
from ..pipelines.windows import FUSES, SCHEDULES, ContextWindows
from . import options
from .options import flag

OF_MOTION = ("free_noise", "free_noise_length", "free_noise_stride", "free_init")
"""Settings of families with motion modules."""
_NEEDED = {
    **dict.fromkeys(
        ("context_overlap", "context_stride", "context_schedule", "context_fuse", "context_closed_loop"),
        "context_frames",
    ),
    **dict.fromkeys(("free_noise_length", "free_noise_stride"), "free_noise"),
}
"""Settings, and the one without which each has no meaning."""


def add_options(parser: argparse.ArgumentParser, *, sampling: bool = True) -> None:
    """Add the options of long clips; `sampling`: those that change no memory too."""
    group = parser.add_argument_group("long clips")
    group.add_argument(
        "--context-frames",
        type=options.count_from_zero,
        metavar="N",
        help="frames that the network sees at a time, in windows whose predictions are averaged: the memory "
        "of a window (default: 0, all)",
    )
    group.add_argument(
        "--context-overlap",
        type=options.count_from_zero,
        metavar="N",
        help="frames that neighbouring windows share (default: 4, or a quarter of windows below 16)",
    )
    group.add_argument(
        "--context-stride",
        type=strides,
        metavar="N",
        help="above 1 also windows of every 2nd frame, every 4th, and so on (default: 1)",
    )
    group.add_argument(
        "--context-schedule",
        choices=SCHEDULES,
        help=f"default: {ContextWindows.schedule}; for a closed loop {SCHEDULES[-1]}",
    )
    group.add_argument(
        "--context-closed-loop",
        action=argparse.BooleanOptionalAction,
        default=parser.argument_default,
        help="let the last frame lead to the first",
    )
    if sampling:
        group.add_argument(
            "--context-fuse",
            choices=FUSES,
            help=f"weights of a window's frames in the average (default: {ContextWindows.fuse})",
        )
    group.add_argument(
        "--free-noise",
        action=argparse.BooleanOptionalAction,
        default=parser.argument_default,
        help="let motion modules attend within windows, from noise that repeats in another order",
    )
    group.add_argument(
        "--free-noise-length",
        type=options.count,
        metavar="N",
        help=f"frames of its windows (default: {FreeNoise.context_length}, or the motion modules' positions "
        "if fewer)",
    )
    group.add_argument(
        "--free-noise-stride",
        type=options.count,
        metavar="N",
        help="frames from one of its windows to the next (default: 4, or a window if fewer)",
    )
    if sampling:
        group.add_argument(
            "--free-init",
            type=iterations,
            metavar="N",
            help="denoise N times, each from noise with the low frequencies of the last video: steadier, N "
            "times the work (default: 0, off)",
        )
    group.add_argument(
        "--prompt-at",
        nargs=2,
        action="append",
        metavar=("FRAME", "TEXT"),
        help="change the prompt on the way: TEXT at this frame, counted from 0, and a linear way to it; may "
        "be given again for others",
    )


def strides(text: str) -> int:
    """Parse the stride of windows, of which each one more doubles the frames between two of a window."""
    return options.at_most(options.count(text), 12)


def iterations(text: str) -> int:
    """Parse the iterations of FreeInit, 0 for none."""
    return options.at_most(options.count_from_zero(text), 100)


def prompts(text: str) -> str:
    """JSON of frames and the prompts at them, [[16, "snow"], ...], in order."""
    try:
        pairs = {}
        for frame, prompt in json.loads(text):
            if options.frames(repr(frame)) in pairs:
                raise ValueError
            pairs[frame] = options.text(prompt)
        if not pairs:
            raise ValueError
    except (TypeError, ValueError, RecursionError, argparse.ArgumentTypeError) as error:
        raise ValueError("it must be a list of frames, each one once, and the prompts at them") from error
    return json.dumps(sorted(pairs.items()))


def prompts_setting(given: Sequence[Sequence[str]]) -> str:
    """The values of all --prompt-at."""
    pairs: dict[int, str] = {}
    for frame, prompt in given:
        try:
            number = options.frames(frame)
            pairs[number] = options.text(prompt)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(
                f"--prompt-at {frame}: give a frame from 1, the prompt itself being that of frame 0, and text"
            ) from error
    if len(pairs) < len(given):
        raise ValueError(f"--prompt-at has {len(given)} prompts for {len(pairs)} frames; give each frame one")
    return prompts(json.dumps(list(pairs.items())))


def check_given(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of the command line without the one that gives it a meaning."""
    for name, needed in _NEEDED.items():
        if name in given and not settings[needed]:
            raise ValueError(f"{flag(name)} means nothing without {flag(needed)}; give both")


def check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of long clips that do not go together."""
    windows = context_windows(settings)
    if windows is not None and settings["cache_interval"] > 1:
        raise ValueError(
            f"--cache-interval {settings['cache_interval']} keeps features of the same frames from step to "
            "step, which --context-frames moves; use one or the other"
        )
    if settings["free_noise"] and settings["free_noise_length"] is not None:
        free_noise(settings, settings["free_noise_length"])
    frames = settings["num_frames"]
    last = max((frame for frame, _ in frame_prompts(settings)), default=0)
    if frames is not None and last >= frames:
        raise ValueError(
            f"--prompt-at {last}: the video has {frames} frames, counted from 0; give a frame up to "
            f"{frames - 1}, or a higher --num-frames"
        )


def context_windows(settings: Mapping[str, Any]) -> ContextWindows | None:
    """The windows of settings; None for all frames at once, ValueError for those that are none."""
    length, loop = settings["context_frames"], settings["context_closed_loop"]
    if not length:
        return None
    overlap = settings["context_overlap"]
    schedule = settings["context_schedule"] or (SCHEDULES[-1] if loop else ContextWindows.schedule)
    with _said(f"--context-frames {length}"):
        return ContextWindows(
            length=length,
            overlap=min(ContextWindows.overlap, length // 4) if overlap is None else overlap,
            stride=settings["context_stride"],
            schedule=schedule,
            fuse=settings["context_fuse"],
            closed_loop=loop,
        )


def free_noise(settings: Mapping[str, Any], positions: int) -> FreeNoise | None:
    """The windows of FreeNoise for motion modules of so many positions; None for none."""
    if not settings["free_noise"]:
        return None
    length, stride = settings["free_noise_length"], settings["free_noise_stride"]
    length = min(FreeNoise.context_length, positions) if length is None else length
    stride = min(FreeNoise.context_stride, length) if stride is None else stride
    with _said(f"--free-noise-length {length} --free-noise-stride {stride}"):
        windows = FreeNoise(length, stride)
        if length > positions:
            raise ValueError(
                f"{length} exceeds the motion module's {positions} positions; use at most {positions}"
            )
        return windows


def frame_prompts(settings: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The prompts at frames behind the first."""
    return [(frame, text) for frame, text in json.loads(settings["prompt_at"] or "[]")]


def enable(pipe: Any, settings: Mapping[str, Any]) -> None:
    """Set FreeNoise and FreeInit on a pipeline with motion modules."""
    windows = free_noise(settings, pipe.unet.config.motion_max_seq_length)
    if windows is not None:
        pipe.enable_free_noise(windows.context_length, windows.context_stride)
    if settings["free_init"]:
        pipe.enable_free_init(settings["free_init"])


@contextmanager
def _said(words: str) -> Iterator[None]:
    """Begin the message of a ValueError with the flags that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{words}: {error}") from error
