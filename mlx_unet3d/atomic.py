"""Files and folders that appear whole or not at all: written beside their place, flushed, then put there."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its place when the body ends well and goes otherwise."""
    partial = target.with_name(f".{secrets.token_hex(8)}.partial{target.suffix}")
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
    token = secrets.token_hex(8)
    partial, old = (target.with_name(f".{token}.{name}") for name in ("partial", "old"))
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
