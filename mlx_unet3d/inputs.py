"""Opening the files that others made: regular files alone, so that nothing waits and nothing is endless."""

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError

# Checked in this order; whatever else there may be is no regular file either.
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_input(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a pipe is not waited for.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is a folder, a pipe, a device or a socket.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISSOCK(mode) and not stat.S_ISDIR(mode):
        # A name can change its meaning, so the open file is looked at; without O_NONBLOCK, opening a
        # pipe waits for who writes to it.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = open(os.open(path, flags), "rb")  # noqa: SIM115
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISREG(mode):
            return file
        file.close()
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
    raise CheckpointError(f"{path} is {kind} where a file is expected; give a regular file")


_MOST_VALUES = 10_000_000
"""Of a JSON text; a header of the largest size has fewer, and these take half a gigabyte."""


def parse_json(
    text: str | bytes,
    *,
    finite: bool = True,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    parse_int: Callable[[str], int] | None = None,
) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        text: what another program wrote.
        finite: refuse NaN and Infinity, which Python writes and JSON does not have.
        pairs_hook: makes an object of its names and values, as in `json.loads`.
        parse_int: makes an integer of its digits, as there.

    Raises ValueError for anything else, also for what is nested too deep, or has numbers of too many digits
    or more values than memory should be spent on.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite_float(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is too large a number")
        return value

    text = text.decode() if isinstance(text, bytes) else text
    if sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise ValueError("it has more values than any file of its kind")
    try:
        return json.loads(
            text,
            parse_constant=refuse if finite else None,
            parse_float=finite_float if finite else None,
            parse_int=parse_int,
            object_pairs_hook=pairs_hook,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
