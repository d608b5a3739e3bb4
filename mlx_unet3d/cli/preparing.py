"""Before a run of `generate`: its pipeline with adapters, its memory options, its inputs."""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .. import __version__, media, memory
from ..checkpoints import checksum, read_component_config
from ..checkpoints.adapter_keys import is_list
from ..checkpoints.adapters import TEXTUAL_INVERSION_NAMES, inside_hub, read_adapter
from ..chips import working_set
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from ..pipelines.calls import VideoPipeline
from ..pipelines.few_steps import T2V_TURBO, sample_as, training_of_lora
from ..pipelines.motion_training import training_of
from . import long_clips, options
from .families import Family
from .plan import stage_lines
from .settings import RECORDED, check, checksum_of_frames


def load(args: argparse.Namespace, family: Family, settings: dict[str, Any]) -> VideoPipeline:
    loras = [
        (read_adapter(path, local_files_only=args.local_files_only), path, weight)
        for path, weight in json.loads(settings.get("lora") or "[]")
    ]
    more = {}
    if "motion_adapter" in family.takes and settings["motion_adapter"] is not None:
        more["motion_adapter"] = settings["motion_adapter"]
    pipe = family.pipeline.from_pretrained(
        settings["model"],
        dtype=options.DTYPES[settings["dtype"]],
        vae_dtype=options.DTYPES[settings["vae_dtype"]],
        scheduler=settings["scheduler"],
        revision=settings["revision"],
        variant=settings["variant"],
        local_files_only=args.local_files_only,
        **more,
    )
    if more:
        sample_as_trained(args, pipe, settings)
    pipe.unet.set_convolution(settings["convolution"])
    if settings["vae_tiling"]:
        pipe.enable_vae_tiling()
    settings["weights"] = pipe.weights_checksum
    for file, path, weight in loras:
        embedded = pipe.embeds_guidance
        counts = pipe.load_lora_weights(file, path, weight=weight)
        layers = ", ".join(f"{count} layers of the {name}" for name, count in counts.items())
        options.say(f"LoRA {path}: {layers}, weight {weight:g}")
        settings["weights"] += "+" + checksum([file.path])
        training = training_of_lora(path, file.path.name)
        if pipe.embeds_guidance and not embedded and is_list(file):
            training = T2V_TURBO
        if training is not None and weight:
            said = sample_as(pipe, training, settings["scheduler"])
            options.say(f"LoRA {path}: {said}, unless options say otherwise")
    settings["scheduler"] = settings["scheduler"] or type(pipe.scheduler).__name__
    if pipe.embeds_guidance and settings["negative_prompt"] is not None:
        options.say("the negative prompt has no effect: this model takes guidance as an embedding")
    for path, token in json.loads(settings.get("embedding") or "[]"):
        file = read_adapter(path, names=TEXTUAL_INVERSION_NAMES, local_files_only=args.local_files_only)
        name, *more = pipe.load_textual_inversion(file, token)
        options.say(f"embedding {path}: {name!r}, {len(more) + 1} vectors")
        settings["weights"] += "+" + checksum([file.path])
    if settings["ip_adapter"] is not None:
        load_ip_adapter(args, pipe, settings)
    if "free_noise" in family.takes:
        long_clips.enable(pipe, settings)
    replayed = settings.pop("replayed_weights", None)
    if replayed not in (None, settings["weights"]):
        if "resume" in args:
            raise ValueError(f"the weights in {settings['model']} are not those of the run in {args.resume}")
        options.say("the weights are not those of the replayed video: the result will differ")
    for name in [name for name in settings if name.startswith("replayed_")]:
        del settings[name]
    settings |= {"program": f"mlx-unet3d {__version__}", "mlx": mx.__version__}
    return pipe


def sample_as_trained(args: argparse.Namespace, pipe: VideoPipeline, settings: dict[str, Any]) -> None:
    """Let a model of images sample on the schedule that its motion modules were trained on."""
    where = dict(revision=settings["revision"], local_files_only=args.local_files_only)
    index = read_component_config(settings["model"], "model_index.json", **where)
    if not index["_class_name"].startswith("StableDiffusion"):
        return  # its sampler is meant for motion modules already
    training = training_of(settings["motion_adapter"])
    sample_as(pipe, training, settings["scheduler"])
    options.say(
        f"{settings['motion_adapter']}: {training.title}, sampled by {type(pipe.scheduler).__name__} on "
        f"their schedule{'; ' + training.advice if training.advice else ''}"
    )


def load_ip_adapter(args: argparse.Namespace, pipe: VideoPipeline, settings: dict[str, Any]) -> None:
    """Load an IP-Adapter, of a file, a folder, or on the hub OWNER/NAME[/FOLDER][/FILE]."""
    source, subfolder, name = place_of(settings["ip_adapter"])
    pipe.load_ip_adapter(source, subfolder, name, local_files_only=args.local_files_only)
    pipe.set_ip_adapter_scale(settings["ip_scale"])
    options.say(f"IP-Adapter {settings['ip_adapter']}: scale {settings['ip_scale']:g}")


def place_of(name: str) -> tuple[str, str | None, str | None]:
    """Return the folder or hub id of a file, the folder in it, and the file's name."""
    path = Path(name).expanduser()
    return (str(path.parent), None, path.name) if path.is_file() else inside_hub(name)


def fit(pipe: VideoPipeline, settings: dict[str, Any], choice: str | float) -> None:
    """Choose the memory options of the pipeline, and say so where they are not the defaults."""
    if choice == "off":
        return
    budget = memory.available() if choice == "auto" else working_set(choice)
    if choice != "auto" or mx.default_device() == mx.gpu:
        memory.apply_limits(budget)
    factor = pipe.vae_scale_factor
    networks = memory.Networks.of(pipe)

    def planned(decode_chunk_size: int | None) -> memory.Plan:
        return memory.plan(
            networks,
            num_frames=settings["num_frames"],
            height=max(settings["height"] // factor, 1) * factor,
            width=max(settings["width"] // factor, 1) * factor,
            guidance=pipe.is_guided(settings["guidance"]),
            encoded=settings["video"] is not None,
            cache_depth=settings["cache_depth"] if settings["cache_interval"] > 1 else None,
            dtype=pipe.unet.dtype,
            vae_dtype=pipe.vae.dtype,
            vae_tiling=settings["vae_tiling"],
            decode_chunk_size=decode_chunk_size,
            free_noise=getattr(pipe.unet, "free_noise", None),
            context_windows=long_clips.context_windows(settings),
            text_of_frames=settings["prompt_at"] is not None,
            budget=budget,
            find_nearest=False,
        )

    chunk = settings["decode_chunk_size"]
    plan = planned(chunk)
    if chunk is None and isinstance(pipe.vae, AutoencoderKLTemporalDecoder):
        chunk = settings["num_frames"]
        while not plan.fits and chunk > 1:
            chunk = -(-chunk // 2)
            plan = planned(chunk)
        if chunk < settings["num_frames"]:
            settings["decode_chunk_size"] = chunk
            options.say(
                f"memory: the decoder takes {chunk} frames together, to take less, which changes them a "
                "little; --decode-chunk-size decides otherwise"
            )
    plan.settings.apply(pipe)
    options.say("\n".join(stage_lines(plan)), options.VERBOSE)
    sizes = f"{plan.peak / 1e9:.2f} GB of {budget / 1e9:.2f} GB"
    if not plan.fits:
        options.say(f"memory: this may not fit, {sizes} with {plan.settings}; see mlx-unet3d plan")
    elif plan.settings != memory.Settings():
        options.say(f"memory: {plan.settings}, to fit: {sizes}")


def read_frames(settings: dict[str, Any]) -> np.ndarray:
    """The input video (F, H, W, 3), its first frames where a number is asked for, resized for a size.

    Its size goes into the settings; the encoder of the VAE leaves out what is over at the right and below.
    """
    source, wanted = settings["video"], settings["num_frames"]
    frames, _ = media.read_video(source, num_frames=wanted, size=(settings["height"], settings["width"]))
    if wanted is not None and wanted > len(frames):
        raise ValueError(
            f"--num-frames {wanted}: {source} has only {len(frames)} frames; ask for as many or fewer"
        )
    settings |= dict(zip(("num_frames", "height", "width"), frames.shape, strict=False))
    check(settings)
    note(settings, "video", frames)
    return frames


def read_picture(settings: dict[str, Any], name: str) -> Image.Image | None:
    """Read a picture that settings name, turned as its EXIF data say; None where there is none."""
    if settings[name] is None:
        return None
    picture = media.read_image(settings[name])
    note(settings, name, np.asarray(picture.convert("RGB")))
    return picture


def note(settings: dict[str, Any], name: str, pixels: np.ndarray) -> None:
    """Remember the fingerprint of an input, and say where it is not that of the replayed run."""
    record = RECORDED[name]
    settings[record] = checksum_of_frames(pixels)
    if settings.pop(f"replayed_{record}", None) not in (None, settings[record]):
        parts = "frames" if name == "video" else "pixels"
        options.say(
            f"the {parts} of {settings[name]} are not those of the replayed video: the result will differ"
        )
