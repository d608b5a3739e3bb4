"""The ffmpeg at hand: where it is, and which video codecs it encodes."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

INSTALL = 'install ffmpeg (`brew install ffmpeg`), or `pip install "mlx-unet3d[video]"`'


@dataclass(frozen=True)
class Codec:
    """A video codec.

    Attributes:
        title: for messages.
        encoder: of ffmpeg.
        pixels: ffmpeg's name of the pixel format.
        arguments: of the encoder.
        suffixes: of the files that hold it, the usual one first.
        unit: rows and columns of a frame are multiples of these two.
        least: smallest side of a frame.
    """

    title: str
    encoder: str
    pixels: str
    arguments: tuple[str, ...]
    suffixes: tuple[str, ...]
    unit: tuple[int, int]
    least: int


# Constant quality without visible loss. QuickTime plays HEVC only under the tag hvc1.
CODECS = {
    "h264": Codec(
        "H.264",
        "libx264",
        "yuv420p",
        ("-preset", "medium", "-crf", "17"),
        (".mp4", ".mov"),
        (2, 2),
        2,
    ),
    "hevc": Codec(
        "HEVC",
        "libx265",
        "yuv420p",
        ("-preset", "medium", "-crf", "17", "-tag:v", "hvc1", "-x265-params", "log-level=error"),
        (".mp4", ".mov"),
        (2, 2),
        16,
    ),
    "prores": Codec(
        "ProRes 422 HQ",
        "prores_ks",
        "yuv422p10le",
        ("-profile:v", "3", "-vendor", "apl0"),
        (".mov",),
        (1, 2),
        2,
    ),
}
DEFAULT_CODEC = "h264"


@dataclass(frozen=True)
class Ffmpeg:
    """An ffmpeg executable: its path, its version, and the names in `CODECS` that it encodes."""

    executable: str
    version: str
    codecs: tuple[str, ...]


def installed() -> list[Ffmpeg]:
    """Return the ffmpeg on PATH and that of imageio-ffmpeg, if they exist and run."""
    executables = dict.fromkeys(filter(None, [shutil.which("ffmpeg"), _imageio_ffmpeg()]))
    probed = (_probe(executable, os.stat(executable).st_mtime_ns) for executable in executables)
    return [ffmpeg for ffmpeg in probed if ffmpeg is not None]


@cache
def _probe(executable: str, stamp: int) -> Ffmpeg | None:
    """Ask an executable, as of the time `stamp`, what it is; None where it does not run."""
    banner = run([executable, "-version"])
    encoders = run([executable, "-hide_banner", "-encoders"])
    if not banner.returncode == 0 == encoders.returncode:
        return None
    words = banner.stdout.decode(errors="replace").split()  # "ffmpeg version 7.1 ..."
    version = words[2] if len(words) > 2 else "unknown"
    listed = encoders.stdout.decode(errors="replace").split()
    able = tuple(name for name, codec in CODECS.items() if codec.encoder in listed)
    return Ffmpeg(executable, version, able)


def _imageio_ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # not installed, or installed without an executable
        return None


def find_encoder(codec: str = DEFAULT_CODEC) -> Ffmpeg:
    """Return the first ffmpeg that encodes a codec.

    Raises ValueError for none, with what those at hand lack and can do, and how to install one.
    """
    candidates = installed()
    for ffmpeg in candidates:
        if codec in ffmpeg.codecs:
            return ffmpeg
    known = CODECS[codec]
    lacking = "".join(
        f"; {ffmpeg.executable} lacks {known.encoder}"
        + (f" and can do {', '.join(ffmpeg.codecs)}" if ffmpeg.codecs else "")
        for ffmpeg in candidates
    )
    raise ValueError(
        f"no encoder of {codec} for {known.suffixes[0]}{lacking}: {INSTALL}, or write .gif or .webp"
    )


def codec_suffixes(codec: str | None) -> tuple[str, ...]:
    """Return the suffixes of files that hold a codec, or any codec for None."""
    return CODECS[DEFAULT_CODEC if codec is None else codec].suffixes


def check_codec(codec: str | None, suffix: str) -> str | None:
    """Return the codec of a file with this suffix, None where it holds none.

    Raises ValueError for a codec that is unknown, that such a file does not hold, or without an encoder.
    """
    if codec is not None and codec not in CODECS:
        raise ValueError(f"codec={codec!r} is none of {', '.join(CODECS)}")
    holding = [name for name, known in CODECS.items() if suffix in known.suffixes]
    if codec is not None and codec not in holding:
        wanted = " or ".join(CODECS[codec].suffixes)
        raise ValueError(
            f"a {suffix or 'folder'} holds no {codec}; write {wanted}, or "
            + (f"choose {' or '.join(holding)}" if holding else "leave the codec out")
        )
    if not holding:
        return None
    chosen = DEFAULT_CODEC if codec is None else codec
    find_encoder(chosen)
    return chosen


def run(command: Sequence[str], input: memoryview | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; an executable that does not start has the status -1."""
    given = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    try:
        return subprocess.run(command, capture_output=True, check=False, **given)
    except OSError as error:  # not executable, of another architecture
        return subprocess.CompletedProcess(command, -1, b"", str(error).encode())
