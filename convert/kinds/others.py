"""Known files that are no networks to convert, identified by their tensors, and their use."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mlx_unet3d.checkpoints import Header
from mlx_unet3d.latents import LATENTS
from mlx_unet3d.models.ip_adapter_files import encoder_needed, projection_kind

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Other:
    """A kind of file without a network for this converter.

    Attributes:
        title: its name in messages.
        sign: a pattern in the name of one of its tensors, and of no network's.
        cure: what to do instead of converting it.
        beside: a part of another tensor's name; empty for none.
        only: what else must be so, by the shapes of its tensors.
        use: arguments of `mlx-unet3d` that use it, with {file} for it; empty where nothing does.
        facts: what its shapes tell.
    """

    title: str
    sign: re.Pattern[str]
    cure: str
    beside: str = ""
    only: Callable[[Shapes], bool] = lambda shapes: True
    use: str = ""
    facts: Callable[[Shapes], Iterator[str]] = lambda shapes: iter(())

    def fits(self, shapes: Shapes) -> bool:
        """Return True if a file with tensors of these shapes is of this kind."""
        return (
            any(map(self.sign.search, shapes))
            and any(self.beside in key for key in shapes)
            and self.only(shapes)
        )


_WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2 or ModelScope", 2048: "Stable Diffusion XL"}


def _model(width: int) -> str:
    return f"{_WIDTHS.get(width, 'a model')} (text of {width} channels)"


def of_lora(shapes: Shapes) -> Iterator[str]:
    """Ranks, and the width of text where it changes cross-attention."""
    down = {k: s for k, s in shapes.items() if _DOWN.search(k) and len(s) >= 2}
    if ranks := sorted({shape[0] for shape in down.values()}):
        shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
        yield f"rank {shown} in {len(down)} layers"
    widths = {math.prod(s[1:]) for k, s in down.items() if re.search(r"attn2[._](processor[._])?to_k", k)}
    if len(widths) == 1:
        yield f"for {_model(*widths)}"


def of_ip_adapter(shapes: Shapes) -> Iterator[str]:
    """Its kind, its image encoder, and its base model."""
    own = {key.partition("image_proj.")[2]: shape for key, shape in shapes.items() if "image_proj." in key}
    kind = projection_kind(own)
    yield f"of the kind {kind}"
    if (needed := encoder_needed(own)) is not None:
        yield f"for an image encoder of {needed[0]}={needed[1]}"
    text = next((shape[1] for key, shape in shapes.items() if key.endswith("to_k_ip.weight")), None)
    if text is not None:
        yield f"for {_model(text)}"


def of_embedding(shapes: Shapes) -> Iterator[str]:
    """Its token, vectors and base model."""
    for key, shape in shapes.items():
        count = 1 if len(shape) == 1 else shape[0]
        named = "" if _NAMELESS.fullmatch(key) else f" under the name {key[:100]!r}"
        yield f"{count} vector{'s' * (count > 1)}{named} for {_model(shape[-1])}"


def is_embedding(shapes: Shapes) -> bool:
    """Return True if a file has nothing but vectors, under a name that says so, or as wide as texts."""
    if all(map(_NAMELESS.fullmatch, shapes)):
        return True
    rows = [shape if len(shape) == 2 else (1, *shape) for shape in shapes.values()]
    return len(shapes) <= 2 and all(len(s) == 2 and s[0] <= 256 and s[1] in _TEXTS for s in rows)


_TEXTS = (768, 1024, 1280)
_NAMELESS = re.compile(r"emb_params|\*|string_to_param.*")
_DOWN = re.compile(r"_lora\.down\.|\.lora_down\.|\.lora_A\b|\.lora\.down\.|\.lora_linear_layer\.down\.")
_LORA = (
    "it changes a network and is none; convert the network, and load the LoRA into it with generate --lora"
)
_TO_LORA = "generate PROMPT --model MODEL --lora {file}"
_UNETS = "this package is for video UNets; give the checkpoint of one, or of Stable Diffusion 1.5 or XL"
OTHERS = (
    Other(
        "the latents of a run",
        re.compile(f"^{LATENTS}$"),
        "see them with decode, or finish the run with generate --resume",
        only=lambda shapes: len(shapes) <= 2,
    ),
    Other(
        "HotShot-XL's motion modules",
        re.compile(r"\.temporal_attentions\.\d+\."),
        "diffusers has no place for them; give a motion module of AnimateDiff",
    ),
    Other(
        "an IP-Adapter",
        re.compile(r"(^|\.)(ip_adapter|image_proj)\.|\.to_[kv]_ip\."),
        "it steers a UNet by pictures and is none, and is read as it is: generate --ip-adapter FILE "
        "--ip-image PICTURE",
        use="generate PROMPT --model MODEL --motion-adapter ADAPTER --ip-adapter {file} --ip-image PICTURE",
        facts=of_ip_adapter,
    ),
    Other(
        "a LoRA of motion modules",
        re.compile(r"motion_modules\..*(_lora\.|\.lora_|\.lora\.)"),
        "it changes motion modules and is none; give the modules that it was trained for, and load the LoRA "
        "with generate --lora",
        use="generate PROMPT --model MODEL --motion-adapter ADAPTER --lora {file}",
        facts=of_lora,
    ),
    Other(
        "a LoRA",
        re.compile(r"_lora\.(down|up)\.|\.lora_(down|up|A|B)\b|\.lora\.(down|up)\.|\.lora_linear_layer\."),
        _LORA,
        use=_TO_LORA,
        facts=of_lora,
    ),
    Other(
        "a LoRA (a list of halves)",
        re.compile(r"^\d+$"),
        _LORA,
        only=lambda shapes: len(shapes) % 2 == 0 and all(key.isdecimal() for key in shapes),
        use=_TO_LORA,
        facts=lambda shapes: iter([f"{len(shapes) // 2} layers"]),
    ),
    Other("a LyCORIS adapter", re.compile(r"\.(hada_w1_a|lokr_w1|lokr_w1_a)$"), _LORA),
    Other(
        "a file of Custom Diffusion",
        re.compile(r"_custom_diffusion\."),
        "it changes a network and is none; load it into a UNet in Python with load_attn_procs",
    ),
    Other(
        "a SparseCtrl encoder",
        re.compile(r"(^|\.)controlnet_cond_embedding\."),
        "it steers a video by pictures and makes none; give a motion module",
        beside="motion_modules.",
    ),
    Other(
        "a ControlNet",
        re.compile(r"(^|\.)(control_model|input_hint_block|zero_convs|controlnet_cond_embedding)\."),
        "it steers a UNet and is none; give the UNet",
    ),
    Other(
        "a T2I-Adapter",
        re.compile(r"^(adapter\.)?body\.\d+\.(block\d|resnets\.\d+\.block\d)\."),
        "it steers a UNet and is none; give the UNet",
    ),
    Other(
        "a T5 text encoder",
        re.compile(r"\.layer\.0\.SelfAttention\.q\."),
        "no video UNet takes its texts; " + _UNETS,
    ),
    Other(
        "a diffusion transformer (as of Stable Diffusion 3, Flux, CogVideoX and Wan)",
        re.compile(
            r"^((model|transformer)\.)?(diffusion_model\.)?"
            r"(joint_|double_|single_|transformer_|single_transformer_)?blocks\.\d+\."
        ),
        _UNETS,
    ),
    Other(
        "a tiny autoencoder (TAESD)",
        re.compile(r"(^|\.)decoder\.layers\.\d+\.conv\.\d+\."),
        "its pictures are previews; give the AutoencoderKL of the model",
    ),
    Other(
        "an upscaler of pictures (ESRGAN)",
        re.compile(r"(^|\.)(RRDB_trunk\.\d+\.|body\.\d+\.rdb\d\.|model\.1\.sub\.\d+\.RDB)"),
        "it makes no video; " + _UNETS,
    ),
    Other(
        "a safety checker",
        re.compile(r"^(concept_embeds|special_care_embeds)$"),
        "it judges pictures and makes none; give the UNet",
    ),
    Other(
        "a textual inversion",
        re.compile(r"^[^.]+$"),
        "it changes no network; load it with generate --embedding",
        only=is_embedding,
        use="generate PROMPT --model MODEL --embedding {file}",
        facts=of_embedding,
    ),
)


def other(header: Header) -> Other | None:
    """Return the kind of a file with these tensors; None if it is not in `OTHERS`."""
    shapes = {key: info.shape for key, info in header.tensors.items()}
    return next((kind for kind in OTHERS if kind.fits(shapes)), None)
