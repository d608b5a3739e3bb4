"""Whole files and folders: what stands afterwards, also when a process was killed in between."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlx_unet3d.atomic import whole_file, whole_folder, write_text


def fail(write, target: Path) -> None:
    """Write half and come to grief."""
    with write(target) as partial:
        (partial / "half" if partial.is_dir() else partial).write_text("half")
        raise RuntimeError


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_file(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "first\n")
    with pytest.raises(RuntimeError):
        fail(whole_file, target)
    assert target.read_text() == "first\n"
    assert names(tmp_path) == {"a.txt"}


def test_folder(tmp_path):
    target = tmp_path / "out"
    for text in ("first", "second"):
        with whole_folder(target) as partial:
            fill(partial, text)
    with pytest.raises(RuntimeError):
        fail(whole_folder, target)
    assert (target / "inner" / "a.txt").read_text() == "second"
    assert names(tmp_path) == {"out"}


@pytest.fixture
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_go(tmp_path, dead):
    (tmp_path / f".out.{dead}-01234567.partial").mkdir()
    (tmp_path / f".a.txt.{dead}-01234567.partial.txt").write_text("half")
    others = {".out.partial", f".outer.{dead}-01234567.partial", ".out.1-01234567.partial"}
    for name in others:  # of no process, of another place, of a process that lives
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "out") as partial:
        fill(partial, "new")
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == others | {"out", "a.txt"}


def test_what_was_moved_aside_comes_back(tmp_path, dead):
    """Killed between moving the old folder away and the new one in."""
    old = tmp_path / f".out.{dead}-01234567.old"
    old.mkdir()
    fill(old, "old")
    with pytest.raises(RuntimeError):
        fail(whole_folder, tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"out"}
