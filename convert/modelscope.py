"""What a pipeline needs and ModelScope's original files do not hold: index, scheduler and tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import mlx_unet3d
from mlx_unet3d.checkpoints import find_folder
from mlx_unet3d.checkpoints.config import naming
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import DIFFUSERS_VERSION
from mlx_unet3d.tokenizer_files import FILES, read_tokenizer

PUBLISHED_FILES = (
    "text2video_pytorch_model.pth",
    "open_clip_pytorch_model.bin",
    "VQGAN_autoencoder.pth",
    "README.md",
)
"""What to download of a repository on the hub that has no config; folders are read whatever the names."""

INDEX: dict[str, Any] = {
    "_class_name": "TextToVideoSDPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet3DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""The `model_index.json` of the model in diffusers' form."""


class _Component(Protocol):
    name: str
    config: dict[str, Any]


def scheduler_config() -> dict[str, Any]:
    """The `scheduler_config.json` of the model in diffusers' form: DDIM over 1,000 scaled-linear betas."""
    return mlx_unet3d.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    ).config.to_dict()


def find_tokenizer(
    path_or_id: str | Path, components: Iterable[_Component], hub: dict[str, Any]
) -> mlx_unet3d.CLIPTokenizer:
    """The tokenizer of a folder or hub id, in its folder `tokenizer` where it has that.

    Raises FileNotFoundError as `find_folder`, and CheckpointError for a tokenizer that is damaged or has more
    tokens than the text encoder among `components`.
    """
    where = {key: value for key, value in hub.items() if key != "revision"}  # which is the source's
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
    """The tokenizer, padding with id 0 as OpenCLIP does and the UNet has seen it, and what to say of it."""
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
