"""MP4 and QuickTime through an ffmpeg process; the atoms of the container are read here."""

import os
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import printable_lines
from ..inputs import open_input
from .ffmpeg import CODECS, INSTALL, find_encoder, installed, run
from .frames import MAX_PIXELS, Frames, Reading

ACCURATE = "accurate_rnd+full_chroma_int+full_chroma_inp"  # of the scaler: no bias by cut-off bits
COMMENT = "\u00a9cmt"  # the name of a comment in iTunes and ffmpeg
# The movie header takes about 20 bytes a frame; a file has a few atoms, or one a fragment.
_MAX_MOVIE_BYTES, _MAX_ATOMS = 2**26, 100_000


def write_mp4(path: Path, frames: Frames, fps: float, comment: str | None, codec: str) -> None:
    """Write MP4, or QuickTime for `.mov`, in one of `CODECS`, BT.709, index first.

    A row or column too many for the codec is cut off with a warning.
    """
    known = CODECS[codec]
    _, height, width, _ = frames.shape
    rows, columns = (n - n % unit for n, unit in zip((height, width), known.unit, strict=True))
    if min(rows, columns) < known.least:
        raise ValueError(
            f"{width}x{height} pixels are too few for {path.suffix} in {known.title}; use at least "
            f"{known.least}x{known.least}, for example by a scale"
        )
    if (rows, columns) != (height, width):
        warnings.warn(
            f"{path.suffix} needs even sizes: {width}x{height} is cut to {columns}x{rows}", stacklevel=3
        )
        frames = frames[:, :rows, :columns]
    rate = Fraction(fps).limit_denominator(100_000)
    command = [find_encoder(codec).executable, "-hide_banner", "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{columns}x{rows}"]
    command += ["-framerate", f"{rate.numerator}/{rate.denominator}", "-i", "pipe:0", "-an"]
    # Players guess undeclared colours from the size of the picture. Frames carry their own declarations,
    # which go before those of the command line: only a filter sets them all.
    scale = f"scale=out_color_matrix=bt709:out_range=tv:flags={ACCURATE}"
    tags = "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    command += ["-vf", f"{scale},format={known.pixels},{tags}", "-color_range", "tv"]
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    command += ["-c:v", known.encoder, *known.arguments]
    container = "mov" if path.suffix.lower() == ".mov" else "mp4"
    # Comments of QuickTime end at 64 KiB, its keys do not.
    command += ["-movflags", "+faststart" + ("+use_metadata_tags" if container == "mov" else "")]
    if comment is not None:
        command += ["-metadata", f"comment={comment}"]
    command += ["-f", container, f"file:{path.absolute()}"]
    done = run(command, input=memoryview(np.ascontiguousarray(frames)).cast("B"))
    if done.returncode != 0:
        raise RuntimeError(f"ffmpeg failed with status {done.returncode}: {_tail(done.stderr)}")


def read_mp4(reading: Reading) -> tuple[Frames, float]:
    """Read frames (F, H, W, 3), upright, at the mean rate: uneven frame times are resampled."""
    path = reading.path
    candidates = installed()
    if not candidates:
        raise ValueError(f"reading {path} needs ffmpeg: {INSTALL}")
    rate = video_rate(path)
    command = [candidates[0].executable, "-hide_banner", "-loglevel", "error", "-nostdin"]
    # Only as this format: ffmpeg might take the content for a list of other files.
    command += ["-protocol_whitelist", "file,pipe", "-f", "mov", "-max_pixels", str(MAX_PIXELS)]
    command += ["-i", f"file:{path.absolute()}", "-map", "0:v:0"]
    command += ["-r", f"{rate.numerator}/{rate.denominator}"]
    if reading.num_frames is not None:
        command += ["-frames:v", str(reading.num_frames)]
    command += ["-sws_flags", f"bicubic+{ACCURATE}"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            while (frame := _next_ppm(process.stdout, reading)) is not None:
                reading.add(frame)
            status = process.wait()
        finally:  # also when a frame exceeds a limit
            process.kill()
            process.wait()
            process.stdout.close()
        if status != 0 or not reading.frames:
            errors.seek(0)
            raise ValueError(f"ffmpeg cannot read {path}: {_tail(errors.read(2**16))}")
    return reading.clip(), float(rate)


def _next_ppm(pipe: IO[bytes], reading: Reading) -> Frames | None:
    """Read the next image (H, W, 3) of a stream of PPM files: "P6", sizes, 255, pixels; None at its end."""
    header = [pipe.readline(100) for _ in range(3)]
    if not header[0]:
        return None
    width, height = map(int, header[1].split())
    if not reading.enter(width, height):
        return None
    pixels = pipe.read(height * width * 3)
    if len(pixels) != height * width * 3:  # the stream ended early
        return None
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def _tail(stderr: bytes, lines: int = 10) -> str:
    text = "\n".join(stderr.decode(errors="replace").strip().splitlines()[-lines:])
    return printable_lines(text) or "it said nothing"


def read_comment(path: Path) -> bytes | None:
    """Read the comment of a file: moov/udta/meta/ilst/©cmt of MP4, the key "comment" of QuickTime; None
    without one."""
    for meta in _find(_movie(path), "udta", "meta"):
        data = _first(meta, "ilst", COMMENT, "data") or _first(meta, "ilst", _key(meta, b"comment"), "data")
        if data is not None:
            return bytes(data[8:])  # after type and locale
    return None


def _key(meta: memoryview, name: bytes) -> str:
    """Return the name of the atom that has the value of a key: its number among the keys, 4 bytes."""
    keys = _first(meta, "keys")
    names = [] if keys is None else [bytes(body) for _, body in _atoms(keys[8:])]
    number = names.index(name) + 1 if name in names else 0
    return number.to_bytes(4, "big").decode("latin-1")


def video_rate(path: Path) -> Fraction:
    """Return the mean frames a second of the first video track, from its table of sample times."""
    for track in _find(_movie(path), "trak"):
        handler = _first(track, "mdia", "hdlr")
        if handler is None or handler[8:12] != b"vide":
            continue
        header = _first(track, "mdia", "mdhd")
        table = _first(track, "mdia", "minf", "stbl", "stts")
        if header is None or table is None:
            break
        try:
            (timescale,) = struct.unpack_from(">I", header, 20 if header[:1] == b"\1" else 12)
            (entries,) = struct.unpack_from(">I", table, 4)
            runs = np.frombuffer(table[8 : 8 + 8 * entries], ">u4").reshape(-1, 2).astype(np.float64)
        except (struct.error, ValueError) as error:
            raise ValueError(f"{path} is damaged in its frame times: {error}") from error
        count, ticks = int(runs[:, 0].sum()), int(runs.prod(axis=1).sum())
        if count > 0 and ticks > 0 and timescale > 0:
            return Fraction(timescale * count, ticks).limit_denominator(100_000)
        break
    raise ValueError(
        f"{path} has no video track with a table of frame times; "
        "`ffmpeg -i FILE -c copy NEW.mp4` may write one"
    )


def _movie(path: Path) -> memoryview:
    """Return the body of the moov atom, which describes the tracks without their samples."""
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = 0
        for _ in range(_MAX_ATOMS):
            file.seek(start)
            head = file.read(16)
            if len(head) < 8:
                break
            length, kind = struct.unpack(">I4s", head[:8])
            header = 8
            if length == 1:
                length, header = int.from_bytes(head[8:], "big"), 16
            elif length == 0:
                length = size - start
            if length < header or start + length > size:
                break
            if kind == b"moov":
                if length > _MAX_MOVIE_BYTES:
                    raise ValueError(
                        f"{path} has a movie header of {length} bytes, at most {_MAX_MOVIE_BYTES} are read; "
                        "cut the video"
                    )
                file.seek(start + header)
                return memoryview(file.read(length - header))
            start += length
    raise ValueError(f"{path} is no MP4 file, or cut off: it has no movie header")


def _atoms(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    start = 0
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        if not 8 <= length <= len(data) - start:
            return
        yield kind.decode("latin-1"), data[start + 8 : start + length]
        start += length


def _find(data: memoryview, *names: str) -> Iterator[memoryview]:
    """Yield the bodies of all atoms under the path `names`."""
    if not names:
        yield data
        return
    for kind, body in _atoms(data):
        if kind == names[0]:
            # meta has 4 bytes for its version before its children, except in old QuickTime files
            versioned = kind == "meta" and bytes(body[4:8]) != b"hdlr"
            yield from _find(body[4:] if versioned else body, *names[1:])


def _first(data: memoryview, *names: str) -> memoryview | None:
    return next(_find(data, *names), None)
