"""MP4: H.264 through an ffmpeg process; the atoms of the container are read here."""

import os
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import printable_lines
from ..inputs import open_input
from .frames import MAX_PIXELS, Frames, Reading

CRF = 17  # x264's constant rate factor: no visible loss
INSTALL = 'install ffmpeg (`brew install ffmpeg`), or `pip install "mlx-unet3d[video]"`'
COMMENT = "\u00a9cmt"  # the name of a comment in iTunes and ffmpeg
# The movie header takes about 20 bytes a frame; a file has a few atoms, or one a fragment.
_MAX_MOVIE_BYTES, _MAX_ATOMS = 2**26, 100_000


@dataclass(frozen=True)
class Ffmpeg:
    """An ffmpeg executable: its path, its version, and whether it encodes H.264 with x264."""

    executable: str
    version: str
    has_x264: bool


def installed() -> list[Ffmpeg]:
    """Return the ffmpeg on PATH and that of imageio-ffmpeg, if they exist and run."""
    executables = [shutil.which("ffmpeg"), _imageio_ffmpeg()]
    found = []
    for executable in dict.fromkeys(filter(None, executables)):
        banner = _run([executable, "-version"])
        encoders = _run([executable, "-hide_banner", "-encoders"])
        if banner.returncode == 0 == encoders.returncode:
            words = banner.stdout.decode(errors="replace").split()  # "ffmpeg version 7.1 ..."
            version = words[2] if len(words) > 2 else "unknown"
            found.append(Ffmpeg(executable, version, b" libx264 " in encoders.stdout))
    return found


def _imageio_ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # not installed, or installed without an executable
        return None


def find_encoder() -> Ffmpeg:
    """Return the first ffmpeg with x264; ValueError, which says how to install one, if there is none."""
    candidates = installed()
    for ffmpeg in candidates:
        if ffmpeg.has_x264:
            return ffmpeg
    lacking = "".join(f"; {ffmpeg.executable} lacks libx264" for ffmpeg in candidates)
    raise ValueError(f"no encoder for .mp4{lacking}: {INSTALL}, or write .gif or .webp")


def write_mp4(path: Path, frames: Frames, fps: float, comment: str | None) -> None:
    """Write H.264 in yuv420p, BT.709, index first; an odd row or column is cut off with a warning."""
    _, height, width, _ = frames.shape
    even_height, even_width = height - height % 2, width - width % 2
    if (even_height, even_width) != (height, width):
        if 0 in (even_height, even_width):
            raise ValueError(f"{width}x{height} pixels are too few for .mp4; use at least 2x2")
        warnings.warn(
            f".mp4 needs even sizes: {width}x{height} is cut to {even_width}x{even_height}",
            stacklevel=3,
        )
        frames = frames[:, :even_height, :even_width]
    rate = Fraction(fps).limit_denominator(100_000)
    command = [find_encoder().executable, "-hide_banner", "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{even_width}x{even_height}"]
    command += ["-framerate", f"{rate.numerator}/{rate.denominator}", "-i", "pipe:0", "-an"]
    # Without a declared matrix, players guess one from the size of the picture, and colours shift.
    colours = "out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int"
    command += ["-vf", f"scale={colours},format=yuv420p", "-color_range", "tv"]
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    command += ["-c:v", "libx264", "-preset", "medium", "-crf", str(CRF)]
    command += ["-movflags", "+faststart"]
    if comment is not None:
        command += ["-metadata", f"comment={comment}"]
    command += ["-f", "mp4", f"file:{path.absolute()}"]
    pixels = memoryview(np.ascontiguousarray(frames)).cast("B")
    done = _run(command, input=pixels)
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


def _run(command: Sequence[str], input: memoryview | None = None) -> subprocess.CompletedProcess[bytes]:
    given = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    try:
        return subprocess.run(command, capture_output=True, check=False, **given)
    except OSError as error:  # not executable, of another architecture
        return subprocess.CompletedProcess(command, -1, b"", str(error).encode())


def _tail(stderr: bytes, lines: int = 10) -> str:
    text = "\n".join(stderr.decode(errors="replace").strip().splitlines()[-lines:])
    return printable_lines(text) or "it said nothing"


def read_comment(path: Path) -> bytes | None:
    """Read the comment tag (moov/udta/meta/ilst/©cmt) of an MP4 file; None without one."""
    data = _first(_movie(path), "udta", "meta", "ilst", COMMENT, "data")
    return None if data is None else bytes(data[8:])  # after type and locale


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
