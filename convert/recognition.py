"""Telling which network a weight file holds, by the names of its tensors and never by its own."""

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx_unet3d
from mlx_unet3d.checkpoints import Header, read_header, read_pickle
from mlx_unet3d.checkpoints.pickles import is_pickle
from mlx_unet3d.checkpoints.prefixes import unwrapped, without_wrappers
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import PretrainedModel

from .originals import Naming, Part, text_naming, unet_naming, vae_naming

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""What weight files are looked for by in a folder; what they hold is told by their content."""

# Telling what a file is nearest to compares all kinds of keys; real files have a hundred, and short ones.
_COMPARED, _LONGEST = 500, 200

COMPONENTS: dict[type[PretrainedModel], str] = {
    mlx_unet3d.UNet3DConditionModel: "unet",
    mlx_unet3d.AutoencoderKL: "vae",
    mlx_unet3d.CLIPTextModel: "text_encoder",
}
"""The networks of a pipeline and their names in it."""


@dataclass(frozen=True)
class Family:
    """A kind of file.

    Attributes:
        title: what to call it.
        cls: the network in it.
        signs: tensors that all files of the kind have, and no other kind has all of.
        naming: which parameters a key holds, made of all keys.
        within: what the keys may have in front, besides the network's name in a pipeline, where the network
            is a part of a larger one.
    """

    title: str
    cls: type[PretrainedModel]
    signs: tuple[str, ...]
    naming: Callable[[Collection[str]], Naming]
    within: tuple[str, ...] = ()

    def prefixes(self, keys: Collection[str]) -> Iterator[str]:
        """What keys of a network of this family have in front: nothing in a file of it alone, else its name
        in a pipeline, what it is within, and what wrappers add, in any nesting."""
        sign = self.signs[0]
        for prefix in (key.removesuffix(sign) for key in keys if key == sign or key.endswith(f".{sign}")):
            owner, name = unwrapped(f"{prefix}{sign}")
            within = (sign, *(unwrapped(f"{prefix}{sign}")[1] for prefix in self.within))
            if owner in (None, COMPONENTS[self.cls]) and name in within:
                yield prefix


def _own_names(cls: type[PretrainedModel]) -> Callable[[Collection[str]], Naming]:
    """The naming of files that diffusers or transformers wrote."""

    def make(keys: Collection[str]) -> Naming:
        def naming(key: str) -> list[Part]:
            name = cls.rename_key(key, keys)
            return [] if name is None else [Part(name)]

        return naming

    return make


def _diffusers(title: str, cls: type[PretrainedModel], *signs: str) -> Family:
    return Family(f"{title} with diffusers' names", cls, signs, _own_names(cls))


_LATENT_DIFFUSION = "model.diffusion_model."  # the UNet in a whole checkpoint
_CLIP_SIGNS = (
    "embeddings.token_embedding.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "final_layer_norm.weight",
)
FAMILIES = (
    Family(
        "ModelScope's original UNet",
        mlx_unet3d.UNet3DConditionModel,
        (
            "time_embed.0.weight",
            "input_blocks.0.0.weight",
            "input_blocks.0.1.proj_in.weight",
            "middle_block.0.temopral_conv.conv1.0.weight",
        ),
        unet_naming,
        (_LATENT_DIFFUSION,),
    ),
    Family(
        "an autoencoder of latent diffusion",
        mlx_unet3d.AutoencoderKL,
        (
            "encoder.conv_in.weight",
            "encoder.down.0.block.0.conv1.weight",
            "decoder.up.0.block.0.conv1.weight",
        ),
        vae_naming,
        ("first_stage_model.",),
    ),
    Family(
        "OpenCLIP's text tower",
        mlx_unet3d.CLIPTextModel,
        (
            "token_embedding.weight",
            "positional_embedding",
            "transformer.resblocks.0.attn.in_proj_weight",
            "ln_final.weight",
        ),
        text_naming,
        ("cond_stage_model.model.", "cond_stage_model."),
    ),
    _diffusers(
        "a UNet3DConditionModel",
        mlx_unet3d.UNet3DConditionModel,
        "conv_in.weight",
        "transformer_in.proj_in.weight",
        "down_blocks.0.temp_convs.0.conv1.0.weight",
    ),
    _diffusers(
        "an AutoencoderKL",
        mlx_unet3d.AutoencoderKL,
        "encoder.conv_in.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
    ),
    _diffusers("a CLIPTextModel", mlx_unet3d.CLIPTextModel, *(f"text_model.{sign}" for sign in _CLIP_SIGNS)),
    _diffusers("a CLIPTextModel", mlx_unet3d.CLIPTextModel, *_CLIP_SIGNS),
)


@dataclass(frozen=True)
class Recognized:
    """The network in a file.

    Attributes:
        path: the file.
        family: its kind.
        prefix: what its keys have in front.
        header: the parts of tensors that are parameters, by what to call them, see `Part.of`.
        names: the parameter of each.
        dropped: keys of the file that the network has no use for.
    """

    path: Path
    family: Family
    prefix: str
    header: Header
    names: dict[str, str]
    dropped: list[str]

    @property
    def reason(self) -> str:
        """Why it is taken for what it is, and how it is read."""
        kind = f"{self.family.title}, as it has {self.prefix}{self.family.signs[-1]}"
        return f"{kind}; a torch pickle, read without running it" if is_pickle(self.path) else kind


def recognize(path: Path) -> list[Recognized]:
    """Read the header of a weight file and tell which networks it holds; no tensor is read.

    Of several, such as in a whole checkpoint of latent diffusion, each has a prefix of its own. A checkpoint
    of an image model, whose UNet is none of `FAMILIES`, gives the others.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds none of `FAMILIES`, one of them twice or several without
            prefixes, or a fused tensor that does not come apart.
    """
    header = read_pickle(path) if is_pickle(path) else read_header(path)
    bare = {without_wrappers(key): info for key, info in header.tensors.items()}
    if len(bare) == len(header.tensors):  # else some are there with a wrapper and without
        header = Header(bare, header.metadata)
    found = list(_matches(header.tensors))
    if not found:
        raise CheckpointError(_unknown(path, header.tensors))
    kinds = {family.cls for family, _ in found}
    if len(found) > 1 and (len(kinds) < len(found) or not all(prefix for _, prefix in found)):
        raise CheckpointError(
            f"{path} holds several networks at once: "
            f"{' and '.join(f'{family.title} ({prefix}{family.signs[-1]})' for family, prefix in found)}; "
            "a file may hold one of each kind, all with a prefix such as model.diffusion_model., "
            "first_stage_model. and cond_stage_model.model.; save each to a file of its own"
        )
    return [_recognized(path, header, family, prefix) for family, prefix in found]


def _recognized(path: Path, header: Header, family: Family, prefix: str) -> Recognized:
    """The parts of one network of the file."""
    keys = {key.removeprefix(prefix): key for key in header.tensors if key.startswith(prefix)}
    naming = family.naming(keys.keys())
    parts, names, dropped = {}, {}, [key for key in header.tensors if not key.startswith(prefix)]
    for bare, key in keys.items():
        for part in (made := naming(bare)):
            try:
                called, info = part.of(key, header.tensors[key])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
            parts[called], names[called] = info, part.name
        if not made:
            dropped.append(key)
    return Recognized(path, family, prefix, Header(parts, header.metadata), names, dropped)


def is_image_model(networks: Collection[Recognized]) -> bool:
    """Whether the file of the networks is a checkpoint of latent diffusion with a UNet of another kind."""
    unused = set.intersection(*(set(network.dropped) for network in networks))
    return any(key.startswith(_LATENT_DIFFUSION) for key in unused)


def weight_files_in(folder: Path) -> list[Path]:
    """The files of a folder, not of those in it, that may hold weights, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _matches(keys: Collection[str]) -> Iterator[tuple[Family, str]]:
    for family in FAMILIES:
        for prefix in family.prefixes(keys):
            if all(prefix + sign in keys for sign in family.signs):
                yield family, prefix


def _unknown(path: Path, keys: Collection[str]) -> str:
    """What the file is nearest to, and what it lacks to be that."""
    # Few of thousands, as layers repeat.
    kinds = dict.fromkeys(re.sub(r"\d+", "0", key) for key in keys if len(key) <= _LONGEST)
    kinds = list(kinds)[:_COMPARED]

    def nearness(choice: tuple[Family, str]) -> tuple[int, int]:
        family, prefix = choice
        inside = [kind.removeprefix(prefix) for kind in kinds if kind.startswith(prefix)]
        alike = sum(bool(difflib.get_close_matches(sign, inside, 1, 0.8)) for sign in family.signs)
        return sum(prefix + sign in keys for sign in family.signs), alike

    choices = [
        (family, prefix)
        for family in FAMILIES
        for prefix in ("", *family.within, f"{COMPONENTS[family.cls]}.")
    ]
    family, prefix = max(choices, key=nearness)
    lacking = ", ".join(prefix + sign for sign in family.signs if prefix + sign not in keys)
    shown = ", ".join(key[:_LONGEST] for key in list(keys)[:4])
    known = ", ".join(dict.fromkeys(family.title for family in FAMILIES))
    near = f"Nearest is {family.title}, for which it lacks {lacking}"
    if nearness((family, prefix)) == (0, 0):
        near = "It is near to none of them; give the file of one of these"
    return (
        f"{path} holds none of the networks that this converter knows by their tensors ({known}); it has "
        f"{len(keys)} tensors ({shown}{', ...' if len(keys) > 4 else ''}). {near}"
    )
