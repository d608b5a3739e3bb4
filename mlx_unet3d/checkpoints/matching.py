"""Holding a checkpoint against the parameters of a model, before any data is read."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, printable
from .headers import MLX_DTYPES, Header, TensorInfo
from .layouts import file_shapes
from .prefixes import unwrapped

_SHOWN = 8
# Finding the nearest name takes the product of the numbers and of the lengths; real ones stay far below.
_COMPARED, _LONGEST, _NEAREST = 5000, 200, 100


@dataclass(frozen=True)
class Expected:
    """A parameter of the model: shape, dtype, layout (see `layouts`), and whether files may lack it."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    layout: str
    optional: bool = False


def file_format(headers: Mapping[Path, Header]) -> str:
    """The tensor layout of the files, "mlx" or "diffusers", by their metadata.

    Raises:
        CheckpointError: files of both layouts, or of a framework that lays tensors out in a third
            way.
    """
    formats = {}
    for path, header in headers.items():
        named = header.metadata.get("format", "pt")
        if named not in ("mlx", "pt"):
            raise CheckpointError(
                f"{path} is in the layout of {named[:80]!r} by its metadata; this package reads the "
                "layouts of torch ('pt') and MLX ('mlx'): save the weights from torch"
            )
        formats["mlx" if named == "mlx" else "diffusers"] = path
    if len(formats) > 1:
        mixed = " and ".join(f"{path.name} ({name})" for name, path in sorted(formats.items()))
        raise CheckpointError(
            f"shards of two layouts stand side by side: {mixed}; download or convert them again"
        )
    return next(iter(formats))


def majority_dtype(headers: Mapping[Path, Header]) -> tuple[mx.Dtype | None, dict[str, int]]:
    """The floating dtype with the most bytes (float32 for F64, which MLX lacks), and the bytes of each by
    its name in the header."""
    nbytes: dict[str, int] = {}
    for header in headers.values():
        for info in header.tensors.values():
            if _is_floating(info.dtype):
                nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
    most = max(nbytes, key=nbytes.__getitem__, default=None)
    return (None if most is None else MLX_DTYPES.get(most, mx.float32)), nbytes


class MismatchError(CheckpointError):
    """A checkpoint does not fit the parameters of a model; the message shows a few of what is wrong.

    Attributes:
        missing: parameters that no tensor is for.
        unexpected: tensors that no parameter is for.
        wrong: tensors of the wrong shape or kind, and why.
        headline, advice: the first and the last line.
    """

    def __init__(
        self, headline: str, missing: list[str], unexpected: list[str], wrong: list[str], advice: str
    ) -> None:
        self.headline, self.advice = headline, advice
        self.missing, self.unexpected, self.wrong = missing, unexpected, wrong
        super().__init__("\n".join(self.lines(_SHOWN)))

    def lines(self, shown: int) -> list[str]:
        """List the mismatches, at most `shown` of each kind, with the nearest of the other side."""
        return [
            self.headline,
            *_listing("missing", self.missing, self.unexpected, shown),
            *_listing("unexpected", self.unexpected, self.missing, shown),
            *_listing("do not fit", self.wrong, [], shown),
            self.advice,
        ]


def match(
    what: str,
    expected: Mapping[str, Expected],
    headers: Mapping[Path, Header],
    layout: str,
    rename: Callable[[str, Collection[str]], str | None],
) -> dict[str, str]:
    """Parameter name of each key of the files, without the keys that `rename` drops (None).

    Prefixes of wrappers and pipelines are removed from keys first, see `prefixes`.

    Args:
        what: the checkpoint and the model, for the message.
        expected: the parameters of the model.
        headers: the checked headers by file.
        layout: "mlx" or "diffusers", see `file_format`.
        rename: parameter name of a key, given all the keys, as they are without that.

    Raises:
        MismatchError: keys are missing, unexpected, or of the wrong shape or kind.
        CheckpointError: two keys are the same parameter.
    """
    infos = {key: info for header in headers.values() for key, info in header.tensors.items()}
    bare = {key: unwrapped(key)[1] for key in infos}
    keys = frozenset(bare.values())
    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    for key in sorted(infos):
        name = rename(bare[key], keys)
        if name is None:
            continue
        if name in sources:
            raise CheckpointError(
                f"{what}: {sources[name][:_LONGEST]!r} and {key[:_LONGEST]!r} are both the parameter "
                f"{name[:_LONGEST]!r}; remove one"
            )
        names[key], sources[name] = name, key

    missing = sorted(name for name in expected.keys() - sources.keys() if not expected[name].optional)
    unexpected = sorted(key for key, name in names.items() if name not in expected)
    wrong, other_layout = [], 0
    for name in sorted(expected.keys() & sources.keys()):
        info, want = infos[sources[name]], expected[name]
        reason = _misfit(info, want, layout)
        if reason is not None:
            wrong.append(f"{sources[name]} {reason}")
            other = "mlx" if layout == "diffusers" else "diffusers"
            other_layout += _misfit(info, want, other) is None
    if not (missing or unexpected or wrong):
        return names

    counts = [
        f"{len(found)} {kind}"
        for found, kind in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (wrong, "that do not fit"),
        )
        if found
    ]
    if wrong and other_layout == len(wrong):
        said, other = ("mlx", "diffusers") if layout == "mlx" else ("diffusers", "mlx")
        advice = (
            f"All of these would fit in the {other} layout, while the file's metadata says {said}: "
            "correct its 'format' ('mlx' or 'pt') or convert it again."
        )
    else:
        advice = "Check that config.json and the weights belong together and to this class."
    headline = f"{what}: of {len(expected)} parameters and {len(infos)} tensors, {', '.join(counts)}"
    raise MismatchError(headline, missing, unexpected, wrong, advice)


def _misfit(info: TensorInfo, want: Expected, layout: str) -> str | None:
    """Why a tensor cannot be the parameter; None where it can."""
    shapes = file_shapes(want.layout, want.shape) if layout == "diffusers" else [want.shape]
    if info.shape not in shapes:
        return f"is {info.shape}, must be {shapes[0]}"
    floating = mx.issubdtype(want.dtype, mx.floating)
    if _is_floating(info.dtype) != floating:
        return f"has dtype {info.dtype}, must be {'floating' if floating else want.dtype}"
    return None


def _is_floating(name: str) -> bool:
    return name == "F64" or (name in MLX_DTYPES and mx.issubdtype(MLX_DTYPES[name], mx.floating))


def _listing(title: str, items: list[str], candidates: list[str], shown: int) -> list[str]:
    if not items:
        return []
    lines = [f"{title} ({len(items)}):"]
    candidates = [name for name in candidates[:_COMPARED] if len(name) <= _LONGEST]
    for i, item in enumerate(name[:_LONGEST] for name in items[:shown]):
        near = difflib.get_close_matches(item, candidates, n=1) if i < _NEAREST else []
        lines.append(f"  {printable(item)}" + (f"  (nearest: {printable(near[0])})" if near else ""))
    if len(items) > shown:
        lines.append(f"  ... and {len(items) - shown} more")
    return lines
