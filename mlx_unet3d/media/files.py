"""write_video, read_video and read_metadata: choose the format, check, and write complete files only."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL
from PIL import Image, ImageOps, features

from ..atomic import check_place, whole_file, whole_folder
from ..scalars import as_python
from . import gif, images, mp4
from .ffmpeg import CODECS, DEFAULT_CODEC, check_codec, installed
from .frames import (
    DEFAULT_FPS,
    MAX_FPS,
    Frames,
    Reading,
    Size,
    as_frames,
    check_fps,
    check_frames,
    check_scale,
    scaled,
)
from .metadata import MetadataValue, decode_metadata, encode_metadata

SUFFIXES = {
    ".gif": "gif",
    ".webp": "webp",
    ".png": "png",
    ".apng": "png",
    ".mp4": "mp4",
    ".mov": "mp4",
}
READ_ONLY_SUFFIXES = {".m4v": "mp4"}  # the same container format

# Other files that a folder of frames may contain when it is replaced; macOS makes the second.
OWN_FILES = re.compile(r"\d{5,}\.png|\.DS_Store")

PathLike = str | os.PathLike[str]


def write_video(
    path: PathLike,
    frames: Frames | Sequence[Image.Image | Frames],
    fps: float = DEFAULT_FPS,
    metadata: Mapping[str, MetadataValue] | None = None,
    loop: int = 0,
    *,
    overwrite: bool = True,
    scale: int = 1,
    codec: str | None = None,
) -> Path:
    """Write a clip in the format of the suffix; the file is written completely or not at all.

    - `.gif`: one palette of 256 colours for all frames, ordered dithering; at most 50 fps.
    - `.webp`: lossy at quality 90; small and near.
    - `.png`, `.apng`: animated PNG, lossless.
    - `.mp4`, `.mov`: H.264, or another `codec`, by ffmpeg, declared and converted as BT.709; an odd last row
      or column is cut off with a warning.
    - no suffix, a slash at the end, or an existing folder: 00000.png, ... in that folder, lossless. Frames of
      an earlier clip are replaced; a folder with other files is refused.

    Args:
        path: file or folder to write; its parent folder must exist.
        frames: uint8 (F, H, W, 3), red green blue, see `to_uint8`; or a list of images, or of arrays
            (H, W, 3).
        fps: frames a second, 0.1 to 240. Durations are multiples of 10 ms in GIF and of 1 ms in WebP and PNG:
            frames of two durations alternate there, so that the rate is right over the clip.
        metadata: settings of the clip, stored in the file as flat JSON, see `read_metadata`.
        loop: 0 repeats forever, n shows the clip n times. Only 0 for .mp4, .mov and folders, where the player
            decides.
        overwrite: False refuses an existing path.
        scale: each pixel becomes a square of so many each way.
        codec: of .mp4 and .mov: "h264" (the default), "hevc", or in .mov "prores".

    Returns:
        The path written.

    Raises:
        TypeError, ValueError: frames, fps, loop, metadata, scale or codec that cannot be written.
        OSError: as `check_writable`.
        RuntimeError: ffmpeg failed; contains the last lines of its output.
    """
    frames = as_frames(frames)
    check_frames(frames)
    fps = as_python(fps)
    loop, metadata = as_python(loop), metadata and {key: as_python(value) for key, value in metadata.items()}
    scale = as_python(scale)
    options = dict(fps=fps, metadata=metadata, loop=loop, overwrite=overwrite, scale=scale, codec=codec)
    check_writable(path, **options)
    frames = scaled(frames, scale)
    kind, target = _kind(path), Path(path)
    comment = None if metadata is None else encode_metadata(metadata)
    if kind == "folder":
        with whole_folder(target) as folder:
            images.write_folder(folder, frames, fps, comment)
        return target
    with whole_file(target) as file:
        if kind == "mp4":
            mp4.write_mp4(file, frames, fps, comment, codec or DEFAULT_CODEC)
        else:
            writers = {"gif": gif.write_gif, "webp": images.write_webp, "png": images.write_png}
            writers[kind](file, frames, fps, comment, loop)
    return target


def check_writable(
    path: PathLike,
    *,
    fps: float = DEFAULT_FPS,
    metadata: Mapping[str, MetadataValue] | None = None,
    loop: int = 0,
    overwrite: bool = True,
    scale: int = 1,
    codec: str | None = None,
) -> None:
    """Raise the errors of `write_video` early, before the frames are computed.

    Raises:
        ValueError: the suffix is unknown or has no encoder here, a value is out of range, or a codec does not
            go with the suffix.
        TypeError: a value has the wrong type.
        FileNotFoundError, NotADirectoryError, PermissionError: the parent folder is missing, not a folder, or
            not writable.
        OSError: a test file could not be written there, or the name is too long.
        IsADirectoryError: the path has the suffix of a file and is a folder.
        FileExistsError: the path exists and `overwrite` is False, or it is a folder with other files than
            frames.
    """
    kind, target = _kind(path), Path(path)
    check_fps(fps, gif.MAX_FPS if kind == "gif" else MAX_FPS)
    if isinstance(loop, bool) or not isinstance(loop, int):
        raise TypeError(f"loop={loop!r} is a {type(loop).__name__}; give an integer")
    if not 0 <= loop < 2**16:
        raise ValueError(f"loop={loop} is out of range; use 0 (forever) <= loop < 65536")
    if loop != 0 and kind in ("mp4", "folder"):
        raise ValueError(f"loop={loop}: {target} holds no loop count; use 0, or .gif, .webp or .png")
    if metadata is not None:
        encode_metadata(metadata)
    check_scale(scale)
    _check_place(target, kind, overwrite)
    check_codec(codec, "" if kind == "folder" else target.suffix.lower())
    if kind == "webp" and not features.check("webp"):
        raise ValueError(f"{target}: this Pillow was built without WebP; write .gif or .png")


def _check_place(target: Path, kind: str, overwrite: bool) -> None:
    parent = (target.resolve() if kind == "folder" else target.absolute()).parent
    if not parent.exists():
        raise FileNotFoundError(f"{parent} is missing; make that folder first, for {target.name}")
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file; {target.name} needs a folder there")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} is closed to writing; give another folder")
    check_place(target.resolve() if kind == "folder" else target)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise FileExistsError(f"{target} is there; give another path, or allow to overwrite")
    if kind != "folder":
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder; remove it, or give another name")
    elif not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a folder of frames needs another name")
    else:
        others = sorted(p.name for p in target.iterdir() if not OWN_FILES.fullmatch(p.name))
        if others:
            raise FileExistsError(
                f"{target} holds more than frames ({', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}), and writing replaces the whole folder; "
                "give an empty or a new one"
            )


def read_video(
    path: PathLike, *, num_frames: int | None = None, size: Size = (None, None)
) -> tuple[Frames, float]:
    """Read a clip: GIF, WebP, PNG, a folder of PNG files, MP4 or MOV (by ffmpeg).

    Args:
        path: of the clip.
        num_frames: number of frames to read, from the first; None for all.
        size: height and width to which each frame is resized as it is read; None for no resizing.

    Returns:
        uint8 frames (F, H, W, 3) and the frames a second. Frames shown longer than others are repeated, so
        that the rate is even; files without a rate have 8.0.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: unknown suffix, a damaged file, no ffmpeg for MP4 and MOV, or too many pixels: more than
            2**25 a frame, or 2**29 bytes in all, after resizing.
    """
    kind, source = _existing(path)
    reading = Reading(source, num_frames, size)
    if kind == "folder":
        return images.read_folder(reading)
    return mp4.read_mp4(reading) if kind == "mp4" else images.read_animation(reading)


def read_image(path: PathLike) -> Image.Image:
    """Read a picture, turned as its EXIF data say, of one of Pillow's formats that this package opens.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a damaged file, or more than 2**25 pixels.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a picture")
    with images.open_image(source) as image:
        Reading(source).check_size(*image.size)
        image.load()
        return ImageOps.exif_transpose(image)


def read_metadata(path: PathLike) -> dict[str, MetadataValue]:
    """Return the `metadata` that `write_video` stored in a file or folder, without ffmpeg.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the file has none, so this program did not make it.
    """
    kind, source = _existing(path)
    if kind == "mp4":
        return decode_metadata(mp4.read_comment(source), source)
    image = images.png_files(source)[0] if kind == "folder" else source
    return decode_metadata(images.read_comment(image), source)


def encoders() -> dict[str, str | None]:
    """Return the encoder of each format, its version and its codecs; None without one."""
    pillow = f"Pillow {PIL.__version__}"
    webp = f"{pillow}, libwebp {features.version('webp')}" if features.check("webp") else None
    found = {".gif": pillow, ".webp": webp, ".png": pillow, ".mp4": None, ".mov": None}
    ffmpegs = [ffmpeg for ffmpeg in installed() if DEFAULT_CODEC in ffmpeg.codecs]
    for suffix in (".mp4", ".mov") if ffmpegs else ():
        codecs = [name for name in ffmpegs[0].codecs if suffix in CODECS[name].suffixes]
        found[suffix] = f"ffmpeg {ffmpegs[0].version} ({ffmpegs[0].executable}): {', '.join(codecs)}"
    return found


def _kind(path: PathLike, suffixes: Mapping[str, str] = SUFFIXES) -> str:
    text, suffix = os.fspath(path), Path(path).suffix.lower()
    if Path(path).name in ("", ".."):  # "", ".", "/", "..": the folder in use, certainly a mistake
        raise ValueError(f"{text!r} is no name for a video; give one, such as video.gif")
    if text.endswith(("/", os.sep)):
        return "folder"
    if suffix in suffixes:
        return suffixes[suffix]
    if suffix == "" or Path(path).is_dir():
        return "folder"
    raise ValueError(
        f"{text} has the unknown suffix {suffix!r}; use {', '.join(suffixes)}, "
        "or a slash at the end for a folder of .png files"
    )


def _existing(path: PathLike) -> tuple[str, Path]:
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing")
    if source.is_dir():
        return "folder", source
    kind = _kind(path, SUFFIXES | READ_ONLY_SUFFIXES)
    if kind == "folder":
        raise ValueError(f"{source} has no suffix; use {', '.join(SUFFIXES | READ_ONLY_SUFFIXES)}")
    return kind, source
