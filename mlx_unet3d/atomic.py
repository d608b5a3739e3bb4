"""Files and folders that appear whole or not at all: written beside their place, flushed, then put there.

What a killed process left beside is cleared away by the next that writes to the same place on that machine.
"""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if os.name == "posix":
    import fcntl

_LONGEST_NAME = 255  # bytes, of all file systems in use


@contextmanager
def whole_file(target: Path, *, private: bool = False) -> Iterator[Path]:
    """A path beside `target` to write to: takes its place when the body ends well, and goes otherwise.

    With `private` the file is there from the start, and its owner alone may read it.
    """
    _clear_leftovers(target)
    partial = _beside(target, "partial", target.suffix)
    try:
        if private:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield partial
        flush(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder; one that is there changes places with the new one in one step.

    Where the file system cannot exchange folders, the old one is moved aside until the new one stands.
    """
    target = target.resolve()  # renames what a link points to, not the link
    _clear_leftovers(target)
    partial, old = _beside(target, "partial"), _beside(target, "old")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
        if not target.exists():
            partial.rename(target)
        elif not _exchanged(partial, target):
            target.rename(old)
            try:
                partial.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


@contextmanager
def claim(target: Path) -> Iterator[None]:
    """Hold the name `target` against other processes that claim it; a process that dies lets go.

    Raises:
        FileNotFoundError, PermissionError: the parent folder is missing, or closed to writing.
        FileExistsError: another process holds it.
    """
    lock = _locked(target)
    try:
        yield
    finally:
        if lock is not None:
            descriptor, path = lock
            path.unlink(missing_ok=True)  # before it is let go of: who opens it next makes a new one
            os.close(descriptor)


def _locked(target: Path) -> tuple[int, Path] | None:
    """The open lock file beside `target` and its path; None where files cannot be locked."""
    if os.name != "posix":
        return None
    path = target.with_name(f".{_short(target, 8)}.lock")
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{target.absolute().parent} is missing; make that folder first"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor, path
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(
                f"another process is writing {target}; wait for it, or give another name"
            ) from error
        except OSError:  # a file system without locks
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # who held it has removed it meanwhile


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def check_place(target: Path, nbytes: int = 0) -> None:
    """Write a file beside `target` as `whole_file` does, and remove it, to see now that it can be done.

    Raises OSError where it cannot, or where the disk has no room for `nbytes`.
    """
    parent = target.absolute().parent
    partial = _beside(target, "partial", target.suffix)
    try:
        if len(os.fsencode(target.name)) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        try:
            partial.write_bytes(b"\0" * 4096)
            flush(partial)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(
                f"{target.name!r} is a name of {len(os.fsencode(target.name))} bytes, more than this folder "
                f"takes ({_LONGEST_NAME}); give a shorter one"
            ) from error
        raise type(error)(
            f"nothing can be written to {parent} ({error.strerror}); give another folder"
        ) from error
    if free < nbytes:
        raise OSError(
            f"{parent} has {free / 1e9:.2f} GB left and the run keeps up to {nbytes / 1e9:.2f} GB there; "
            "make room, or give another folder"
        )


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def flush(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


_RENAME_EXCHANGE = 2  # of Linux, and RENAME_SWAP of macOS
_AT_FDCWD = -100


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places at once; False where this system or file system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return libc.renamex_np(first, second, ctypes.c_uint(_RENAME_EXCHANGE)) == 0
        return libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE)) == 0
    except (OSError, AttributeError, TypeError):  # an old C library, or none to open
        return False


def _short(target: Path, others: int) -> str:
    """The name of `target`, or a digest of it where `others` bytes more would make it too long."""
    name = os.fsencode(target.name)
    if len(name) + others <= _LONGEST_NAME:
        return target.name
    return hashlib.sha256(name).hexdigest()[:32]


_OTHERS = len(".") + len(f".{2**32}-01234567.partial")


def _beside(target: Path, kind: str, suffix: str = "") -> Path:
    name = _short(target, _OTHERS + len(os.fsencode(target.suffix)))
    return target.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}{suffix}")


def _clear_leftovers(target: Path) -> None:
    """Delete files that dead processes left of `target`; put back a folder that one had moved aside."""
    name = _short(target, _OTHERS + len(os.fsencode(target.suffix)))
    pattern = re.compile(rf"\.{re.escape(name)}\.(\d+)-[0-9a-f]{{8}}\.(partial|old).*")
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
