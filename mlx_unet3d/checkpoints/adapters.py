"""Files of LoRA adapters in the spellings of their trainers -> the layers that they change.

| spelling                        | a key                                                          |
|---------------------------------|----------------------------------------------------------------|
| diffusers 0.23, processors      | `[unet.]...attn1.processor.to_q_lora.down.weight`              |
| diffusers 0.23, layers          | `[unet.]...attn1.to_q.lora_layer.down.weight`, `.lora.down.`   |
| PEFT, diffusers since 0.26      | `[unet.]...attn1.to_q.lora_A.weight`, `base_model.model....`   |
| kohya                           | `lora_unet_..._attn1_to_q.lora_down.weight`, `.alpha`          |
| Text-To-Video-Finetuning        | `...attn1.to_q.lora_A` ("stable_lora"; alpha is the rank)      |
| the same, "cloneofsimo" (`.pt`) | none: a list of up, down, up, down, ... over some layers       |

See `adapter_keys` for what may stand in front, and for what else there is beside.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from .config import blame, read_json
from .headers import read_header, read_tensor
from .hub import Hub, takes_hub
from .pickles import is_pickle, read_pickle
from .source import SUFFIXES, find_folder, inside_hub

LORA_NAMES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors",  # motion LoRAs of AnimateDiff's authors
)
CUSTOM_DIFFUSION_NAMES = (
    "pytorch_custom_diffusion_weights.safetensors",
    "pytorch_custom_diffusion_weights.bin",
)
TEXTUAL_INVERSION_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file of adapters.

    Attributes:
        path: of the file; None for arrays in memory.
        tensors: its arrays by key, in torch's layout.
        settings: `r`, `lora_alpha` and so on, of PEFT's config or diffusers' metadata.
        token: the name that an embedding of the web UI says for itself.
    """

    path: Path | None
    tensors: dict[str, mx.array]
    settings: dict[str, Any]
    token: str | None = None

    @property
    def name(self) -> str:
        return "the adapter" if self.path is None else str(self.path)


@takes_hub
def read_adapter(
    source: "str | Path | Mapping[str, mx.array] | AdapterFile",
    *,
    weight_name: str | None = None,
    names: Collection[str] = (*LORA_NAMES, *CUSTOM_DIFFUSION_NAMES),
    subfolder: str | None = None,
    hub: Hub,
) -> AdapterFile:
    """Read a file of adapters: safetensors, or a torch pickle as data.

    Args:
        source: the file, a folder or hub id that holds it, or the arrays themselves. A hub id may go on with
            the folder or the file in it: OWNER/NAME/FOLDER/FILE.
        weight_name: the file's name in the folder; None for the first of `names`.
        subfolder: the folder of the file inside a folder or hub id.
        revision, local_files_only, token, cache_dir, hub: see `Hub`.

    Raises:
        FileNotFoundError: there is none; CheckpointError: it is damaged.
    """
    if isinstance(source, AdapterFile):
        return source
    if isinstance(source, Mapping):
        return AdapterFile(None, dict(source), {})
    path = Path(source).expanduser()
    if not path.is_file():
        if not path.is_dir() and isinstance(source, str):
            source, inside, name = inside_hub(source)
            if inside is not None:
                subfolder = "/".join(part for part in (subfolder, inside) if part)
            weight_name = weight_name if name is None else name
        if path.suffix in SUFFIXES and source == str(path):
            raise FileNotFoundError(f"{path} does not exist; give an existing file, a folder or a hub id")
        wanted = [weight_name] if weight_name is not None else list(names)
        try:
            folder = find_folder(source, files=(*wanted, "adapter_config.json"), subfolder=subfolder, hub=hub)
        except FileNotFoundError as error:
            if source == str(path):
                raise
            raise FileNotFoundError(f"{path} does not exist, and of the hub: {error}") from error
        path = next((folder / name for name in wanted if (folder / name).is_file()), None)
        if path is None:
            there = ", ".join(sorted(f.name for f in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{folder} has none of {', '.join(wanted)}; it has {there}. Give the file itself (on the "
                "hub OWNER/NAME/FILE or OWNER/NAME/FOLDER/FILE), or its name by weight_name"
            )
    header = read_pickle(path, lists=True) if is_pickle(path) else read_header(path)
    nbytes = sum(info.nbytes for info in header.tensors.values())
    if nbytes > path.stat().st_size:  # many names for the same data
        raise CheckpointError(
            f"{path}: its tensors take {nbytes} bytes, more than the file; save it again, each tensor once"
        )
    tensors = {key: read_tensor(path, info) for key, info in header.tensors.items()}
    return AdapterFile(path, tensors, _settings(path, header.metadata), header.metadata.get("name"))


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "lora_adapter_metadata" in metadata:
        with blame(f"{path}: lora_adapter_metadata"):
            settings = json.loads(metadata["lora_adapter_metadata"])
    elif path.name.startswith("adapter_model") and path.with_name("adapter_config.json").is_file():
        settings = read_json(path.with_name("adapter_config.json"))
    else:
        return {}
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: its settings must be an object, not {type(settings).__name__}; download it again"
        )
    return settings


def learned_token(file: AdapterFile, token: str | None) -> tuple[str, mx.array]:
    """Return the name and the embeddings (T, E) of a textual inversion (arXiv:2208.01618).

    diffusers' files have the name as their key. Files of the web UI have "*", and the name beside it, or
    "emb_params" and need `token`. CheckpointError for a file that is none, ValueError where `token` lacks.
    """
    if len(file.tensors) != 1:
        keys = ", ".join(key[:200] for key in list(file.tensors)[:4])
        raise CheckpointError(
            f"{file.name} has {len(file.tensors)} tensors ({keys}); a textual inversion has one, under its "
            "token or as emb_params"
        )
    [(key, embeddings)] = file.tensors.items()
    if key in ("emb_params", "*"):
        token = file.token if token is None else token
    if key in ("emb_params", "*") and token is None:
        raise ValueError(f"{file.name} does not say what its token is called; pass token=")
    usable = embeddings.ndim in (1, 2) and embeddings.size and mx.issubdtype(embeddings.dtype, mx.floating)
    if not usable:
        raise CheckpointError(
            f"{file.name}: {key[:200]!r} is {embeddings.dtype} {tuple(embeddings.shape)}, which is no "
            "embedding"
        )
    name = key if token is None else token
    if not name or len(name) > 200 or not _is_text(name):
        raise CheckpointError(f"{file.name}: {name[:200]!r} is no name of a token; pass another")
    return name, embeddings.reshape(-1, embeddings.shape[-1])


def _is_text(key: str) -> bool:
    """Return True for valid Unicode; pickles can hold half a character."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_custom_diffusion(file: AdapterFile) -> bool:
    """Return True for a file of Custom Diffusion."""
    return any("custom_diffusion" in key for key in file.tensors)
