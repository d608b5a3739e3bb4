"""Find the tokenizer, which original files lack."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx_unet3d
from mlx_unet3d.checkpoints import find_folder
from mlx_unet3d.checkpoints.config import naming
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.tokenizer_files import FILES, read_tokenizer

from .plan import CheckpointPlan


class _Component(Protocol):
    name: str
    config: dict[str, Any]


def find_tokenizer(
    path_or_id: str | Path, components: Iterable[_Component], hub: dict[str, Any]
) -> mlx_unet3d.CLIPTokenizer:
    """Find the tokenizer of a folder or hub id, in its folder `tokenizer` if it has one.

    Raises FileNotFoundError as `find_folder`, and CheckpointError for a tokenizer that is damaged or has more
    tokens than the text encoder in `components`.
    """
    where = {key: value for key, value in hub.items() if key != "revision"}  # the source's
    try:
        folder = find_folder(path_or_id, subfolder="tokenizer", files=FILES, **where)
    except FileNotFoundError:
        folder = find_folder(path_or_id, files=FILES, **where)
    with naming(folder):
        tokenizer = mlx_unet3d.CLIPTokenizer(**read_tokenizer(folder))
    for component in components:
        known = component.config.get("vocab_size")
        if known is not None and len(tokenizer) > known:
            raise CheckpointError(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens, the text encoder {known}; pass the "
                "tokenizer of this text encoder"
            )
    return tokenizer


def padded_as_trained(tokenizer: mlx_unet3d.CLIPTokenizer) -> tuple[mlx_unet3d.CLIPTokenizer, list[str]]:
    """Return the tokenizer padding with id 0, as OpenCLIP did in the UNet's training, and a note about it."""
    if tokenizer.pad_token_id == 0:
        return tokenizer, []
    first = next((token for token, token_id in tokenizer.vocab.items() if token_id == 0), None)
    if first is None:
        raise CheckpointError("the tokenizer has no token of id 0, with which OpenCLIP pads; pass CLIP's")
    padded = mlx_unet3d.CLIPTokenizer(
        tokenizer.vocab,
        tokenizer.merges,
        special_tokens={**tokenizer.special_tokens, "pad_token": first},
        model_max_length=tokenizer.model_max_length,
    )
    was = tokenizer.special_tokens["pad_token"]
    return padded, [f"tokenizer: pads with {first!r}, id 0, as the model was trained, instead of {was!r}"]


def with_tokenizer(plan: CheckpointPlan, tokenizer: str | Path | None) -> CheckpointPlan:
    """Return the plan with another tokenizer, if one was given."""
    if tokenizer is None:
        return plan
    if plan.index is None or "tokenizer" not in plan.index:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} is for pipelines; {plan.source} has none to replace: leave it out"
        )
    return replace(plan, tokenizer=find_tokenizer(tokenizer, plan.components, plan.hub))
