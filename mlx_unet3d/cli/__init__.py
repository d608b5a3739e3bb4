"""The `mlx-unet3d` command: one module a sub-command; they parse, call the library, and print."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import NonFiniteError
from . import bench, convert, decode, doctor, generate, info, plan

_COMMANDS = (generate, plan, decode, convert, info, doctor, bench)

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="mlx-unet3d",
        description="Text-to-video diffusion with 3D UNets in MLX.",
        epilog="Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-unet3d {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the program an error came from"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    warnings.showwarning = _show_warning
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, TypeError, OSError, NonFiniteError, RuntimeError, MemoryError) as error:
        if args.traceback:
            traceback.print_exc()
        else:
            print(f"mlx-unet3d: error: {error}", file=sys.stderr)
        bad_input = isinstance(error, ValueError | TypeError | OSError)
        return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"mlx-unet3d: warning: {message}", file=sys.stderr)
