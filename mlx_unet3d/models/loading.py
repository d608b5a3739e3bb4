"""Loading: find the checkpoint of a network, hold it against the parameters, read these.

A network may be put together from several checkpoints.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.config import read_json
from ..checkpoints.headers import Header, check_dtypes, load_tensors, read_header
from ..checkpoints.hub import Hub, takes_hub
from ..checkpoints.layouts import parameter_layouts, to_mlx
from ..checkpoints.matching import Expected, file_format, majority_dtype, match
from ..checkpoints.source import find_file, find_folder
from ..checkpoints.weight_files import weight_files


@dataclass(frozen=True)
class Checkpoint:
    """The files of one network.

    Attributes:
        where: its folder or file, for messages.
        config: the content of its `config.json`; empty for a lone file.
        headers: the checked headers of its weight files.
        layout: "mlx" or "diffusers".
    """

    where: Path
    config: dict[str, Any]
    headers: dict[Path, Header]
    layout: str

    @property
    def keys(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(key for header in self.headers.values() for key in header.tensors)


@takes_hub
def find_checkpoint(
    path_or_id: str | Path,
    stem: str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    files: bool = False,
    hub: Hub,
) -> Checkpoint:
    """Find the weight files of a network and read their headers.

    Args:
        path_or_id: folder, or hub id `owner/name`; with `files`, OWNER/NAME[/FOLDER]/FILE on the hub as well.
        stem: of the names of its weight files.
        subfolder: the folder of the network inside it, such as "unet".
        variant: weight files such as "fp16", see `weight_files`; None takes the plain ones.
        files: take a lone safetensors file as well, which has no config.
        revision, local_files_only, token, cache_dir, hub: see `Hub`.

    Raises FileNotFoundError, PermissionError, ConnectionError, see `find_folder` and `weight_files`;
    CheckpointError where files are damaged.
    """
    file = find_file(path_or_id, hub=hub) if files and subfolder is None else None
    if file is not None:
        folder, config, paths = file, {}, [file]
    else:
        folder = find_folder(path_or_id, subfolder=subfolder, variant=variant, stem=stem, hub=hub)
        config = read_json(folder / "config.json")
        paths = weight_files(folder, stem, variant)
    headers = {path: read_header(path) for path in paths}
    for path, header in headers.items():
        check_dtypes(path, header)
    return Checkpoint(folder, config, headers, file_format(headers))


@dataclass(frozen=True)
class Source:
    """A checkpoint and its part in a network.

    Attributes:
        checkpoint: the files.
        expected: the parameters that it is for; None for all.
        rename: the parameter of a key, see `PretrainedModel.rename_key`; None for that of the network.
    """

    checkpoint: Checkpoint
    expected: Mapping[str, Expected] | None = None
    rename: Callable[[str, Collection[str]], str | None] | None = None


def matched(model: Any, source: Source) -> dict[str, str]:
    """Find the parameter of each needed tensor of a source; CheckpointError where it does not fit."""
    checkpoint = source.checkpoint
    return match(
        f"{checkpoint.where} does not fit {type(model).__name__}",
        model.expected_tensors() if source.expected is None else source.expected,
        checkpoint.headers,
        checkpoint.layout,
        source.rename or model.rename_key,
    )


def read_parameters(
    model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], dtype: mx.Dtype | None
) -> Iterator[tuple[str, mx.array]]:
    """Read names and arrays of parameters, a tensor at a time; floating ones in `dtype`, None as they are."""
    layouts = parameter_layouts(model) if checkpoint.layout == "diffusers" else {}
    for path in checkpoint.headers:
        tensors = load_tensors(path)
        for key in list(tensors):
            # Out of the dict, so that the array as read is freed once it is cast and transposed.
            array = tensors.pop(key)
            if key not in names:
                continue
            if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(dtype)
            array = to_mlx(layouts.get(names[key], "identity"), array)
            mx.eval(array)
            yield names[key], array


def common_dtype(folder: Path, headers: Mapping[Path, Header]) -> mx.Dtype | None:
    """Return the floating dtype of most bytes, with a warning where there are others; None for none."""
    dtype, nbytes = majority_dtype(headers)
    if len(nbytes) > 1:
        sizes = ", ".join(f"{count} bytes of {name}" for name, count in sorted(nbytes.items()))
        warnings.warn(
            f"{folder} mixes floating dtypes ({sizes}); loading all as {dtype}, pass dtype= to choose",
            stacklevel=6,
        )
    return dtype
