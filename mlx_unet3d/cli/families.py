"""Families of models on the command line: the pipeline of each, its settings, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..memory import Networks
from ..pipelines import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    I2VGenXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoPipeline,
    VideoToVideoPipeline,
)
from ..pipelines.calls import VideoPipeline
from ..pipelines.denoising import Steps
from ..pipelines.loading import pipeline_class
from . import long_clips, options
from .options import flag
from .settings import DEFAULTS

_MOTION = ("motion_adapter", "ip_adapter", "ip_image", "ip_scale", *long_clips.OF_MOTION)
_TEXT = ("prompt", "negative_prompt", "clip_skip", "lora", "embedding")


@dataclass(frozen=True)
class Family:
    """Models with one pipeline.

    Attributes:
        name: for messages.
        pipeline: their class.
        takes: settings that not every family takes.
        keywords: the name that `steps` of the pipeline has for a setting.
        fps: frames a second where neither the command line nor the checkpoint says.
        clip_skip: layers of the text encoder to leave out where the command line says none.
        strength: how much to change an input video, where the command line does not say.
        image_becomes: how an image comes to the size of the video, for messages.
    """

    name: str
    pipeline: type[VideoPipeline]
    takes: tuple[str, ...]
    keywords: Mapping[str, str] = field(default_factory=dict)
    fps: float = 8.0
    clip_skip: int | None = None
    image_becomes: str = ""
    strength: float = 0.6


_SIZE = {name: name for name in ("num_frames", "height", "width")}
FAMILIES = (
    Family("text-to-video", TextToVideoPipeline, _TEXT, _SIZE),
    Family(
        "text-to-video with --video",
        VideoToVideoPipeline,
        (*_TEXT, "video", "strength"),
        {"strength": "strength"},
    ),
    Family("AnimateDiff", AnimateDiffPipeline, (*_TEXT, *_MOTION, "prompt_at"), _SIZE),
    Family(
        "AnimateDiff with --video",
        AnimateDiffVideoToVideoPipeline,
        (*_TEXT, *_MOTION, "prompt_at", "video", "strength"),
        {"strength": "strength", "height": "height", "width": "width"},
        strength=0.8,
    ),
    Family("AnimateDiff on SDXL", AnimateDiffSDXLPipeline, (*_TEXT, *_MOTION), _SIZE),
    Family(
        "Stable Video Diffusion",
        StableVideoDiffusionPipeline,
        ("image", "min_guidance", "motion_bucket", "noise_aug", "decode_chunk_size"),
        {
            "num_frames": "num_frames",
            "min_guidance": "min_guidance_scale",
            "fps": "fps",
            "motion_bucket": "motion_bucket_id",
            "noise_aug": "noise_aug_strength",
        },
        fps=7.0,
        image_becomes="resized",
    ),
    Family(
        "I2VGen-XL",
        I2VGenXLPipeline,
        (*_TEXT, "image"),
        {"num_frames": "num_frames", "fps": "target_fps"},
        fps=16.0,
        clip_skip=1,
        image_becomes="cropped and resized",
    ),
)
_VIDEO_PIPELINES = {
    TextToVideoPipeline: VideoToVideoPipeline,
    AnimateDiffPipeline: AnimateDiffVideoToVideoPipeline,
}


def find_family(settings: Mapping[str, Any], *, local_files_only: bool = False) -> Family:
    """Return the family of the model that settings name, from its `model_index.json`.

    Raises FileNotFoundError, PermissionError, ConnectionError, CheckpointError as `pipeline_class`.
    """
    kind = pipeline_class(settings["model"], revision=settings["revision"], local_files_only=local_files_only)
    if settings["video"] is not None:
        kind = _VIDEO_PIPELINES.get(kind, kind)
    return next(family for family in FAMILIES if family.pipeline is kind)


def of_networks(networks: Networks) -> Family:
    """Return the family of networks that make a video from noise."""
    second = networks.text_encoder_2 is not None
    return next(
        family
        for family in FAMILIES
        if networks.unet.kind in family.pipeline.parts["unet"].kinds
        and ("text_encoder_2" in family.pipeline.parts) == second
    )


def check_family(family: Family, settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of the command line that a family does not take, or for one it lacks."""
    for name in given:
        check_name(name, family)
    if (settings["ip_image"] is None) != (settings["ip_adapter"] is None):
        raise ValueError("--ip-adapter and --ip-image go together: the adapter takes the image as a prompt")
    for name in ("prompt", "image", "video"):
        if name in family.takes and settings[name] is None:
            cure = "give one, or --from a video" if name == "prompt" else f"give one with {flag(name)}"
            raise ValueError(f"there is no {name}; {cure}")


def check_name(name: str, family: Family) -> None:
    """Raise ValueError for a setting that other families take, and this one does not."""
    able = [other.name for other in FAMILIES if name in other.takes]
    if able and name not in family.takes:
        raise ValueError(
            f"{flag(name)} means nothing to {family.name} models; it is for {', '.join(able)}: leave it "
            "out, or give another --model"
        )


def leave_out(family: Family, settings: dict[str, Any]) -> None:
    """Put back to their defaults the settings of long clips that another family's video brought along."""
    for name in (*long_clips.OF_MOTION, "prompt_at"):
        if name not in family.takes and settings[name] != DEFAULTS[name]:
            settings[name] = DEFAULTS[name]
            options.say(f"{flag(name)} of the replayed video means nothing to {family.name} models: left out")


@dataclass(frozen=True)
class States:
    """Encoded prompts and images: what `steps` of a pipeline takes by position, and by keyword."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]


def encode(
    family: Family,
    pipe: VideoPipeline,
    settings: Mapping[str, Any],
    image: Image.Image | None,
    ip_image: Image.Image | None = None,
) -> States:
    """Return the states of prompt and images, as `steps` of the pipeline takes them."""
    states: list[Any] = []
    more = {}
    if "prompt" in family.takes:
        skip, prompt, travel = settings["clip_skip"], settings["prompt"], {}
        if settings["prompt_at"] is not None:
            prompt = {0: prompt, **dict(long_clips.frame_prompts(settings))}
            travel["num_frames"] = settings["num_frames"]
        states.append(
            pipe.encode_prompt(
                prompt,
                negative_prompt=settings["negative_prompt"],
                guidance_scale=settings["guidance"],
                clip_skip=family.clip_skip if skip is None else skip,
                **travel,
            )
        )
    if "image" in family.takes:
        size = {name: settings[name] for name in ("height", "width")}
        states.append(pipe.encode_image(image, **size))
    if ip_image is not None:
        embeds = pipe.encode_ip_adapter_image(ip_image, guidance_scale=settings["guidance"])
        more["ip_adapter_image_embeds"] = embeds
    return States(tuple(states), more)


def release_encoders(pipe: VideoPipeline) -> None:
    """Let go of the networks that `encode` ran."""
    names = ("text_encoder", "text_encoder_2", "image_encoder")
    pipe.release(*(name for name in names if getattr(pipe, name, None) is not None))


def steps(
    family: Family,
    pipe: VideoPipeline,
    states: States,
    video: np.ndarray | None,
    settings: Mapping[str, Any],
    predictions: Sequence[mx.array] = (),
) -> Steps:
    """Return the denoising loop of a run."""
    own = {keyword: settings[name] for name, keyword in family.keywords.items()}
    if video is not None:
        own["video"] = video
        for name in {"height", "width"} & own.keys():
            own[name] -= own[name] % pipe.vae_scale_factor
    return pipe.steps(
        *states.positional,
        **states.keywords,
        **own,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        eta=settings["eta"],
        seed=settings["seed"],
        rng=settings["rng"],
        guidance_interval=(settings["guidance_from"], settings["guidance_to"]),
        cache_interval=settings["cache_interval"],
        cache_depth=settings["cache_depth"],
        context_windows=long_clips.context_windows(settings),
        predictions=predictions,
    )


def complete(
    family: Family, pipe: VideoPipeline, settings: dict[str, Any], image: Image.Image | None
) -> None:
    """Put in what the checkpoint or the pipeline decides, and say what size an input comes to."""
    settings["steps"] = pipe.num_inference_steps(settings["steps"])
    settings["guidance"] = pipe.guidance_scale(settings["guidance"])
    if settings["fps"] is None:
        settings["fps"] = float(pipe.recommended.fps or family.fps)
    factor = pipe.vae_scale_factor
    if "video" in family.takes:
        if settings["strength"] is None:
            settings["strength"] = family.strength
        width, height = settings["width"], settings["height"]
        if width % factor or height % factor:
            options.say(
                f"{settings['video']}: frames of {width}x{height} become {width // factor * factor}x"
                f"{height // factor * factor}, multiples of {factor}; --height and --width resize them"
            )
    else:
        settings["num_frames"] = pipe.num_frames(settings["num_frames"])
    long_clips.check(settings)
    if "free_noise" in family.takes:
        pipe.check_frames(settings["num_frames"], long_clips.context_windows(settings))
    if "video" in family.takes:
        return
    height, width = settings["height"], settings["width"]
    if image is not None and height is None and width is None:
        height, width = pipe.default_size()
        if (image.width < image.height) != (width < height):  # the trained size, on its side
            height, width = width, height
    size = (n * factor for n in pipe.latent_size(height, width))
    settings["height"], settings["width"] = size
    pipe.vae.check_frame(settings["height"], settings["width"])  # now, not when it comes to decoding
    if image is not None:
        options.say(
            f"{settings['image']}: {image.width}x{image.height} pixels, {family.image_becomes} to "
            f"{settings['width']}x{settings['height']}"
        )
