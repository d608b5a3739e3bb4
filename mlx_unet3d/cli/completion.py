"""mlx-unet3d completion: a script by which a shell completes commands, options and files."""

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        usage="SHELL",
        description="Print a script for a shell, to be saved where it looks for completions.",
        examples=(
            'mlx-unet3d completion zsh > "${fpath[1]}/_mlx-unet3d"',
            "mlx-unet3d completion bash > ~/.local/share/bash-completion/completions/mlx-unet3d",
        ),
    )
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(args.root, args.shell))
    return 0
