"""mlx-unet3d convert: any checkpoint -> a folder that loads directly."""

import argparse
from collections.abc import Iterator

from ..checkpoints.matching import MismatchError
from ..checkpoints.storage import parse_size
from ..errors import printable
from . import options
from .requests import lora_setting

_ALL = 10**6  # lines about mismatches; a damaged header may have more


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint",
        description="Convert a diffusers pipeline or one network, in safetensors or torch pickles (read "
        "without torch, and never run), to the MLX layout, to another dtype, or back to diffusers. "
        "Original files (ModelScope, AnimateDiff, Stable Diffusion, Stable Video Diffusion, I2VGen-XL) are "
        "told by their tensors.",
        usage="--hf-path PATH_OR_ID --mlx-path FOLDER [OPTIONS]",
        examples=(
            "mlx-unet3d convert --hf-path damo-vilab/text-to-video-ms-1.7b --variant fp16 --mlx-path ms-1.7b",
            "mlx-unet3d convert --hf-path ms-1.7b --mlx-path ms-1.7b-q8 -q --verify",
            "mlx-unet3d convert --hf-path sd15.safetensors --motion-adapter mm.ckpt --mlx-path moves -q",
        ),
    )
    parser.add_argument(
        "--hf-path",
        required=True,
        metavar="PATH_OR_ID",
        help="folder, hub id or weight file to convert; on the hub OWNER/NAME/FOLDER/FILE",
    )
    parser.add_argument(
        "--mlx-path",
        type=options.path,
        default="mlx_model",
        metavar="PATH",
        help="folder to make (mlx_model)",
    )
    parser.add_argument(
        "--dtype", choices=options.DTYPES, help="of all floating tensors (default: that of the source)"
    )
    parser.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantize the UNet; a pipeline's text encoder gets 8 bits",
    )
    parser.add_argument("--q-bits", type=int, metavar="N", help="2, 3, 4, 5, 6 or 8 (default: 8; implies -q)")
    parser.add_argument(
        "--q-group-size",
        type=int,
        metavar="N",
        help="32, 64 or 128 (default: 64; mxfp4 and mxfp8: 32, nvfp4: 16; implies -q)",
    )
    parser.add_argument(
        "--q-mode", choices=("affine", "mxfp4", "mxfp8", "nvfp4"), help="default: affine; implies -q"
    )
    parser.add_argument(
        "--q-recipe",
        choices=("mixed", "uniform", "linear"),
        help="mixed (default): first, last and time layers, shortcuts, ends of transformers in 8 bits; "
        "uniform: all alike; linear: no convolutions but 1x1; implies -q",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="folder or hub id of the tokenizer, or of a pipeline that has it; original files have none",
    )
    parser.add_argument(
        "--motion-adapter",
        metavar="PATH_OR_ID",
        help="folder, hub id or file of AnimateDiff's motion modules, to put into a UNet of Stable Diffusion",
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        action="append",
        metavar=("PATH_OR_ID", "WEIGHT"),
        help="add a LoRA to the weights, with this weight (default: 1), found as by generate; one of few "
        "steps brings its sampler, steps and guidance; may be given again",
    )
    parser.add_argument("--to", choices=("mlx", "diffusers"), default="mlx", help="layout (default: mlx)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--variant", help="weight files to read, such as fp16")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the hub")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that is there")
    parser.add_argument(
        "--verify", action="store_true", help="read the result back and compare it with the source"
    )
    parser.add_argument(
        "--upload-repo",
        metavar="OWNER/NAME",
        help="send the result to the hub as well, to a repository that is made, private, if it is not there; "
        "one that holds files is only replaced with --force",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would become of each tensor, and stop"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Only this command needs the converter.
    import mlx_unet3d_convert as converter

    from ..layers.quantized import Quantization

    asked = (args.q_bits, args.q_group_size, args.q_mode, args.q_recipe)
    quantization = None
    if args.quantize or any(value is not None for value in asked):
        quantization = Quantization(args.q_bits, args.q_group_size, args.q_mode or "affine")
    common = dict(
        tokenizer=args.tokenizer,
        motion_adapter=args.motion_adapter,
        loras=[lora_setting(values) for values in args.lora or ()],
        quantization=quantization,
        recipe=args.q_recipe or "mixed",
        dtype=None if args.dtype is None else options.DTYPES[args.dtype],
        layout=args.to,
        variant=args.variant,
        revision=args.revision,
        local_files_only=args.local_files_only,
    )
    parse_size(args.max_shard_size)
    if args.dry_run:
        try:
            plan = converter.plan_checkpoint(args.hf_path, **common)
        except MismatchError as error:  # its message shows only some mismatches
            print(*map(printable, error.lines(_ALL)), sep="\n")
            raise
        print(*map(printable, table(plan)), sep="\n")
        return 0
    converter.convert(
        args.hf_path,
        args.mlx_path,
        max_shard_size=args.max_shard_size,
        force=args.force,
        verify=args.verify,
        upload_repo=args.upload_repo,
        progress=True,
        say=options.say,
        **common,
    )
    print(args.mlx_path)
    return 0


def table(plan) -> Iterator[str]:
    """Yield a line a tensor (name, dtype and shape in the source and the result, and the permutation of its
    axes), then the assumptions and the cost of the conversion."""
    for component in plan.components:
        names = ", ".join(path.name for path in component.files)
        yield f"{component.title}: {names} ({component.reason})"
        if component.assumption:
            yield f"{component.title}: {component.assumption}"
        width = max(len(tensor.key) for tensor in component.tensors)
        for tensor in component.tensors:
            renamed = "" if tensor.name == tensor.key else f"{tensor.name} "
            dtype = str(tensor.dtype).removeprefix("mlx.core.")
            before = f"{tensor.key:<{width}} {tensor.info.dtype} {tensor.info.shape}"
            if tensor.quantization is not None:
                dtype = f"{tensor.quantization.mode} {tensor.quantization.bits} bits"
            permutation = f" {tensor.permutation}" if tensor.permutation else ""
            yield f"  {before} -> {renamed}{dtype} {tensor.shape}{permutation}"
        for key in component.dropped:
            yield f"  {key:<{width}} -> not needed"
        yield f"  {len(component.tensors)} tensors, {component.nbytes / 1e9:.2f} GB"
    yield from plan.notes
    yield f"{plan.nbytes / 1e9:.2f} GB to write"
    held, verifying = (n / 1e9 for n in (plan.working_bytes, plan.verifying_bytes))
    yield f"in memory at once about {held:.2f} GB of weights, {verifying:.2f} GB with --verify"
