"""mlx-unet3d config: what holds for all runs, in a file of the user; and the variables of the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import write_text
from ..errors import printable
from . import options

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

FORMATS = ("gif", "webp", "png", "mp4", "mov")


def folder(text: str) -> str:
    """Parse an existing folder to its absolute path."""
    found = Path(options.path(text)).expanduser().absolute()
    if not found.is_dir():
        raise argparse.ArgumentTypeError(f"{found} is no folder; make it first")
    return str(found)


def model(text: str) -> str:
    """Parse a model; that of a local folder to its absolute path, as runs start in any folder."""
    found = Path(options.path(text)).expanduser()
    return str(found.absolute()) if found.is_dir() else text


@dataclass(frozen=True)
class Preference:
    """One preference: its default, the rule for its text, and what it is for."""

    default: str
    parse: Callable[[str], str]
    purpose: str

    def read(self, value: object, source: str) -> str:
        """Return a value after its rule; ValueError that names its source."""
        try:
            if not isinstance(value, str):
                raise ValueError("it must be text in quotes")
            return self.parse(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{source} is {printable(repr(value)[:80])}: {error}") from error


PREFERENCES = {
    "model": Preference("demo", model, "the model of generate, plan and bench without --model"),
    "folder": Preference(".", folder, "the folder for videos without -o"),
    "format": Preference("gif", options.one_of(*FORMATS), f"their format: {', '.join(FORMATS)}"),
}


def config_path() -> Path:
    """Return the file: $MLX_UNET3D_CONFIG, or mlx-unet3d/config.toml in $XDG_CONFIG_HOME or ~/.config."""
    if own := os.environ.get("MLX_UNET3D_CONFIG"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "mlx-unet3d" / "config.toml"


def variable(name: str) -> str:
    """Return the variable of the environment that goes before the file."""
    return f"MLX_UNET3D_{name.upper()}"


def preference(name: str) -> tuple[str, str | None]:
    """Return a preference, and the name of the variable or file that gives it; None for the default.

    Raises ValueError for a value against its rule, and for a file that is no TOML.
    """
    own = PREFERENCES[name]
    if given := os.environ.get(variable(name)):
        return own.read(given, variable(name)), variable(name)
    path = config_path()
    values = _read(path).unwrap() if path.exists() else {}
    if name in values:
        return own.read(values[name], f"{name} in {path}"), str(path)
    return own.default, None


def _read(path: Path) -> TOMLDocument:
    """Return the document of the file, empty where it is missing; ValueError where it is no TOML."""
    import tomlkit  # not at the top: most runs have no file
    from tomlkit.exceptions import TOMLKitError

    if not path.exists():
        return tomlkit.document()
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8"))
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}; mend or delete it") from error
    strange = [key for key in document if key not in PREFERENCES]
    if strange:
        raise ValueError(
            f"{path} sets {', '.join(map(printable, strange))}; it can set {', '.join(PREFERENCES)}"
        )
    return document


def add_parser(commands: argparse._SubParsersAction) -> None:
    lines = [f"{name}: {own.purpose} (default: {own.default})" for name, own in PREFERENCES.items()]
    parser = commands.add_parser(
        "config",
        help="show or set what holds for all runs",
        usage="[NAME [VALUE]] [OPTIONS]",
        description=f"Show all preferences, one, or set one. {'; '.join(lines)}. An option of a command "
        "goes before a variable of the environment (MLX_UNET3D_MODEL, ...), and that before the file.",
        examples=(
            "mlx-unet3d config model damo-vilab/text-to-video-ms-1.7b",
            "mlx-unet3d config format mp4",
            "mlx-unet3d config --unset model",
        ),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", choices=list(PREFERENCES), help="a preference")
    parser.add_argument("value", nargs="?", metavar="VALUE", help="its new value")
    parser.add_argument("--unset", metavar="NAME", choices=list(PREFERENCES), help="go back to the default")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    path = config_path()
    if args.unset is not None:
        if args.name is not None:
            raise ValueError(f"--unset {args.unset} {args.name}: give one preference, without a value")
        document = _read(path)
        if args.unset in document:
            del document[args.unset]
            write_text(path, document.as_string())
    elif args.value is not None:
        value = PREFERENCES[args.name].read(args.value, args.name)
        document = _read(path)
        document[args.name] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, document.as_string())
    elif args.name is not None:
        print(printable(preference(args.name)[0]))
    else:
        for name in PREFERENCES:
            value, source = preference(name)
            print(f"{name + ':':<10}{printable(value)} ({printable(source) if source else 'the default'})")
        print(f"file:     {printable(str(path))}{'' if path.exists() else ' (not there)'}")
    return 0
