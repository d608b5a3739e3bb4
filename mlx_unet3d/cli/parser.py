"""The parser of the command: examples in every help, and errors of two lines that name the nearest word."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser of the command or of a sub-command.

    Args:
        usage: what follows the name of the command, in one line.
        examples: command lines to show below the help.
        kwargs: as `argparse.ArgumentParser` takes them.
    """

    def __init__(self, *, prog: str, usage: str, examples: Sequence[str] = (), **kwargs: Any):
        super().__init__(prog=prog, usage=f"{prog} {usage}", **kwargs)
        self._examples = tuple(examples)
        self.set_defaults(parser=self)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse a command line; its sub-command reports the words that nothing takes."""
        found, strange = self.parse_known_args(args, namespace)
        if strange:
            found.parser.error(f"unrecognized arguments: {' '.join(strange)}")
        return found

    def format_help(self) -> str:
        """Return the help, with the examples at its end."""
        examples = "".join(f"\n  {line}" for line in self._examples)
        return super().format_help() + (f"\nexamples:{examples}\n" if examples else "")

    def error(self, message: str) -> NoReturn:
        """Print an error with its cure, and the usage in one line; exit with 2."""
        cure = self._cure(message)
        message = message.removeprefix("argument ")
        self.exit(
            2,
            f"{self.prog}: error: {message}{'; ' + cure if cure else ''}\n"
            f"{self.format_usage().strip()}; --help explains\n",
        )

    def _cure(self, message: str) -> str:
        """Return the nearest words that the parser knows, or what else mends the command line."""
        if strange := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            words = strange[1].split()
            options = re.findall(r"--[a-z][a-z0-9-]*", super().format_help())
            for word in words:
                if word.startswith("-"):
                    nearest = difflib.get_close_matches(word.partition("=")[0], options, 1, 0.5)
                    return f"did you mean {nearest[0]}?" if nearest else "leave it out"
            return "put text of several words in quotes"
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL):
            nearest = difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), 1, 0.5)
            return f"did you mean {nearest[0]}?" if nearest else ""
        if re.search(r"expected (one|at least one) argument", message):
            return "write a value after it"
        return ""
