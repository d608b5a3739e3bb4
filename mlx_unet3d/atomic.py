"""Files and folders that appear whole or not at all: written beside their place, flushed, then put there.

What a killed process left beside is cleared away by the next that writes to the same place on that machine.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to: takes its place when the body ends well, and goes otherwise."""
    _clear_leftovers(target)
    partial = _beside(target, "partial", target.suffix)
    try:
        yield partial
        flush(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder; one that was there is moved aside until the new one stands."""
    target = target.resolve()  # renames what a link points to, not the link
    _clear_leftovers(target)
    partial, old = _beside(target, "partial"), _beside(target, "old")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
        replaced = target.exists()
        if replaced:
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if replaced:
                old.rename(target)
            raise
        if replaced:
            shutil.rmtree(old)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def flush(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _beside(target: Path, kind: str, suffix: str = "") -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}{suffix}")


def _clear_leftovers(target: Path) -> None:
    """Remove what processes that are no more left of `target`; put back what one had moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]{{8}}\.(partial|old).*")
    if not target.parent.is_dir():
        return
    for path in list(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
