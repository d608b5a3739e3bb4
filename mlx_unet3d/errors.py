"""The errors of this package that are more than a ValueError, TypeError or OSError, and text for messages."""


def printable(text: str) -> str:
    """Text as a message may show it: line ends, control characters, lone surrogates and marks that change the
    direction of writing are escaped, for names of a file could otherwise move the cursor of a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """`printable` for a message of several lines, which keeps its line ends."""
    return "\n".join(map(printable, text.split("\n")))


class CheckpointError(ValueError):
    """A file or folder is not what it should be: what, which value, which rule, the cure.

    Its message is `printable`, whatever names of the file are in it.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable_lines(message))


class NonFiniteError(ArithmeticError):
    """Infinities or NaNs appeared in the latents or frames; says at which step, and what helps."""
