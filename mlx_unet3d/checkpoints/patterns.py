"""Regular expressions of PEFT's settings, which come from files of strangers."""

import re
from collections.abc import Iterable

# The time of a match is a power of the length of a path, to the number of its repeats and alternatives.
_MOST_REPEATS, _MOST_ALTERNATIVES, _LONGEST = 4, 3, 1000
_PLAIN = re.compile(r"[\w.-]*")
_ESCAPES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """The first of the patterns that is the path of a layer, or its end from a "." on; None where none is.

    Source: `get_pattern_key` of PEFT. Raises ValueError for what is no regular expression, or one whose match
    could take forever.
    """
    for pattern in patterns:
        check_pattern(pattern)
        if re.match(rf"(.*\.)?({pattern})$", path):
            return pattern
    return None


def check_pattern(pattern: str) -> None:
    """ValueError for what is no regular expression, or one whose match could take forever."""
    if _PLAIN.fullmatch(pattern) and len(pattern) <= _LONGEST:
        return
    if len(pattern) > _LONGEST:
        raise ValueError(f"{pattern[:80]!r}... is longer than {_LONGEST} characters; name the layers in full")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:200]!r} is no regular expression ({error}); correct it") from error
    plain = _ESCAPES.sub("x", pattern).replace("(?", "(")
    repeats = len(re.findall(r"[*+?{]", plain))
    alternatives, open_groups = 0, [0]
    for letter in plain:
        if letter == "(":
            open_groups.append(0)
        elif letter == ")":
            alternatives += open_groups.pop()
        elif letter == "|":
            open_groups[-1] = 1
    alternatives += sum(open_groups)
    if repeats > _MOST_REPEATS or alternatives > _MOST_ALTERNATIVES or re.search(r"\)[*+?{]", plain):
        raise ValueError(
            f"{pattern[:200]!r} could take forever to match: it has a repeated group, more than "
            f"{_MOST_REPEATS} repeats or {_MOST_ALTERNATIVES} groups of alternatives; name the layers in full"
        )
