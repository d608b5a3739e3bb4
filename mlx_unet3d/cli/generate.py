"""mlx-unet3d generate: a prompt, or a prompt and a video -> a video."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import __version__, media, memory
from ..checkpoints import DEMO, checksum
from ..checkpoints.adapters import TEXTUAL_INVERSION_NAMES, read_adapter
from ..chips import working_set
from ..errors import NonFiniteError
from ..latents import load_latents, save_latents
from ..layers.convolution import MODES as CONVOLUTIONS
from ..pipelines import DenoisingStep, TextToVideoPipeline, VideoToVideoPipeline
from ..schedulers import SCHEDULERS, scheduler_from_config
from . import options

# What a file remembers and `--from` takes up again, with the default of each. None: the model's own, or
# what follows from the other settings.
_DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "negative_prompt": None,
    "num_frames": None,
    "height": None,
    "width": None,
    "steps": None,
    "guidance": None,
    "seed": 0,
    "rng": "torch",
    "scheduler": None,
    "eta": 0.0,
    "clip_skip": None,
    "dtype": None,
    "vae_dtype": "float32",
    "vae_tiling": False,
    "fps": 8.0,
    "model": None,
    "revision": None,
    "variant": None,
    "lora": None,
    "embedding": None,
    "convolution": "auto",
    "cache_interval": 1,
    "cache_depth": 1,
    "guidance_from": 0.0,
    "guidance_to": 1.0,
    "video": None,
    "strength": 0.6,
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a video of a prompt",
        description="Make a video of a prompt, or with --video change one.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", nargs="?", help="what to show")
    parser.add_argument(
        "-o",
        "--output",
        default=None,
        help=".gif, .webp, .png (animated), .mp4, or a folder/ of images (default: video.gif)",
    )
    parser.add_argument("--from", dest="replay", type=Path, metavar="FILE", help="take settings from a video")
    parser.add_argument(
        "--resume", type=Path, metavar="LATENTS", help="finish a run that stopped, from what it left"
    )
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace an existing output")
    parser.add_argument(
        "--keep-latents", action="store_true", default=False, help="keep them beside the video"
    )

    group = parser.add_argument_group("video")
    group.add_argument(
        "--num-frames", type=options.count, help="default: the model's or 16, with --video all of its frames"
    )
    group.add_argument("--height", type=options.count, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument("--width", type=options.count, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument("--fps", type=options.rate, help="frames a second of the file (default: 8)")
    group.add_argument("--num-videos", type=options.count, default=1, help="so many seeds, counting up")

    group = parser.add_argument_group("sampling")
    group.add_argument("--negative-prompt", help="what to avoid")
    group.add_argument("--steps", type=options.count, help="default: the model's, or 50")
    group.add_argument(
        "--guidance", type=options.number, help="1: none (default: the model's or 9, with --video 15)"
    )
    group.add_argument("--seed", type=int, help="default: 0")
    group.add_argument("--rng", choices=("torch", "mlx"), help="torch: the noise of diffusers (default)")
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}, or a diffusers class (default: the model's)",
    )
    group.add_argument("--eta", type=options.number, help="noise of DDIM, 0 to 1 (default: 0)")
    group.add_argument("--clip-skip", type=options.count, help="layers of the text encoder to leave out")

    group = parser.add_argument_group("less work, another result")
    group.add_argument(
        "--cache-interval",
        type=options.count,
        metavar="N",
        help="run the deep layers only every N steps (default: 1, always)",
    )
    group.add_argument(
        "--cache-depth", type=options.count, metavar="N", help="layers that always run (default: 1)"
    )
    group.add_argument(
        "--guidance-from",
        type=options.number,
        metavar="SHARE",
        help="guidance from this share of the run on, 0 to 1 (default: 0)",
    )
    group.add_argument(
        "--guidance-to", type=options.number, metavar="SHARE", help="and up to this one (default: 1)"
    )

    group = parser.add_argument_group("video to video")
    group.add_argument("--video", metavar="FILE", help="video to change, to --height and --width if given")
    group.add_argument("--strength", type=options.number, help="how much to change, to 1 (default: 0.6)")

    options.add_model_options(parser)
    parser.add_argument(
        "--lora",
        nargs="+",
        action="append",
        metavar=("PATH_OR_ID", "WEIGHT"),
        help="use a LoRA, with this weight (default: 1): a file, a folder, or on the hub "
        "OWNER/NAME[/FOLDER][/FILE]; may be given again for others",
    )
    parser.add_argument(
        "--embedding",
        nargs="+",
        action="append",
        metavar=("FILE", "TOKEN"),
        help="take in a textual inversion, under its own name unless TOKEN gives one; found as --lora, "
        "may be given again for others",
    )
    parser.add_argument(
        "--dtype",
        choices=options.DTYPES,
        help="of the network (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--convolution",
        choices=CONVOLUTIONS,
        help="3x3 convolutions of the UNet: precise takes no Winograd on a Mac's GPU (default: auto, that is "
        "precise in bfloat16)",
    )
    parser.add_argument(
        "--memory",
        type=memory_option,
        default="auto",
        metavar="auto|off|SIZE",
        help="fit into this machine's memory, or that of a Mac of SIZE such as 16GB, by options that leave "
        "the video as it is (default: auto)",
    )
    parser.set_defaults(run=run)


def memory_option(text: str) -> str | float:
    """The value of --memory: "auto", "off", or GiB."""
    return text if text in ("auto", "off") else options.memory_size(text)


def run(args: argparse.Namespace) -> int:
    predictions: list[mx.array] = []
    if "resume" in args:
        settings, predictions = resumed_settings(args)
        outputs = [args.output or options.output_of(args.resume)]
    else:
        settings = collect_settings(args)
        outputs = output_paths(args.output or "video.gif", settings["seed"], args.num_videos)
    for output in outputs:
        media.check_writable(output, fps=settings["fps"], metadata=settings, overwrite=args.overwrite)
        left = options.latents_path(output)
        if left.exists() and "resume" not in args and not args.overwrite:
            raise FileExistsError(
                f"{left} was left by an earlier run: finish it with --resume, show it with "
                "`mlx-unet3d decode`, or --overwrite it"
            )
    if settings["scheduler"] is not None:
        check_scheduler(settings["scheduler"])
    video = None if settings["video"] is None else read_frames(settings)
    options.advise()

    with options.stage("load"):
        pipe = load(args, settings)
        complete(pipe, settings)
        fit(pipe, settings, args.memory)
    with options.stage("prompt"):
        states = pipe.encode_prompt(
            settings["prompt"],
            settings["negative_prompt"],
            guidance_scale=settings["guidance"],
            clip_skip=settings["clip_skip"],
        )
        pipe.release("text_encoder")  # its memory is wanted from here on

    waiting: dict[Path, tuple[str, dict[str, Any]]] = {}  # latents on disk -> output and settings
    try:
        for i, output in enumerate(outputs):
            own = settings | {"seed": settings["seed"] + i}
            with options.stage(f"denoise, seed {own['seed']}"):
                latents = denoise(pipe, states, video, own, options.latents_path(output), predictions)
            save_latents(options.latents_path(output), latents, own)
            waiting[options.latents_path(output)] = output, own
        pipe.release("unet")

        for latents_file, (output, own) in list(waiting.items()):
            with options.stage("decode"):
                latents, _, _ = load_latents(latents_file)
                frames = media.to_uint8(pipe.decode(latents, progress=True)[0])
            media.write_video(output, frames, fps=own["fps"], metadata=own)
            del waiting[latents_file]
            if not args.keep_latents:
                latents_file.unlink()
            print(output, flush=True)
    except BaseException:
        for latents_file in waiting:
            options.say(f"finished latents are in {latents_file}: mlx-unet3d decode {latents_file}")
        raise
    return 0


def collect_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Defaults, then what a replayed file says, then the command line."""
    settings = dict(_DEFAULTS)
    if "replay" in args:
        found = media.read_metadata(args.replay)
        known = {key: value for key, value in found.items() if key in _DEFAULTS}
        if "prompt" not in known:
            raise ValueError(f"{args.replay} has no settings of mlx-unet3d in it; give a video that it made")
        settings |= known
        settings["replayed_weights"] = found.get("weights")
        if "model" in args:
            settings |= {"revision": None, "variant": None}  # they were the other model's
    settings |= {key: value for key, value in vars(args).items() if key in _DEFAULTS and value is not None}
    if "lora" in args:  # as text, for the settings go into the video
        settings["lora"] = json.dumps([lora_setting(values) for values in args.lora])
    if "embedding" in args:
        settings["embedding"] = json.dumps([embedding_setting(values) for values in args.embedding])
    if settings["prompt"] is None:
        raise ValueError("there is no prompt; give one, or --from a video")
    if settings["model"] is None:
        options.say(
            "no --model: using the small demo model, which draws one moving shape; give a pipeline folder or "
            "a hub id for anything else"
        )
        settings["model"] = DEMO
    if "strength" in args and settings["video"] is None:
        raise ValueError(f"--strength {args.strength:g} says how much to change a video; give --video too")
    first, last = settings["guidance_from"], settings["guidance_to"]
    if not 0 <= first < last <= 1:
        raise ValueError(
            f"--guidance-from {first:g} --guidance-to {last:g}: these are shares of the run, the first below "
            "the second, both from 0 to 1"
        )
    if settings["dtype"] is None:
        settings["dtype"] = "float16" if mx.default_device() == mx.gpu else "float32"
    return settings


def lora_setting(values: Sequence[Any]) -> tuple[str, float]:
    """The values of one --lora."""
    path, *rest = values
    if len(rest) > 1:
        raise ValueError(f"--lora {' '.join(map(str, values))}: give one LoRA and one weight; repeat --lora")
    try:
        return str(path), options.number(str(rest[0])) if rest else 1.0
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--lora {path} {rest[0]}: the weight must be a finite number") from error


def embedding_setting(values: Sequence[str]) -> tuple[str, str | None]:
    """The values of one --embedding."""
    path, *rest = values
    if len(rest) > 1 or "" in rest:
        raise ValueError(
            f"--embedding {' '.join(values)}: give one file and one token without spaces; repeat --embedding"
        )
    return path, rest[0] if rest else None


def resumed_settings(args: argparse.Namespace) -> tuple[dict[str, Any], list[mx.array]]:
    """What an unfinished run was doing, and the predictions of its steps so far."""
    _, settings, predictions = load_latents(args.resume)
    if not predictions:
        raise ValueError(f"{args.resume} holds finished latents: mlx-unet3d decode {args.resume}")
    changed = sorted(key for key in vars(args) if key in _DEFAULTS and getattr(args, key) is not None)
    changed += ["from"] * ("replay" in args) + ["num-videos"] * (args.num_videos > 1)
    if changed:
        names = ["the prompt" if key == "prompt" else "--" + key.replace("_", "-") for key in changed]
        raise ValueError(
            f"--resume finishes the run of {args.resume} as it was begun; leave out {', '.join(names)}"
        )
    settings = _DEFAULTS | settings
    settings["replayed_weights"] = settings.get("weights")
    del settings["steps_done"]
    return settings, predictions


def output_paths(output: str, seed: int, count: int) -> list[str]:
    """One path a video; with the seed in the name where there are several."""
    if count == 1:
        return [output]
    # A slash at the end asks for a folder, whatever the name looks like.
    stem, suffix = (output.rstrip("/"), "/") if output.endswith("/") else os.path.splitext(output)
    return [f"{stem}_seed{seed + i}{suffix}" for i in range(count)]


def check_scheduler(name: str) -> None:
    """ValueError for an unknown name, before anything is loaded."""
    scheduler_from_config({"_class_name": "DDIMScheduler"}, name)


def load(args: argparse.Namespace, settings: dict[str, Any]) -> TextToVideoPipeline | VideoToVideoPipeline:
    kind = TextToVideoPipeline if settings["video"] is None else VideoToVideoPipeline
    pipe = kind.from_pretrained(
        settings["model"],
        dtype=options.DTYPES[settings["dtype"]],
        vae_dtype=options.DTYPES[settings["vae_dtype"]],
        revision=settings["revision"],
        variant=settings["variant"],
        local_files_only=args.local_files_only,
    )
    if settings["scheduler"] is not None:
        pipe.scheduler = scheduler_from_config(pipe.scheduler.config, settings["scheduler"])
    settings["scheduler"] = settings["scheduler"] or type(pipe.scheduler).__name__
    pipe.unet.set_convolution(settings["convolution"])
    if settings["vae_tiling"]:
        pipe.enable_vae_tiling()
    settings["weights"] = pipe.weights_checksum
    for path, weight in json.loads(settings.get("lora") or "[]"):
        file = read_adapter(path, local_files_only=args.local_files_only)
        counts = pipe.load_lora_weights(file, path, weight=weight)
        layers = ", ".join(f"{count} layers of the {name}" for name, count in counts.items())
        options.say(f"LoRA {path}: {layers}, weight {weight:g}")
        settings["weights"] += "+" + checksum([file.path])
    for path, token in json.loads(settings.get("embedding") or "[]"):
        file = read_adapter(path, names=TEXTUAL_INVERSION_NAMES, local_files_only=args.local_files_only)
        name, *more = pipe.load_textual_inversion(file, token)
        options.say(f"embedding {path}: {name!r}, {len(more) + 1} vectors")
        settings["weights"] += "+" + checksum([file.path])
    replayed = settings.pop("replayed_weights", None)
    if replayed not in (None, settings["weights"]):
        if "resume" in args:
            raise ValueError(f"the weights in {settings['model']} are not those of the run in {args.resume}")
        options.say("the weights are not those of the replayed video: the result will differ")
    settings |= {"program": f"mlx-unet3d {__version__}", "mlx": mx.__version__}
    return pipe


def complete(pipe: TextToVideoPipeline | VideoToVideoPipeline, settings: dict[str, Any]) -> None:
    """Put in what the checkpoint or the pipeline decides."""
    settings["steps"] = pipe.num_inference_steps(settings["steps"])
    settings["guidance"] = pipe.guidance_scale(settings["guidance"])
    if settings["video"] is None:
        settings["num_frames"] = pipe.num_frames(settings["num_frames"])
        size = pipe.latent_size(settings["height"], settings["width"])
        settings["height"], settings["width"] = (n * pipe.vae_scale_factor for n in size)
        pipe.vae.check_frame(settings["height"], settings["width"])  # now, not when it comes to decoding


def fit(
    pipe: TextToVideoPipeline | VideoToVideoPipeline, settings: dict[str, Any], choice: str | float
) -> None:
    """Choose the memory options of the pipeline, and say so where they are not the defaults."""
    if choice == "off":
        return
    budget = memory.available() if choice == "auto" else working_set(choice)
    if choice != "auto" or mx.default_device() == mx.gpu:
        memory.apply_limits(budget)
    plan = memory.plan(
        memory.Networks.of(pipe),
        **{key: settings[key] for key in ("num_frames", "height", "width")},
        guidance=settings["guidance"] > 1,
        encoded=settings["video"] is not None,
        cache_depth=settings["cache_depth"] if settings["cache_interval"] > 1 else None,
        dtype=pipe.unet.dtype,
        vae_dtype=pipe.vae.dtype,
        vae_tiling=settings["vae_tiling"],
        budget=budget,
        find_nearest=False,
    )
    plan.settings.apply(pipe)
    sizes = f"{plan.peak / 1e9:.2f} GB of {budget / 1e9:.2f} GB"
    if not plan.fits:
        options.say(f"memory: this may not fit, {sizes} with {plan.settings}; see mlx-unet3d plan")
    elif plan.settings != memory.Settings():
        options.say(f"memory: {plan.settings}, to fit: {sizes}")


def read_frames(settings: dict[str, Any]) -> np.ndarray:
    """The input video (F, H, W, 3), its first frames where a number is asked for, resized for a size."""
    frames, _ = media.read_video(settings["video"])
    if settings["num_frames"] is not None:
        if settings["num_frames"] > len(frames):
            raise ValueError(
                f"--num-frames {settings['num_frames']}: {settings['video']} has only {len(frames)} frames; "
                "ask for as many or fewer"
            )
        frames = frames[: settings["num_frames"]]
    height = settings["height"] if settings["height"] is not None else frames.shape[1]
    width = settings["width"] if settings["width"] is not None else frames.shape[2]
    settings |= {"height": height, "width": width, "num_frames": len(frames)}
    if (height, width) == frames.shape[1:3]:
        return frames
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in frames])


def denoise(
    pipe: TextToVideoPipeline | VideoToVideoPipeline,
    states: mx.array,
    video: np.ndarray | None,
    settings: dict[str, Any],
    latents_file: Path,
    predictions: Sequence[mx.array],
) -> mx.array:
    """Run the loop with a progress bar; where it is cut off, leave on disk what it takes to go on."""
    made: list[mx.array] = []
    record = None
    try:
        with tqdm(desc="denoise", unit="step") as bar:
            for record in steps(pipe, states, video, settings, predictions):
                made.append(record.prediction)
                bar.total = record.total
                bar.update()
    except NonFiniteError:
        raise  # and so would the rest of this run
    except BaseException:
        if record is not None:
            # The guess of the finished latents: the noisy ones would decode to noise.
            save_latents(latents_file, record.denoised, settings | {"steps_done": len(made)}, made)
            options.say(
                f"stopped after step {len(made)} of {record.total}. To finish it, or see it so far:\n"
                f"  mlx-unet3d generate --resume {latents_file}\n"
                f"  mlx-unet3d decode {latents_file}"
            )
        raise
    return record.latents


def steps(
    pipe: TextToVideoPipeline | VideoToVideoPipeline,
    states: mx.array,
    video: np.ndarray | None,
    settings: dict[str, Any],
    predictions: Sequence[mx.array],
) -> Iterator[DenoisingStep]:
    common = dict(
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        eta=settings["eta"],
        seed=settings["seed"],
        rng=settings["rng"],
        predictions=predictions,
        guidance_interval=(settings["guidance_from"], settings["guidance_to"]),
        cache_interval=settings["cache_interval"],
        cache_depth=settings["cache_depth"],
    )
    if isinstance(pipe, VideoToVideoPipeline):
        return pipe.steps(states, video, strength=settings["strength"], **common)
    size = {key: settings[key] for key in ("num_frames", "height", "width")}
    return pipe.steps(states, **size, **common)
