"""mlx-unet3d plan: predict the memory and time of a video before anything is downloaded or computed."""

import argparse
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import memory
from ..chips import CHIPS, Chip, find_chip, working_set
from . import families, long_clips, options
from .config import preference
from .settings import DEFAULTS, SETTINGS


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="predict the memory and the time that a video takes",
        description="Predict the memory of each stage, the options with which a video fits, and the least "
        "time of a step. Reads configs alone; no weight is downloaded.",
        usage="[OPTIONS]",
        examples=(
            "mlx-unet3d plan --model damo-vilab/text-to-video-ms-1.7b --chip M2",
            "mlx-unet3d plan --model ms-1.7b --num-frames 24 --height 320 --width 576 --memory 8GB",
        ),
    )
    group = parser.add_argument_group("video")
    group.add_argument("--num-frames", "--frames", type=options.frames, help="default: the model's, or 16")
    group.add_argument("--height", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument("--width", type=options.side, help="pixels, a multiple of 8 (default: the model's)")
    group.add_argument(
        "--guidance", type=options.number, default=9.0, help="at most 1: one pass a step (default: above)"
    )
    group.add_argument(
        "--video-to-video", action="store_true", help="the run starts from a video, which is encoded"
    )
    group.add_argument(
        "--cache-depth",
        type=options.count,
        metavar="N",
        help="layers that always run where generate has a --cache-interval, whose features take memory",
    )
    group.add_argument(
        "--decode-chunk-size",
        type=options.count,
        metavar="N",
        help="frames that the decoder of Stable Video Diffusion takes together (default: all, where MLX can)",
    )
    long_clips.add_options(parser, sampling=False)
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--chip", type=chip, metavar="NAME", help=f"{', '.join(CHIPS)} (default: this machine)"
    )
    group.add_argument(
        "--memory",
        type=options.memory_size,
        metavar="SIZE",
        help="of a Mac, such as 16GB (default: all that are sold)",
    )
    options.add_model_options(parser, weights=False)
    parser.add_argument(
        "--motion-adapter",
        type=options.path,
        metavar="PATH_OR_ID",
        help="motion modules that make a Stable Diffusion model move: a folder, a file or a hub id; a single "
        "file on the hub is downloaded",
    )
    parser.add_argument(
        "--dtype",
        choices=options.DTYPES,
        help="of the network (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.set_defaults(run=run)


def chip(text: str) -> Chip:
    """Return the chip of a name."""
    try:
        return find_chip(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class Machine:
    """A name, and the bytes that MLX should use at most."""

    name: str
    budget: int


def run(args: argparse.Namespace) -> int:
    model = args.model if args.model is not None else preference("model")[0]
    where = dict(revision=args.revision, local_files_only=args.local_files_only)
    networks = memory.read_networks(model, motion_adapter=args.motion_adapter, **where)
    machines = machines_of(args)
    metal = args.chip is not None or args.memory is not None or mx.default_device() == mx.gpu
    dtype = args.dtype if args.dtype is not None else "float16" if metal else "float32"
    height, width = size_of(networks, args)
    frames = args.num_frames if args.num_frames is not None else networks.default_frames
    if frames is not None and frames > 1:  # for one frame, the plan itself says what to do
        options.check_size(frames, height, width)
    clip = clip_of(networks, args, frames)
    plans = []
    for machine in machines:
        found = memory.plan(
            networks,
            num_frames=frames,
            height=height,
            width=width,
            guidance=args.guidance > 1,
            encoded=args.video_to_video,
            cache_depth=args.cache_depth,
            dtype=options.DTYPES[dtype],
            vae_dtype=options.DTYPES[args.vae_dtype or "float32"],
            vae_tiling=bool(args.vae_tiling),
            decode_chunk_size=args.decode_chunk_size,
            **clip,
            budget=machine.budget,
            backend="metal" if metal else "cpu",
            chip=args.chip,
        )
        plans.append((machine, found))
        if found.fits and found.settings == memory.Settings():
            break  # more memory changes nothing
    guidance = "guidance as an embedding" if networks.embeds_guidance else "guidance"
    guidance = f"{'with' if args.guidance > 1 or networks.embeds_guidance else 'without'} {guidance}"
    for line in report(plans, model, dtype, guidance, args.chip):
        print(line)
    return 0 if plans[-1][1].fits else 1


def clip_of(networks: memory.Networks, args: argparse.Namespace, frames: int) -> dict[str, Any]:
    """Return the arguments of `memory.plan` about long clips, checked as those of `generate` are."""
    given = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    family = families.of_networks(networks)
    for name in given.keys() & {*long_clips.OF_MOTION, "prompt_at"}:
        families.check_name(name, family)
    if "prompt_at" in given:
        given["prompt_at"] = long_clips.prompts_setting(args.prompt_at)
    settings = DEFAULTS | given | {"num_frames": frames}
    long_clips.check_given(given, settings)
    long_clips.check(settings)
    positions = getattr(networks.unet.config, "motion_max_seq_length", 1)
    return {
        "context_windows": long_clips.context_windows(settings),
        "free_noise": long_clips.free_noise(settings, positions),
        "text_of_frames": settings["prompt_at"] is not None,
    }


def machines_of(args: argparse.Namespace) -> list[Machine]:
    """Return the machine on the command line, the machines sold with a chip, or this one."""
    if args.memory is not None:
        name = f"{args.chip.name} with " if args.chip is not None else "a Mac with "
        return [Machine(f"{name}{args.memory:g} GB", working_set(args.memory))]
    if args.chip is not None:
        return [
            Machine(f"{args.chip.name} with {n} GB", args.chip.working_sets()[n])
            for n in args.chip.memory_gib
        ]
    return [Machine("this machine", memory.available())]


def size_of(networks: memory.Networks, args: argparse.Namespace) -> tuple[int, int]:
    """Return height and width in pixels."""
    default = networks.default_size
    if default is None and (args.height is None or args.width is None):
        raise ValueError("the config of the unet has no sample_size: give --height and --width")
    height, width = default or (None, None)
    return args.height or height, args.width or width


def report(
    plans: list[tuple[Machine, memory.Plan]], model: str, dtype: str, guidance: str, chip: Chip | None
) -> list[str]:
    """Return lines about plans for machines, the smallest first, with the stages of the last."""
    last = plans[-1][1]
    lines = [f"{model}: {last.video}, {guidance}, {dtype}", ""]
    lines += [*stage_lines(last), ""]
    for machine, plan in plans:
        usable = f"{machine.name} ({gigabytes(machine.budget)} for MLX)"
        if plan.fits:
            lines.append(f"{usable}: fits in {gigabytes(plan.peak)}, {plan.settings}")
            continue
        nearest = f"the nearest that fits: {plan.nearest}" if plan.nearest else "nor does any smaller video"
        lines.append(f"{usable}: does not fit, {gigabytes(plan.peak)} at least; {nearest}")
    if chip is not None:
        lines.append(
            f"{chip.name}: {last.step_seconds:.3g} s a step at its peak rates; real runs take longer"
        )
    return lines


def stage_lines(plan: memory.Plan) -> list[str]:
    """Return a table of the stages of a plan."""
    lines = [f"{'stage':<10}{'weights':>10}{'peak':>10}{'largest buffer':>18}"]
    for stage in plan.stages:
        sizes = (gigabytes(n) for n in (stage.weights, stage.peak, stage.largest))
        lines.append("{:<10}{:>10}{:>10}{:>18}".format(stage.name, *sizes))
    return lines


def gigabytes(nbytes: int) -> str:
    """Format bytes in 10^9, to two places."""
    return f"{nbytes / 1e9:.2f} GB"
