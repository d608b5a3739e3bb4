"""Latents on disk: a safetensors file with the settings that made them, to decode or finish later."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .atomic import whole_file
from .checkpoints import load_tensors, read_header, write_safetensors
from .checkpoints.headers import MLX_DTYPES
from .errors import CheckpointError
from .inputs import parse_json

MAX_BYTES = 2**30
"""Of the latents and predictions of a run: 50 steps of 64 frames of 1024x576 take half of that."""
_MAX_STEPS = 1000
LATENTS, PREDICTIONS = "latents", "predictions"
"""The tensors of a file."""


@dataclass(frozen=True)
class SavedLatents:
    """A file of latents, checked, of which no tensor has been read.

    Attributes:
        path: of the file.
        shape: of the latents, (B, C, F, h, w).
        steps: for how many steps there are predictions; 0 where the run is finished.
        settings: those that made them, as the file has them: unchecked values by name.
    """

    path: Path
    shape: tuple[int, ...]
    steps: int
    settings: dict[str, Any]

    def read(self) -> tuple[mx.array, list[mx.array]]:
        """The latents, and the predictions of the steps; CheckpointError where numbers are not finite."""
        tensors = load_tensors(self.path)
        mx.eval(tensors)
        for name, tensor in tensors.items():
            if not math.isfinite(mx.abs(tensor.astype(mx.float32)).max().item()):
                raise CheckpointError(f"{self.path}: its {name} are not finite; make the video again")
        return tensors[LATENTS], list(tensors.get(PREDICTIONS, ()))


def save_latents(
    path: str | Path,
    latents: mx.array,
    settings: Mapping[str, Any],
    predictions: Sequence[mx.array] = (),
) -> None:
    """Write latents (B, C, F, h, w) and a flat mapping of settings, in one piece or not at all.

    `predictions` are those of the steps done, where the run is not finished. The settings name files of this
    machine, so the owner of the file alone may read it.
    """
    metadata = {"format": "mlx", "settings": json.dumps(dict(settings))}
    tensors = {LATENTS: latents}
    if predictions:
        tensors[PREDICTIONS] = mx.stack(list(predictions))
    with whole_file(Path(path), private=True) as partial:
        write_safetensors(partial, tensors, metadata)


def open_latents(path: str | Path) -> SavedLatents:
    """Check a file that `save_latents` wrote, without its tensors.

    Raises FileNotFoundError, and CheckpointError for any other file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a file that `mlx-unet3d generate` left")
    header = read_header(path)
    if set(header.tensors) - {PREDICTIONS} != {LATENTS} or "settings" not in header.metadata:
        raise CheckpointError(f"{path} does not hold latents; give a file that `mlx-unet3d generate` left")
    shape = header.tensors[LATENTS].shape
    if len(shape) != 5 or 0 in shape:
        raise CheckpointError(
            f"{path}: latents has shape {shape}, not (batch, channels, frames, height, width)"
        )
    steps = 0
    if PREDICTIONS in header.tensors:
        all_steps = header.tensors[PREDICTIONS].shape
        if all_steps[1:] != shape or not 0 < all_steps[0] <= _MAX_STEPS:
            raise CheckpointError(
                f"{path}: its predictions {all_steps} are not those of 1 to {_MAX_STEPS} steps of latents of "
                f"shape {shape}; give a file that `mlx-unet3d generate` left"
            )
        steps = all_steps[0]
    for name, info in header.tensors.items():
        if info.dtype not in MLX_DTYPES or not mx.issubdtype(MLX_DTYPES[info.dtype], mx.floating):
            raise CheckpointError(f"{path}: its {name} are {info.dtype}; they must be F32, F16 or BF16")
    nbytes = sum(info.nbytes for info in header.tensors.values())
    if nbytes > MAX_BYTES:
        raise CheckpointError(
            f"{path} holds {nbytes / 1e9:.1f} GB of latents; a run keeps at most {MAX_BYTES / 1e9:.1f} GB"
        )
    try:
        settings = parse_json(header.metadata["settings"])
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its settings are no JSON ({error}); give a file that `mlx-unet3d generate` left"
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: its settings are a {type(settings).__name__} where an object is expected; give a file "
            "that `mlx-unet3d generate` left"
        )
    return SavedLatents(path, shape, steps, settings)


def load_latents(path: str | Path) -> tuple[mx.array, dict[str, Any], list[mx.array]]:
    """Latents (B, C, F, h, w), settings and predictions of a file that `save_latents` wrote.

    Raises FileNotFoundError, and CheckpointError for any other file.
    """
    saved = open_latents(path)
    latents, predictions = saved.read()
    return latents, saved.settings, predictions
