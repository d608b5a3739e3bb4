"""Latents on disk: a safetensors file with the settings that made them, to decode or finish later."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .atomic import whole_file
from .checkpoints import load_tensors, read_header, write_safetensors
from .errors import CheckpointError


def save_latents(
    path: str | Path,
    latents: mx.array,
    settings: Mapping[str, Any],
    predictions: Sequence[mx.array] = (),
) -> None:
    """Write latents (B, C, F, h, w) and a flat mapping of settings, in one piece or not at all.

    `predictions` are those of the steps done, where the run is not finished.
    """
    metadata = {"format": "mlx", "settings": json.dumps(dict(settings))}
    tensors = {"latents": latents}
    if predictions:
        tensors["predictions"] = mx.stack(list(predictions))
    with whole_file(Path(path)) as partial:
        write_safetensors(partial, tensors, metadata)


def load_latents(path: str | Path) -> tuple[mx.array, dict[str, Any], list[mx.array]]:
    """Latents (B, C, F, h, w), settings and predictions of a file that `save_latents` wrote.

    Raises FileNotFoundError, and CheckpointError for any other file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file that `mlx-unet3d generate` left")
    header = read_header(path)
    if set(header.tensors) - {"predictions"} != {"latents"} or "settings" not in header.metadata:
        raise CheckpointError(f"{path} does not hold latents; give a file that `mlx-unet3d generate` left")
    shape = header.tensors["latents"].shape
    if len(shape) != 5 or 0 in shape:
        raise CheckpointError(
            f"{path}: latents has shape {shape}, not (batch, channels, frames, height, width)"
        )
    if "predictions" in header.tensors and header.tensors["predictions"].shape[1:] != shape:
        raise CheckpointError(f"{path}: its predictions are not of the shape of its latents, {shape}")
    tensors = load_tensors(path)
    mx.eval(tensors)
    settings = json.loads(header.metadata["settings"])
    return tensors["latents"], settings, list(tensors.get("predictions", ()))
