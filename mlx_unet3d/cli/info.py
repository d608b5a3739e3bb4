"""mlx-unet3d info: describe a checkpoint and the parts of it that would be used."""

import argparse
from pathlib import Path

from ..checkpoints import DEMO, describe, find_folder
from ..errors import printable


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="say what a checkpoint is",
        description="Read the configs and the headers of the weight files of a pipeline or a component, or "
        "tell by its tensors what a single file holds.",
        usage="PATH [OPTIONS]",
        examples=(
            "mlx-unet3d info ms-1.7b",
            "mlx-unet3d info mm_sd_v15_v2.ckpt",
        ),
    )
    parser.add_argument(
        "path", metavar="PATH", help="folder of a pipeline or of a component, a file, or demo"
    )
    parser.add_argument("--variant", help="weight files to look at, such as fp16")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    folder = find_folder(args.path) if args.path == DEMO else Path(args.path).expanduser()
    if folder.is_file():
        # Only single files need the converter.
        from mlx_unet3d_convert.recognition import recognize

        for network in recognize(folder):
            print(printable(network.line()))
        return 0
    for line in describe(folder, variant=args.variant):
        print(printable(line))
    return 0
