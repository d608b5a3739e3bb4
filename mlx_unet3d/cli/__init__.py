"""The `mlx-unet3d` command: one module a sub-command; they parse, call the library, and print."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence

from ..backend import missing_backend
from ..errors import NonFiniteError, printable_lines
from ..version import __version__

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Terminated(KeyboardInterrupt):
    """The process was asked to stop by SIGTERM, or the terminal closed."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    # Not at the top: without a backend, importing MLX fails, and the command must say so in one line.
    from . import bench, compare, completion, config, convert, decode, doctor, generate, info, plan
    from .parser import Parser

    parser = Parser(
        prog="mlx-unet3d",
        usage="COMMAND [OPTIONS]",
        description="Video diffusion with 3D UNets in MLX.",
        examples=(
            'mlx-unet3d generate "a red circle moving left"',
            "mlx-unet3d generate --image photo.jpg --model stabilityai/stable-video-diffusion-img2vid-xt",
            "mlx-unet3d generate --help",
        ),
        epilog="Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted, 128 + n ended by signal n.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-unet3d {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the program an error came from"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="mlx-unet3d")
    for command in (generate, plan, decode, compare, convert, info, doctor, bench, config, completion):
        command.add_parser(commands)
    parser.set_defaults(root=parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    if (problem := missing_backend()) is not None:
        print(f"mlx-unet3d: error: {problem}", file=sys.stderr)
        return EXIT_FAILED
    from . import options

    args = build_parser().parse_args(argv)
    options.loudness.set(getattr(args, "loudness", options.NORMAL))
    warnings.showwarning = _show_warning
    try:
        with _signals_as_errors():
            return args.run(args)
    except Terminated as error:
        number = signal.Signals(error.args[0])
        print(f"ended by {number.name}", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, TypeError, OSError, NonFiniteError, RuntimeError, MemoryError) as error:
        if args.traceback:
            traceback.print_exc()
        else:
            print(f"mlx-unet3d: error: {printable_lines(str(error))}", file=sys.stderr)
        bad_input = isinstance(error, ValueError | TypeError | OSError)
        return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


@contextlib.contextmanager
def _signals_as_errors() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work like Ctrl-C, so that finished work is saved.

    Only the first signal counts, so that it does not interrupt the saving; ignored signals, as under nohup,
    stay ignored.
    """

    def end(number: int, _frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows does not have the second
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"mlx-unet3d: warning: {printable_lines(str(message))}", file=sys.stderr)
