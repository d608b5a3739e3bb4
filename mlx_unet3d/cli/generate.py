"""mlx-unet3d generate: a prompt, or a prompt and a video -> a video."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .. import __version__, media, memory
from ..atomic import check_place, claim
from ..checkpoints import DEMO, checksum
from ..checkpoints.adapters import TEXTUAL_INVERSION_NAMES, read_adapter
from ..chips import working_set
from ..errors import NonFiniteError
from ..latents import SavedLatents, open_latents
from ..layers.convolution import MODES as CONVOLUTIONS
from ..pipelines import DenoisingStep, TextToVideoPipeline, VideoToVideoPipeline
from ..schedulers import SCHEDULERS
from . import decode, options
from .keeping import Keeper
from .settings import (
    DEFAULTS,
    SETTINGS,
    check,
    checksum_of_frames,
    is_same_model,
    of_file,
    public,
    trusted,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a video of a prompt",
        description="Make a video of a prompt, or with --video change one.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", nargs="?", type=options.text, help="what to show")
    parser.add_argument(
        "-o",
        "--output",
        type=options.path,
        default=None,
        help=".gif, .webp, .png (animated), .mp4, or a folder/ of images (default: video.gif)",
    )
    parser.add_argument("--from", dest="replay", type=Path, metavar="FILE", help="take settings from a video")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="LATENTS",
        help="finish a run that stopped or was killed, from what it left; give --model, --lora and --video "
        "again where they are not in the current folder",
    )
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace an existing output")
    parser.add_argument(
        "--keep-latents", action="store_true", default=False, help="keep them beside the video"
    )

    group = parser.add_argument_group("video")
    group.add_argument(
        "--num-frames", type=options.frames, help="default: the model's or 16, with --video all of its frames"
    )
    group.add_argument("--height", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument("--width", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument("--fps", type=options.rate, help="frames a second of the file (default: 8)")
    group.add_argument("--num-videos", type=options.count, default=1, help="so many seeds, counting up")

    group = parser.add_argument_group("sampling")
    group.add_argument("--negative-prompt", type=options.text, help="what to avoid")
    group.add_argument("--steps", type=options.count, help="default: the model's, or 50")
    group.add_argument(
        "--guidance", type=options.number, help="1: none (default: the model's or 9, with --video 15)"
    )
    group.add_argument("--seed", type=options.seed, help="default: 0")
    group.add_argument("--rng", choices=("torch", "mlx"), help="torch: the noise of diffusers (default)")
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}, or a diffusers class (default: the model's)",
    )
    group.add_argument("--eta", type=options.number, help="noise of DDIM and TCD, 0 to 1 (default: 0)")
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
    group.add_argument(
        "--video", type=options.path, metavar="FILE", help="video to change, to --height and --width if given"
    )
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


@dataclass
class Job:
    """Videos to make.

    Attributes:
        settings: of all of them.
        outputs: where to, one a seed.
        left: the file of a run to go on with, and `predictions` those in it.
    """

    settings: dict[str, Any]
    outputs: list[str]
    left: Path | None = None
    predictions: list[mx.array] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    saved = open_latents(args.resume) if "resume" in args else None
    if saved is None:
        settings = collect_settings(args)
        output = "video.gif" if args.output is None else args.output
        job = Job(settings, output_paths(output, settings["seed"], args.num_videos))
    else:
        settings = resumed_settings(args, saved)
        output = options.output_of(args.resume) if args.output is None else args.output
        job = Job(settings, [output], args.resume)
    with ExitStack() as claims:
        for output in job.outputs:  # from here on no other run has these names
            claims.enter_context(claim(options.latents_path(output)))
        for output in job.outputs:
            check_output(args, output, settings)
        if saved is not None and saved.steps == 0:  # all but the decoding is done
            decode.make_video(args, saved, settings, output)
            if not args.keep_latents:
                saved.path.unlink()
            return 0
        if saved is not None:
            job.predictions = saved.read()[1]
        return make_videos(args, job)


def check_output(args: argparse.Namespace, output: str, settings: dict[str, Any]) -> None:
    """Raise what would keep a video, or the latents beside it, from being written after the long work."""
    carried = public(settings)
    media.check_writable(output, fps=settings["fps"], metadata=carried, overwrite=args.overwrite)
    left = options.latents_path(output)
    check_place(left)
    if left.exists() and "resume" not in args and not args.overwrite:
        raise FileExistsError(
            f"{left} was left by an earlier run: finish it with --resume, show it with "
            "`mlx-unet3d decode`, or --overwrite it"
        )


def make_videos(args: argparse.Namespace, job: Job) -> int:
    settings = job.settings
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

    finished: list[tuple[str, mx.array, Keeper]] = []
    try:
        for i, output in enumerate(job.outputs):
            own = settings | {"seed": settings["seed"] + i}
            keeper = Keeper(options.latents_path(output), own, job.predictions, job.left)
            with options.stage(f"denoise, seed {own['seed']}"):
                latents = denoise(pipe, states, video, own, keeper, job.predictions)
            keeper.finish(latents)
            finished.append((output, latents, keeper))
        pipe.release("unet")

        for output, latents, keeper in list(finished):
            with options.stage("decode"):
                frames = media.to_uint8(pipe.decode(latents, progress=True)[0])
            media.write_video(output, frames, fps=settings["fps"], metadata=public(keeper.settings))
            finished.pop(0)
            if not args.keep_latents:
                keeper.clear()
            print(output, flush=True)
    except BaseException:
        for _, _, keeper in finished:
            options.say(keeper.hint())
        raise
    return 0


def collect_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Defaults, then what a replayed file says, then the command line."""
    settings = dict(DEFAULTS)
    if "replay" in args:
        found = of_file(media.read_metadata(args.replay), args.replay)
        if "prompt" not in found:
            raise ValueError(f"{args.replay} has no settings of mlx-unet3d in it; give a video that it made")
        settings |= {key: value for key, value in found.items() if key in SETTINGS}
        settings["replayed_weights"] = found.get("weights")
        settings["replayed_frames"] = found.get("video_frames")
        if "model" in args and not is_same_model(args.model, settings["model"]):
            settings |= {"revision": None, "variant": None}  # they were the other model's
    settings |= given(args)
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
    check(settings)
    if "replay" in args:
        trusted(settings, args.replay, given(args))
    if settings["dtype"] is None:
        settings["dtype"] = "float16" if mx.default_device() == mx.gpu else "float32"
    return settings


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the command line."""
    found = {key: value for key, value in vars(args).items() if key in SETTINGS and value is not None}
    if "lora" in found:  # as text, for the settings go into the video
        found["lora"] = json.dumps([lora_setting(values) for values in args.lora])
    if "embedding" in found:
        found["embedding"] = json.dumps([embedding_setting(values) for values in args.embedding])
    return found


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


# What names files; the rest of a run is as it was begun.
_PLACES = {"model", "lora", "embedding", "video"}


def resumed_settings(args: argparse.Namespace, saved: SavedLatents) -> dict[str, Any]:
    """What an unfinished run was doing."""
    own = given(args)
    changed = sorted(own.keys() - _PLACES)
    changed += ["from"] * ("replay" in args) + ["num-videos"] * (args.num_videos > 1)
    if changed:
        names = ["the prompt" if key == "prompt" else "--" + key.replace("_", "-") for key in changed]
        raise ValueError(
            f"--resume finishes the run of {args.resume} as it was begun; leave out {', '.join(names)}"
        )
    found = of_file(saved.settings, saved.path)
    settings = DEFAULTS | found | own
    missing = [name for name in ("prompt", "model", "dtype") if settings[name] is None]
    if missing:
        raise ValueError(f"{saved.path} does not say its {', '.join(missing)}; it cannot be finished")
    check(settings)
    options.check_latents(saved.path, saved.shape, settings)
    trusted(settings, saved.path, own)
    settings["replayed_weights"] = settings.get("weights")
    settings["replayed_frames"] = settings.get("video_frames")
    settings.pop("steps_done", None)
    return settings


def output_paths(output: str, seed: int, count: int) -> list[str]:
    """One path a video; with the seed in the name where there are several."""
    if count == 1:
        return [output]
    # A slash at the end asks for a folder, whatever the name looks like.
    stem, suffix = (output.rstrip("/"), "/") if output.endswith("/") else os.path.splitext(output)
    return [f"{stem}_seed{seed + i}{suffix}" for i in range(count)]


def load(args: argparse.Namespace, settings: dict[str, Any]) -> TextToVideoPipeline | VideoToVideoPipeline:
    loras = [
        (read_adapter(path, local_files_only=args.local_files_only), path, weight)
        for path, weight in json.loads(settings.get("lora") or "[]")
    ]
    kind = TextToVideoPipeline if settings["video"] is None else VideoToVideoPipeline
    pipe = kind.from_pretrained(
        settings["model"],
        dtype=options.DTYPES[settings["dtype"]],
        vae_dtype=options.DTYPES[settings["vae_dtype"]],
        scheduler=settings["scheduler"],
        revision=settings["revision"],
        variant=settings["variant"],
        local_files_only=args.local_files_only,
    )
    settings["scheduler"] = settings["scheduler"] or type(pipe.scheduler).__name__
    pipe.unet.set_convolution(settings["convolution"])
    if settings["vae_tiling"]:
        pipe.enable_vae_tiling()
    settings["weights"] = pipe.weights_checksum
    for file, path, weight in loras:
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
    settings.pop("replayed_frames", None)
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
        check(settings)
        return
    factor = pipe.vae_scale_factor
    width, height = settings["width"], settings["height"]
    if width % factor or height % factor:
        options.say(
            f"{settings['video']}: frames of {width}x{height} become {width // factor * factor}x"
            f"{height // factor * factor}, multiples of {factor}; --height and --width resize them instead"
        )


def fit(
    pipe: TextToVideoPipeline | VideoToVideoPipeline, settings: dict[str, Any], choice: str | float
) -> None:
    """Choose the memory options of the pipeline, and say so where they are not the defaults."""
    if choice == "off":
        return
    budget = memory.available() if choice == "auto" else working_set(choice)
    if choice != "auto" or mx.default_device() == mx.gpu:
        memory.apply_limits(budget)
    factor = pipe.vae_scale_factor
    plan = memory.plan(
        memory.Networks.of(pipe),
        num_frames=settings["num_frames"],
        height=max(settings["height"] // factor, 1) * factor,
        width=max(settings["width"] // factor, 1) * factor,
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
    settings["video_frames"] = checksum_of_frames(frames)
    expected = settings.pop("replayed_frames", None)
    if expected not in (None, settings["video_frames"]):
        options.say(f"the frames of {source} are not those of the replayed video: the result will differ")
    return frames


def denoise(
    pipe: TextToVideoPipeline | VideoToVideoPipeline,
    states: tuple[mx.array, mx.array | None],
    video: np.ndarray | None,
    settings: dict[str, Any],
    keeper: Keeper,
    predictions: Sequence[mx.array],
) -> mx.array:
    """Run the loop with a progress bar; where it is cut off, there is on disk what it takes to go on."""
    record = None
    try:
        with tqdm(desc="denoise", unit="step") as bar:
            for record in steps(pipe, states, video, settings, predictions):
                bar.total = record.total
                bar.update()
                keeper.step(record)
    except NonFiniteError:
        keeper.discard()  # so would the rest of this run be
        raise
    except BaseException:
        keeper.stop()
        raise
    return record.latents


def steps(
    pipe: TextToVideoPipeline | VideoToVideoPipeline,
    states: tuple[mx.array, mx.array | None],
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
