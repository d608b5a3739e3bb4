"""Frames <-> files: GIF, WebP, PNG, folders of PNG and MP4, with the settings of the video inside."""

from .comparing import compared, psnr, ssim
from .export import export_to_gif, export_to_video
from .ffmpeg import CODECS, codec_suffixes
from .files import check_writable, encoders, read_image, read_metadata, read_video, write_video
from .frames import MAX_SCALE, check_scale, to_uint8
from .metadata import MetadataValue

__all__ = [
    "CODECS",
    "MAX_SCALE",
    "MetadataValue",
    "check_scale",
    "check_writable",
    "codec_suffixes",
    "compared",
    "encoders",
    "export_to_gif",
    "export_to_video",
    "psnr",
    "read_image",
    "read_metadata",
    "read_video",
    "ssim",
    "to_uint8",
    "write_video",
]
