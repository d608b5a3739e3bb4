"""The names of tensors in the original files, and what each is in the networks of this package.

Original files are those that the models were published in before they were turned into diffusers' form:
ModelScope's UNet (see `mlx_unet3d.checkpoints.originals`), the autoencoder of latent diffusion, OpenCLIP's
text tower. A naming is made of all keys of a file, as some names count from the other end.

Sources: `AutoencoderKL` of modelscope's `video_synthesis`, Rombach et al., arXiv:2112.10752; open_clip's
`TextTransformer`.
"""

import re
from collections.abc import Collection

from mlx_unet3d.checkpoints.originals import Naming, Part, unet_naming

__all__ = ["Naming", "Part", "text_naming", "unet_naming", "vae_naming"]

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
