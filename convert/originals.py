"""The names of tensors in the original files, and what each is in the networks of this package.

Original files are those that the models were published in before they were turned into diffusers' form:
ModelScope's UNet, the autoencoder of latent diffusion, OpenCLIP's text tower. A naming is made of all keys of
a file, as some names count from the other end, and tells of one key which parameters it holds: none where
the network has no use for it, three where a matrix is fused.

Sources: `UNetSD` and `AutoencoderKL` of modelscope's `video_synthesis`, Rombach et al., arXiv:2112.10752;
open_clip's `TextTransformer`.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mlx_unet3d.checkpoints import TensorInfo
from mlx_unet3d.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """A parameter, and which part of the tensor it is.

    Attributes:
        name: the parameter.
        third: 0, 1 or 2 for that third of the rows; None for all of them.
        pointwise: a Conv1d of kernel size 1, (O, I, 1), of which the matrix (O, I) is wanted.
    """

    name: str
    third: int | None = None
    pointwise: bool = False

    def of(self, key: str, info: TensorInfo) -> tuple[str, TensorInfo]:
        """What to call the part, `key[0:4]` in Python's notation, and where it lies.

        Raises CheckpointError where the tensor has no such part.
        """
        if self.third is not None:
            if not info.shape or info.shape[0] % 3:
                raise CheckpointError(
                    f"{key!r} has shape {info.shape}; query, key and value must be equal thirds of its rows"
                )
            height = info.shape[0] // 3
            start, stop = self.third * height, (self.third + 1) * height
            return f"{key}[{start}:{stop}]", info.rows(start, stop)
        if self.pointwise and len(info.shape) == 3 and info.shape[2] == 1:
            return f"{key}[:,:,0]", info.squeezed()
        return key, info


Naming = Callable[[str], list[Part]]
"""The parts of a key; an unknown key is the parameter of its own name, which no network will have."""


# ModelScope's UNet.

_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d{1,4})\.(?:(\d{1,4})\.)?(.+)")


def unet_naming(keys: Collection[str]) -> Naming:
    """Of `text2video_pytorch_model.pth`.

    Its blocks are numbered through: the layers of a resolution, then the halving between two of them.
    """
    inputs = [match for match in map(_UNET_BLOCK.fullmatch, keys) if match and match[1] == "input_blocks"]
    halvings = [int(match[2]) for match in inputs if match[4].startswith("op.")]
    layers = max(min(halvings) - 1, 0) if halvings else max((int(match[2]) for match in inputs), default=0)

    def naming(key: str) -> list[Part]:
        module, _, kind = key.rpartition(".")
        if module in _UNET:
            return [Part(f"{_UNET[module]}.{kind}")]
        match = _UNET_BLOCK.fullmatch(key)
        if match is None:
            return [Part(key)]
        return [_unet_part(key, match[1], int(match[2]), match[3], match[4], layers)]

    return naming


def _unet_part(key: str, path: str, number: int, place: str | None, rest: str, layers: int) -> Part:
    if path == "input_blocks":
        if number == 0:
            return _unet_transformer("transformer_in", rest, True) if place == "1" else Part(key)
        level, layer = divmod(number - 1, layers + 1)
        block = f"down_blocks.{level}"
        if rest.startswith("op."):
            return Part(f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}")
    elif path == "middle_block":
        # Resnet, spatial and temporal transformer, resnet: the number says what elsewhere the place says.
        if place is not None:
            rest = f"{place}.{rest}"
        block, layer = "mid_block", int(number == 3)
        place = "0" if number == 3 else str(number)
    else:
        level, layer = divmod(number, layers + 1)
        block = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return Part(f"{block}.upsamplers.0.{rest}")
    if place == "0":
        return _unet_resnet(key, block, layer, rest)
    if place in ("1", "2"):
        module = "attentions" if place == "1" else "temp_attentions"
        return _unet_transformer(f"{block}.{module}.{layer}", rest, place == "2")
    return Part(key)


def _unet_resnet(key: str, block: str, layer: int, rest: str) -> Part:
    if rest.startswith("temopral_conv."):  # sic
        return Part(f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}")
    module, _, kind = rest.rpartition(".")
    return Part(f"{block}.resnets.{layer}.{_UNET_RESNET[module]}.{kind}" if module in _UNET_RESNET else key)


def _unet_transformer(path: str, rest: str, temporal: bool) -> Part:
    """Inside, the names are the same on both sides."""
    return Part(f"{path}.{rest}", pointwise=temporal and rest in ("proj_in.weight", "proj_out.weight"))


# The autoencoder of latent diffusion.

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_BLOCK = re.compile(
    r"(encoder\.down|decoder\.up)\.(\d{1,4})\.(?:block\.(\d{1,4})\.(.+)|(\w+)\.conv\.(\w+))"
)
_VAE_MID = re.compile(r"((?:en|de)coder)\.mid\.(?:block_([12])\.(.+)|attn_1\.(\w+)\.(\w+))")
# Of training: the loss with its discriminator, and the running mean of all weights.
_VAE_UNUSED = ("loss.", "model_ema.")


def vae_naming(keys: Collection[str]) -> Naming:
    """Of an LDM autoencoder, whose decoder counts its levels from the finest."""
    ups = [int(match[2]) for match in map(_VAE_BLOCK.fullmatch, keys) if match and match[1] == "decoder.up"]
    finest = max(ups, default=0)

    def naming(key: str) -> list[Part]:
        if key.startswith(_VAE_UNUSED):
            return []
        return [Part(_vae_name(key, finest))]

    return naming


def _vae_name(key: str, finest: int) -> str:
    if match := _VAE_MID.fullmatch(key):
        path, block, rest, attention, kind = match.groups()
        if block is not None:
            return f"{path}.mid_block.resnets.{int(block) - 1}.{_vae_resnet(rest)}"
        if attention in _VAE_ATTENTION:
            return f"{path}.mid_block.attentions.0.{_VAE_ATTENTION[attention]}.{kind}"
    elif match := _VAE_BLOCK.fullmatch(key):
        path, level, block, rest, sampler, kind = match.groups()
        decoding = path == "decoder.up"
        blocks = f"{path}_blocks.{finest - int(level) if decoding else level}"
        if block is not None:
            return f"{blocks}.resnets.{block}.{_vae_resnet(rest)}"
        if sampler == ("upsample" if decoding else "downsample"):
            return f"{blocks}.{sampler}rs.0.conv.{kind}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)


def _vae_resnet(rest: str) -> str:
    return re.sub(r"^nin_shortcut\.", "conv_shortcut.", rest)


# OpenCLIP's text tower.

_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.(.+)")
# The image tower, and what compares images with texts.
_TEXT_UNUSED = re.compile(r"visual\..*|logit_scale|logit_bias|text_projection(\..*)?|attn_mask")


def text_naming(keys: Collection[str]) -> Naming:
    """Of OpenCLIP. The UNets were trained on the states before the last layer, which is left out."""
    last = max((int(match[1]) for match in map(_TEXT_BLOCK.fullmatch, keys) if match), default=0)

    def naming(key: str) -> list[Part]:
        if _TEXT_UNUSED.fullmatch(key):
            return []
        if key in _TEXT:
            return [Part(f"text_model.{_TEXT[key]}")]
        match = _TEXT_BLOCK.fullmatch(key)
        if match is None:
            return [Part(key)]
        if int(match[1]) == last:
            return []
        path, rest = f"text_model.encoder.layers.{match[1]}", match[2]
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.removeprefix("attn.in_proj_")
            return [Part(f"{path}.self_attn.{name}_proj.{kind}", third) for third, name in enumerate("qkv")]
        module, _, kind = rest.rpartition(".")
        return [Part(f"{path}.{_TEXT_LAYER[module]}.{kind}" if module in _TEXT_LAYER else key)]

    return naming
