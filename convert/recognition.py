"""Identify the networks in a weight file by the names of its tensors, never by its own name."""

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_unet3d.checkpoints import Header, read_header, read_pickle
from mlx_unet3d.checkpoints.describe import label, parameters_line
from mlx_unet3d.checkpoints.matching import file_format
from mlx_unet3d.checkpoints.numbered_blocks import WITHIN
from mlx_unet3d.checkpoints.pickles import is_pickle
from mlx_unet3d.checkpoints.prefixes import without_wrappers
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.checkpoints.source import SUFFIXES
from mlx_unet3d.errors import CheckpointError

from .kinds import KINDS, Family, Kind
from .kinds.others import Other, other

# Finding the nearest kind compares all kinds of keys; real files have about a hundred, all short.
_COMPARED, _LONGEST = 500, 200


@dataclass(frozen=True)
class Recognized:
    """The network in a file.

    Attributes:
        path: the file.
        kind: of the network.
        family: of the file.
        prefix: the prefix of its keys.
        header: the parts of tensors that are parameters, by their titles, see `Part.of`.
        names: the parameter of each part.
        dropped: keys of the file that the network does not need.
        unused: the shapes of dropped keys that belong to this network.
        pickled: whether the file is a torch pickle.
    """

    path: Path
    kind: Kind
    family: Family
    prefix: str
    header: Header
    names: dict[str, str]
    dropped: list[str]
    unused: dict[str, tuple[int, ...]]
    pickled: bool

    @property
    def shapes(self) -> Shapes:
        """Return the shapes of all its tensors, with those that it does not need, under their own names."""
        shapes = {self.names[key]: info.shape for key, info in self.header.tensors.items()}
        return Shapes(str(self.path), self.unused | shapes, file_format({self.path: self.header}))

    def line(self) -> str:
        """Return a line about it: its name in a pipeline, its class, its size, and how it was identified."""
        found = parameters_line(self.header.tensors)
        return f"{label(self.kind.component)}{self.kind.name}, {found}, {self.reason}"

    @property
    def reason(self) -> str:
        """Return how it was identified, and how it is read."""
        kind = f"{self.family.title}, as it has {self.prefix}{self.family.signs[-1]}"
        return f"{kind}; a torch pickle, read without running it" if self.pickled else kind


def recognize(path: Path) -> list[Recognized]:
    """Read the header of a weight file and identify its networks, without reading tensors.

    In a file of several networks, such as a complete checkpoint of latent diffusion, each has its own prefix.
    From the checkpoint of an image model, whose UNet is not in `KINDS`, the other networks are returned.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds none of `KINDS`, one of them twice or several of which two take
            the same tensor, as they do without prefixes, or a fused tensor that does not come apart.
    """
    found = identify(path, *read_any(path))
    if isinstance(found, Other):
        raise CheckpointError(f"{path} holds {found.title}: {found.cure}")
    return found


def read_any(path: Path) -> tuple[Header, bool]:
    """Read the header of a weight file, and return whether it is a torch pickle."""
    pickled = is_pickle(path)
    return (read_pickle(path, lists=True) if pickled else read_header(path)), pickled


def identify(path: Path, header: Header, pickled: bool) -> list[Recognized] | Other:
    """Identify a file of a header: its networks, or what else it is.

    Args:
        path: of the file, for messages.
        header, pickled: see `read_any`.

    Raises CheckpointError as `recognize`.
    """
    bare = {without_wrappers(key): info for key, info in header.tensors.items()}
    if len(bare) == len(header.tensors):  # otherwise some would appear with a wrapper and without
        header = Header(bare, header.metadata)
    if (beside := other(header)) is not None:
        return beside
    found = list(_matches(header.tensors))
    if not found:
        raise CheckpointError(_unknown(path, header.tensors))
    kinds = {kind.component for kind, _, _ in found}
    claims = [key for _, family, prefix in found for key in _claimed(header.tensors, family, prefix)]
    if len(kinds) < len(found) or len(set(claims)) < len(claims):
        raise CheckpointError(
            f"{path} holds several networks at once: "
            f"{' and '.join(f'{family.title} ({prefix}{family.signs[-1]})' for _, family, prefix in found)}; "
            "a file may hold one of each kind, all with a prefix such as model.diffusion_model., "
            "first_stage_model. and cond_stage_model.model.; save each to a file of its own"
        )
    return [_recognized(path, header, *one, pickled) for one in found]


def _claimed(keys: Collection[str], family: Family, prefix: str) -> Iterator[str]:
    """The keys that a network of a family takes."""
    bare = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    key_map = family.key_map(bare)
    yield from (prefix + key for key in bare if key_map(key))


def _recognized(
    path: Path, header: Header, kind: Kind, family: Family, prefix: str, pickled: bool
) -> Recognized:
    """Return the parts of one network of the file."""
    keys = {key.removeprefix(prefix): key for key in header.tensors if key.startswith(prefix)}
    key_map = family.key_map(keys.keys())
    parts, names, unused = {}, {}, {}
    dropped = [key for key in header.tensors if not key.startswith(prefix)]
    for bare, key in keys.items():
        for part in (made := key_map(bare)):
            try:
                called, info = part.of(key, header.tensors[key])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
            parts[called], names[called] = info, part.name
        if not made:
            dropped.append(key)
            unused[bare] = header.tensors[key].shape
    return Recognized(
        path, kind, family, prefix, Header(parts, header.metadata), names, dropped, unused, pickled
    )


def is_image_model(networks: Collection[Recognized]) -> bool:
    """Return True if their file is a checkpoint of latent diffusion with a UNet of another kind."""
    unused = set.intersection(*(set(network.dropped) for network in networks))
    return any(key.startswith(WITHIN) for key in unused)


def weight_files_in(folder: Path) -> list[Path]:
    """Return the possible weight files directly in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _choices() -> Iterator[tuple[Kind, Family, str]]:
    """Return all candidates for a file or a part of it."""
    for kind in KINDS:
        for family in kind.families:
            for prefix in kind.usual_prefixes(family):
                yield kind, family, prefix


def _matches(keys: Collection[str]) -> Iterator[tuple[Kind, Family, str]]:
    for kind in KINDS:
        for family in kind.families:
            for prefix in kind.prefixes(family, keys):
                there = all(prefix + sign in keys for sign in family.signs)
                if there and not any(prefix + sign in keys for sign in family.without):
                    yield kind, family, prefix


def _unknown(path: Path, keys: Collection[str]) -> str:
    """Return the nearest kind of file, and the tensors that this file lacks."""
    # Only few of thousands, as layers repeat.
    kinds = dict.fromkeys(re.sub(r"\d+", "0", key) for key in keys if len(key) <= _LONGEST)
    kinds = list(kinds)[:_COMPARED]

    def nearness(choice: tuple[Family, str]) -> tuple[int, int]:
        family, prefix = choice
        inside = [kind.removeprefix(prefix) for kind in kinds if kind.startswith(prefix)]
        alike = sum(bool(difflib.get_close_matches(sign, inside, 1, 0.8)) for sign in family.signs)
        return sum(prefix + sign in keys for sign in family.signs), alike

    family, prefix = max(((family, prefix) for _, family, prefix in _choices()), key=nearness)
    lacking = ", ".join(prefix + sign for sign in family.signs if prefix + sign not in keys)
    shown = ", ".join(key[:_LONGEST] for key in list(keys)[:4])
    known = ", ".join(dict.fromkeys(family.title for kind in KINDS for family in kind.families))
    near = f"Nearest is {family.title}, for which it lacks {lacking}"
    if nearness((family, prefix)) == (0, 0):
        near = "It is near to none of them; give the file of one of these"
    return (
        f"{path} holds none of the networks that this converter knows by their tensors ({known}); it has "
        f"{len(keys)} tensors ({shown}{', ...' if len(keys) > 4 else ''}). {near}"
    )
