"""The pipeline of a folder, by the class that its `model_index.json` names."""

from pathlib import Path
from typing import Any

from ..checkpoints import Hub, find_folder, read_json, takes_hub
from ..diffusers_names import answers_diffusers
from ..errors import CheckpointError
from .animatediff import AnimateDiffPipeline
from .animatediff_sdxl import AnimateDiffSDXLPipeline
from .calls import VideoPipeline
from .i2vgen_xl import I2VGenXLPipeline
from .stable_video import StableVideoDiffusionPipeline
from .text_to_video import TextToVideoPipeline
from .video_to_video import VideoToVideoPipeline

PIPELINES: dict[str, type[VideoPipeline]] = {
    "TextToVideoSDPipeline": TextToVideoPipeline,
    "TextToVideoMSPipeline": TextToVideoPipeline,
    "VideoToVideoSDPipeline": VideoToVideoPipeline,
    "AnimateDiffPipeline": AnimateDiffPipeline,
    "AnimateDiffSDXLPipeline": AnimateDiffSDXLPipeline,
    "AnimateDiffVideoToVideoPipeline": AnimateDiffPipeline,
    "StableDiffusionPipeline": AnimateDiffPipeline,
    "StableDiffusionXLPipeline": AnimateDiffSDXLPipeline,
    "StableVideoDiffusionPipeline": StableVideoDiffusionPipeline,
    "I2VGenXLPipeline": I2VGenXLPipeline,
}
"""Pipelines by the class of diffusers whose folders they read; one of images moves with a motion adapter."""


@takes_hub
def pipeline_class(path_or_id: str | Path, *, hub: Hub) -> type[VideoPipeline]:
    """Return the class that reads a pipeline folder or hub id.

    Args:
        path_or_id: a folder, a hub id, or "demo".
        hub: how the hub is reached: `revision`, `local_files_only`, `token`, `cache_dir`.

    Raises FileNotFoundError, PermissionError, ConnectionError: see `find_folder`; CheckpointError for a
    pipeline of another kind.
    """
    folder = find_folder(path_or_id, files=("model_index.json",), hub=hub)
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise CheckpointError(
            f"{path_or_id}: model_index.json describes a {name!r}; there are pipelines for "
            f"{', '.join(PIPELINES)}"
        )
    return PIPELINES[name]


@answers_diffusers
@takes_hub
def load_pipeline(path_or_id: str | Path, *, hub: Hub, **options: Any) -> VideoPipeline:
    """Read a pipeline of any family; diffusers' `DiffusionPipeline.from_pretrained`.

    Args:
        path_or_id: a folder of diffusers or of the converter, a hub id, or "demo".
        hub: how the hub is reached: `revision`, `local_files_only`, `token`, `cache_dir`.
        options: of the `from_pretrained` of the pipeline's class, such as `dtype`.

    Raises as that does, and CheckpointError for a pipeline of another kind.
    """
    return pipeline_class(path_or_id, hub=hub).from_pretrained(path_or_id, hub=hub, **options)


class DiffusionPipeline:
    """diffusers' name of what reads a pipeline of any family."""

    from_pretrained = staticmethod(load_pipeline)
    """See `load_pipeline`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            "DiffusionPipeline is no class of a pipeline; write DiffusionPipeline.from_pretrained(model), or "
            "one of " + ", ".join(dict.fromkeys(kind.__name__ for kind in PIPELINES.values()))
        )
