"""Find the tokenizer, which original files lack."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx_unet3d
from mlx_unet3d.checkpoints import find_folder
from mlx_unet3d.checkpoints.config import blame
from mlx_unet3d.checkpoints.hub import Hub
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.tokenizer_files import FILES, read_tokenizer

from .kinds.pipeline import TOKENIZERS
from .pipelines import lists
from .plan import CheckpointPlan


class _Component(Protocol):
    name: str
    config: dict[str, Any]


def find_tokenizer(
    path_or_id: str | Path, name: str, components: Iterable[_Component], hub: Hub
) -> mlx_unet3d.CLIPTokenizer:
    """The tokenizer of a folder or hub id, in its folder `name` or `tokenizer` where it has that.

    Raises FileNotFoundError as `find_folder`, and CheckpointError for a tokenizer that is damaged or has more
    tokens than its text encoder among `components`.
    """
    where = replace(hub, revision=None)  # which is the source's
    folder = None
    for subfolder in dict.fromkeys((name, "tokenizer")):
        try:
            folder = find_folder(path_or_id, subfolder=subfolder, files=FILES, hub=where)
            break
        except FileNotFoundError:
            pass
    if folder is None:
        folder = find_folder(path_or_id, files=FILES, hub=where)
    with blame(folder):
        tokenizer = mlx_unet3d.CLIPTokenizer(**read_tokenizer(folder))
    encoder = name.replace("tokenizer", "text_encoder")
    for component in components:
        known = component.config.get("vocab_size") if component.name == encoder else None
        if known is not None and len(tokenizer) > known:
            raise CheckpointError(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens, the text encoder {known}; pass the "
                "tokenizer of this text encoder"
            )
    return tokenizer


def padded_as_trained(
    name: str, tokenizer: mlx_unet3d.CLIPTokenizer, with_zero: bool
) -> tuple[mlx_unet3d.CLIPTokenizer, list[str]]:
    """The tokenizer, padding as the UNet has seen it, and what to say of it.

    OpenCLIP pads with id 0, OpenAI's CLIP with the end of a text.
    """
    if not with_zero:
        pad = tokenizer.special_tokens["eos_token"]
    else:
        pad = next((token for token, token_id in tokenizer.vocab.items() if token_id == 0), None)
        if pad is None:
            raise CheckpointError("the tokenizer has no token of id 0, with which OpenCLIP pads; pass CLIP's")
    was = tokenizer.special_tokens["pad_token"]
    if tokenizer.pad_token_id == (0 if with_zero else tokenizer.eos_token_id):
        return tokenizer, []
    padded = mlx_unet3d.CLIPTokenizer(
        tokenizer.vocab,
        tokenizer.merges,
        special_tokens={**tokenizer.special_tokens, "pad_token": pad},
        model_max_length=tokenizer.model_max_length,
    )
    said = (
        f"{name}: pads with {pad!r}, id {padded.pad_token_id}, as the model was trained, instead of {was!r}"
    )
    return padded, [said]


def with_tokenizer(plan: CheckpointPlan, tokenizer: str | Path | None) -> CheckpointPlan:
    """Return the plan with another tokenizer, if one was given."""
    if tokenizer is None:
        return plan
    names = [] if plan.index is None else [name for name in TOKENIZERS if lists(plan.index, name)]
    if not names:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} is for pipelines; {plan.source} has none to replace: leave it out"
        )
    found = {name: find_tokenizer(tokenizer, name, plan.components, plan.hub) for name in names}
    return replace(plan, tokenizers=found)
