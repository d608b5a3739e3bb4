"""mlx-unet3d generate: a prompt, an image or a video -> a video."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .. import media
from ..atomic import check_place
from ..errors import NonFiniteError
from ..latents import open_latents
from ..layers.convolution import MODES as CONVOLUTIONS
from ..pipelines.calls import VideoPipeline
from ..schedulers import SCHEDULERS
from . import decode, families, long_clips, options
from .families import Family
from .keeping import Keeper, swapped
from .outputs import add_json, announce, check_free, file_options, hold_outputs
from .preparing import fit, load, read_frames, read_picture
from .preview import Preview, check_file
from .requests import collect_settings, given, resumed_settings, take_prompt
from .settings import public


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a video of a prompt or an image",
        description="Make a video: of a prompt; with --video of a video that it changes; of an image with a "
        "model for these. The model decides what it takes.",
        argument_default=argparse.SUPPRESS,
        usage="[PROMPT] [OPTIONS]",
        examples=(
            'mlx-unet3d generate "a large ring growing" --seed 3',
            'mlx-unet3d generate "a panda" --model damo-vilab/text-to-video-ms-1.7b -o panda.mp4',
            "mlx-unet3d generate --image photo.jpg --model stabilityai/stable-video-diffusion-img2vid-xt",
            "mlx-unet3d generate --from panda.mp4 --seed 8",
            "mlx-unet3d generate --resume panda.mp4.latents.safetensors",
        ),
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", type=options.text, help="what to show")
    parser.add_argument(
        "--prompt-file", type=options.path, metavar="FILE", help="read the prompt of a text file, - of a pipe"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=options.path,
        default=None,
        help=".gif, .webp, .png (animated), .mp4, .mov, or a folder/ of images (default: a free name of "
        "prompt and seed, see mlx-unet3d config)",
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
    parser.add_argument(
        "--preview",
        action="store_true",
        default=False,
        help="show the video as it forms, in the terminal: by kitty's or iTerm2's pictures, else half blocks",
    )
    parser.add_argument(
        "--preview-file",
        type=options.path,
        default=None,
        metavar="FILE",
        help="write the video as it forms to a small .gif or .webp, every few seconds",
    )
    add_json(parser)
    options.add_loudness(parser)

    group = parser.add_argument_group("video")
    group.add_argument(
        "--num-frames", type=options.frames, help="default: the model's or 16, with --video all of its frames"
    )
    group.add_argument("--height", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument("--width", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument(
        "--fps",
        type=options.rate,
        help="frames a second of the file, and of the motion where models take it (default: the model's, or "
        "8; of Stable Video Diffusion 7, of I2VGen-XL 16)",
    )
    options.add_file_options(group)
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
    group.add_argument(
        "--strength", type=options.number, help="how much to change, to 1 (default: 0.6; of AnimateDiff 0.8)"
    )

    group = parser.add_argument_group("image to video")
    group.add_argument(
        "--image",
        type=options.path,
        metavar="FILE",
        help="picture to begin with, of any size; without --height "
        "and --width a portrait makes the model's video on its side",
    )
    group.add_argument(
        "--motion-bucket", type=options.number, metavar="N", help="more means more motion (default: 127)"
    )
    group.add_argument(
        "--noise-aug",
        type=options.number,
        metavar="X",
        help="noise on the image: more motion, less likeness (default: 0.02)",
    )
    group.add_argument(
        "--min-guidance",
        type=options.number,
        metavar="X",
        help="guidance of the first frame, from where it rises to --guidance (default: 1)",
    )
    group.add_argument(
        "--decode-chunk-size",
        type=options.count,
        metavar="N",
        help="frames that the decoder of Stable Video Diffusion takes together (default: all, where MLX can)",
    )

    group = parser.add_argument_group("AnimateDiff")
    group.add_argument(
        "--motion-adapter",
        type=options.path,
        metavar="PATH_OR_ID",
        help="motion modules that make a Stable Diffusion model move: a folder, a file or a hub id",
    )
    group.add_argument(
        "--ip-adapter",
        type=options.path,
        metavar="PATH_OR_ID",
        help="takes an image as a prompt: a file, or on the hub OWNER/NAME/FOLDER/FILE, with its folder "
        "image_encoder beside it",
    )
    group.add_argument("--ip-image", type=options.path, metavar="FILE", help="the image for --ip-adapter")
    group.add_argument("--ip-scale", type=options.number, metavar="X", help="its weight (default: 1)")

    long_clips.add_options(parser)
    options.add_model_options(parser)
    parser.add_argument(
        "--lora",
        "--motion-lora",
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
    if "prompt_file" in args:
        take_prompt(args)
    saved = open_latents(args.resume) if "resume" in args else None
    if saved is None:
        settings, left = collect_settings(args), None
    else:
        settings, left = resumed_settings(args, saved), args.resume
    family = families.find_family(settings, local_files_only=args.local_files_only)
    families.check_family(family, settings, given(args))
    families.leave_out(family, settings)
    with ExitStack() as claims:
        job = Job(settings, hold_outputs(args, settings, claims), left)
        for output in job.outputs:
            check_output(args, output, settings)
        check_file(args.preview_file, job.outputs, args.overwrite)
        if saved is not None and saved.steps == 0:  # all but the decoding is done
            decode.make_video(args, saved, settings, job.outputs[0])
            if not args.keep_latents:
                saved.path.unlink()
            return 0
        if saved is not None:
            axis = family.pipeline.frames_axis
            job.predictions = [swapped(prediction, axis) for prediction in saved.read()[1]]
        return make_videos(args, family, job)


def check_output(args: argparse.Namespace, output: str, settings: dict[str, Any]) -> None:
    """Raise what would keep a video, or the latents beside it, from being written after the long work."""
    check_free(output, args.overwrite)
    fps = 8.0 if settings["fps"] is None else settings["fps"]
    media.check_writable(
        output, fps=fps, metadata=public(settings), overwrite=args.overwrite, **file_options(settings)
    )
    left = options.latents_path(output)
    check_place(left)
    if left.exists() and "resume" not in args and not args.overwrite:
        raise FileExistsError(
            f"{left} was left by an earlier run: finish it with --resume, show it with "
            "`mlx-unet3d decode`, or --overwrite it"
        )


def make_videos(args: argparse.Namespace, family: Family, job: Job) -> int:
    settings = job.settings
    video = None if settings["video"] is None else read_frames(settings)
    image, ip_image = (read_picture(settings, name) for name in ("image", "ip_image"))
    options.advise()
    stages: dict[str, dict[str, float]] = {}

    with options.stage("load", stages):
        pipe = load(args, family, settings)
        families.complete(family, pipe, settings, image)
        media.check_scale(settings["scale"], [settings[n] for n in ("num_frames", "height", "width")])
        fit(pipe, settings, args.memory)
    options.say("\n".join(f"{name}: {value}" for name, value in public(settings).items()), options.VERBOSE)
    with options.stage("encode", stages):
        states = families.encode(family, pipe, settings, image, ip_image)
        families.release_encoders(pipe)  # their memory is wanted from here on

    preview = Preview(pipe.vae, pipe.frames_axis, args.preview, args.preview_file, settings["fps"])
    finished: list[tuple[str, mx.array, Keeper, dict[str, Any]]] = []
    try:
        for i, output in enumerate(job.outputs):
            own = settings | {"seed": settings["seed"] + i}
            left = options.latents_path(output)
            keeper = Keeper(left, own, job.predictions, job.left, pipe.frames_axis)
            measured = dict(stages)
            with options.stage(f"denoise, seed {own['seed']}", measured):
                latents = denoise(family, pipe, states, video, own, keeper, job.predictions, preview)
            keeper.finish(latents)
            finished.append((output, latents, keeper, measured))
        pipe.release("unet")

        for output, latents, keeper, measured in list(finished):
            with options.stage("decode", measured):
                frames = pipe.decode(
                    latents,
                    decode_chunk_size=settings["decode_chunk_size"],
                    progress=not options.is_quiet(),
                )
            frames = media.to_uint8(frames[0])
            own = dict(metadata=public(keeper.settings), **file_options(settings))
            media.write_video(output, frames, fps=settings["fps"], **own)
            finished.pop(0)
            if not args.keep_latents:
                keeper.clear()
            announce(args, output, keeper.settings, measured)
    except BaseException:
        for _, _, keeper, _ in finished:
            options.say(keeper.hint(), options.QUIET)
        raise
    return 0


def denoise(
    family: Family,
    pipe: VideoPipeline,
    states: families.States,
    video: np.ndarray | None,
    settings: dict[str, Any],
    keeper: Keeper,
    predictions: Sequence[mx.array],
    preview: Preview,
) -> mx.array:
    """Run the loop with a progress bar; where it is cut off, there is on disk what it takes to go on."""
    record = None
    try:
        with tqdm(desc="denoise", unit="step", disable=options.is_quiet()) as bar, closing(preview):
            for record in families.steps(family, pipe, states, video, settings, predictions):
                bar.total = record.total
                bar.update()
                keeper.step(record)
                preview.step(record)
    except NonFiniteError:
        keeper.discard()  # so would the rest of this run be
        raise
    except BaseException:
        keeper.stop()
        raise
    return record.latents
