"""Networks written as their original files name them: the inverse of what the converter undoes."""

import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import headers, parameter_layouts, to_diffusers
from mlx_unet3d.models.pretrained import PretrainedModel
from test_pickles import dictionary, tensor, write_legacy, write_zip

Tensors = dict[str, np.ndarray]


def as_diffusers(model: PretrainedModel) -> Tensors:
    """The parameters as in a diffusers file."""
    layouts = parameter_layouts(model)
    return {
        name: np.ascontiguousarray(to_diffusers(layouts.get(name, "identity"), array))
        for name, array in tree_flatten(model.parameters())
    }


def unet(tensors: Mapping[str, np.ndarray], layers: int) -> Tensors:
    """`text2video_pytorch_model.pth` of a UNet with `layers` layers a block."""
    halves = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    halves |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
    halves |= {"transformer_in": "input_blocks.0.1"}
    for i in range(8):
        halves[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (layers + 1)}.op"
        for j in range(layers):
            number = f"input_blocks.{1 + i * (layers + 1) + j}"
            halves |= _layer(f"down_blocks.{i}", j, f"{number}.0", f"{number}.1", f"{number}.2")
        for j in range(layers + 1):
            number = f"output_blocks.{i * (layers + 1) + j}"
            halves |= _layer(f"up_blocks.{i}", j, f"{number}.0", f"{number}.1", f"{number}.2")
        # The doubling comes last in its layer, behind the transformers where there are some.
        attends = f"up_blocks.{i}.attentions.0.norm.weight" in tensors
        number = f"output_blocks.{i * (layers + 1) + layers}.{3 if attends else 1}"
        halves[f"up_blocks.{i}.upsamplers.0.conv"] = f"{number}.conv"
    halves |= _layer("mid_block", 0, "middle_block.0", "middle_block.1", "middle_block.2")
    halves |= _layer("mid_block", 1, "middle_block.3", "", "")

    made = {}
    for name, array in tensors.items():
        path = next(path for path in halves if name.startswith(f"{path}."))
        temporal = ".temp_attentions." in name or path == "transformer_in"
        if temporal and re.search(r"proj_(in|out)\.weight$", name):
            array = array[:, :, None]
        made[halves[path] + name.removeprefix(path)] = array
    assert len(made) == len(tensors)
    return made


def _layer(block: str, j: int, resnet: str, spatial: str, temporal: str) -> dict[str, str]:
    parts = dict(norm1="in_layers.0", conv1="in_layers.2", time_emb_proj="emb_layers.1")
    parts |= dict(norm2="out_layers.0", conv2="out_layers.3", conv_shortcut="skip_connection")
    return {
        **{f"{block}.resnets.{j}.{ours}": f"{resnet}.{theirs}" for ours, theirs in parts.items()},
        f"{block}.temp_convs.{j}": f"{resnet}.temopral_conv",
        f"{block}.attentions.{j}": spatial,
        f"{block}.temp_attentions.{j}": temporal,
    }


def vae(tensors: Mapping[str, np.ndarray], levels: int) -> Tensors:
    """An LDM autoencoder of `levels` resolutions."""
    made = {}
    for name, array in tensors.items():
        key = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        key = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key
        )
        if ".attentions.0." in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"to_([qkv])\.", r"\1.", key).replace("to_out.0", "proj_out")
            array = array[:, :, None, None] if array.ndim == 2 else array
        made[key] = array
    assert len(made) == len(tensors)
    return made


def text(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """OpenCLIP's file: the text tower with one layer more, an image tower, and what compares the two."""
    made = text_tower(tensors)
    layers = 1 + max(int(key.split(".")[2]) for key in made if key.startswith("transformer."))
    last = [key for key in made if key.startswith(f"transformer.resblocks.{layers - 1}.")]
    made |= {key.replace(f".{layers - 1}.", f".{layers}.", 1): 2 * made[key] for key in last}
    width = made["ln_final.bias"].size
    made |= {"text_projection": np.ones((width, width), np.float32), "logit_scale": np.float32(4.6)}
    return made | {"visual.conv1.weight": np.ones((8, 3, 2, 2), np.float32)}


def text_tower(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """OpenCLIP's text tower, with its projection where there is one."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    return _tower(tensors, names, "text_model.")


def image_tower(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """OpenCLIP's image tower."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "visual_projection.weight": "proj",
    }
    for theirs, ours in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    return {f"visual.{key}": array for key, array in _tower(tensors, names, "vision_model.").items()}


def _tower(tensors: Mapping[str, np.ndarray], names: Mapping[str, str], prefix: str) -> Tensors:
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    made, fused = {}, {}
    for name, array in tensors.items():
        name = name.removeprefix(prefix)
        if name in names:
            made[names[name]] = array.T if name.endswith("_projection.weight") else array
            continue
        number, module, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", name).groups()
        block = f"transformer.resblocks.{number}"
        if module in parts:
            made[f"{block}.{parts[module]}.{kind}"] = array
        else:
            fused.setdefault(f"{block}.attn.in_proj_{kind}", {})[module.removesuffix("_proj")[-1]] = array
    return made | {key: np.concatenate([qkv[letter] for letter in "qkv"]) for key, qkv in fused.items()}


_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def write_pickle(
    path: Path, tensors: Mapping[str, np.ndarray], *, legacy: bool = False, wrapped: bool = False
) -> Path:
    """What torch.save writes of a state dict. Arrays that are views of transposed ones are saved as such."""
    entries, data = {}, []
    for i, (name, array) in enumerate(tensors.items()):
        array = np.asarray(array)
        assert array.flags.c_contiguous or array.flags.f_contiguous
        entries[name] = tensor(
            key=str(i),
            cls=_STORAGES[str(array.dtype)],
            count=array.size,
            shape=array.shape,
            strides=tuple(stride // array.itemsize for stride in array.strides),
            legacy=legacy,
        )
        data.append((str(i), array.size, array.tobytes("A")))
    body = dictionary(**entries)
    if wrapped:
        body = dictionary(state_dict=body)
    if legacy:
        return write_legacy(path, body, data)
    return write_zip(path, body, [(key, content) for key, _, content in data])


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """As torch users save them, under any name."""
    arrays = {key: mx.array(np.ascontiguousarray(array)) for key, array in tensors.items()}
    headers.write_safetensors(path, arrays, {"format": "pt"})
    return path


# AnimateDiff, Stable Diffusion, Stable Video Diffusion, I2VGen-XL.


def motion_module(tensors: Mapping[str, np.ndarray], *, tables: bool = True) -> Tensors:
    """A motion module of AnimateDiff's authors, with its tables of positions, which both attentions have."""
    made = {}
    for name, array in tensors.items():
        key = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
        if key.endswith("pos_embed.pe"):
            if tables:
                for i in (0, 1):
                    made[key.replace("pos_embed.pe", f"attention_blocks.{i}.pos_encoder.pe")] = array
            continue
        key = re.sub(r"\.attn([12])\.", lambda m: f".attention_blocks.{int(m[1]) - 1}.", key)
        key = re.sub(r"\.norm([12])\.", lambda m: f".norms.{int(m[1]) - 1}.", key)
        made[key.replace(".norm3.", ".ff_norm.")] = array
    return made


_RESNET = dict(norm1="in_layers.0", conv1="in_layers.2", time_emb_proj="emb_layers.1")
_RESNET |= dict(norm2="out_layers.0", conv2="out_layers.3", conv_shortcut="skip_connection")


def numbered_unet(tensors: Mapping[str, np.ndarray], layers: int, rename=lambda rest: rest) -> Tensors:
    """A UNet of Stable Diffusion, or with `rename` of the rest of a name one of videos."""
    ends = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    ends |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
    ends |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}" for i in (1, 2)}
    made = {}
    for name, array in tensors.items():
        path, _, kind = name.rpartition(".")
        if path in ends:
            made[f"{ends[path]}.{kind}"] = array
            continue
        block, level, module, j, rest = re.fullmatch(
            r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name
        ).groups()
        level, j = int(level or 0), int(j)
        if block == "mid":
            front = f"middle_block.{2 * j if module == 'resnets' else 1}"
        elif module == "downsamplers":
            made[f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{kind}"] = array
            continue
        elif module == "upsamplers":
            place = 2 if f"up_blocks.{level}.attentions.0.norm.weight" in tensors else 1
            made[f"output_blocks.{level * (layers + 1) + layers}.{place}.conv.{kind}"] = array
            continue
        else:
            number = level * (layers + 1) + j
            front = f"input_blocks.{number + 1}" if block == "down" else f"output_blocks.{number}"
            front += ".0" if module == "resnets" else ".1"
        if module == "resnets":
            rest = re.sub(
                r"^(temporal_res_block\.|spatial_res_block\.|)(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)\.",
                lambda m: f"{'time_stack.' if m[1].startswith('temporal') else ''}{_RESNET[m[2]]}.",
                rest,
            )
        rest = rest.replace("temporal_transformer_blocks.", "time_stack.")
        rest = re.sub(r"time_pos_embed\.linear_([12])", lambda m: f"time_pos_embed.{2 * int(m[1]) - 2}", rest)
        made[f"{front}.{rest}"] = array
    assert len(made) == len(tensors)
    return made


def temporal_vae(tensors: Mapping[str, np.ndarray], levels: int) -> Tensors:
    """The autoencoder in a checkpoint of Stable Video Diffusion, with the halves that nobody needs."""
    plain = {name.replace(".spatial_res_block.", "."): array for name, array in tensors.items()}
    mixed = {}
    for name in list(plain):
        if ".temporal_res_block." in name or "time_mixer" in name or "time_conv_out" in name:
            mixed[name] = plain.pop(name)
    made = {}
    for key, array in vae(plain, levels).items():
        front = "first_stage_model" if key.startswith("decoder.") else "conditioner.embedders.3.encoder"
        made[f"{front}.{key}"] = array
        if front != "first_stage_model":
            made[f"first_stage_model.{key}"] = 2 * array
    names = {name: array for name, array in mixed.items() if "time_conv_out" not in name}
    for name, array in names.items():
        path, block = re.match(r"(decoder\.(?:mid_block|up_blocks\.\d+)\.resnets\.\d+)\.(.+)", name).groups()
        (front,) = vae({f"{path}.norm1.weight": array}, levels)
        front = front.removesuffix(".norm1.weight")
        block = block.replace("time_mixer.mix_factor", "mix_factor")
        block = re.sub(r"^temporal_res_block\.(\w+)\.", lambda m: f"time_stack.{_RESNET[m[1]]}.", block)
        made[f"first_stage_model.{front}.{block}"] = array
    for name in mixed.keys() - names.keys():
        made[f"first_stage_model.{name.replace('time_conv_out', 'conv_out.time_mix_conv')}"] = mixed[name]
    made["conditioner.embedders.3.encoder.decoder.conv_in.weight"] = np.ones((2, 2), np.float32)
    return made


def i2vgen(tensors: Mapping[str, np.ndarray], layers: int) -> Tensors:
    """`i2vgen_xl_00854500.pth`."""
    encoder = "local_temporal_encoder.layers.0"
    names = {
        "image_latents_proj_in.": "local_image_concat.",
        "image_latents_context_embedding.": "local_image_embedding.",
        "image_latents_temporal_encoder.norm1.": f"{encoder}.0.norm.",
        "image_latents_temporal_encoder.attn1.to_out.0.": f"{encoder}.0.fn.to_out.0.",
        "image_latents_temporal_encoder.ff.net.0.proj.": f"{encoder}.1.net.0.0.",
        "image_latents_temporal_encoder.ff.net.2.": f"{encoder}.1.net.2.",
        "context_embedding.": "context_embedding.",
        "fps_embedding.": "fps_embedding.",
    }
    made, rest = {}, {}
    for name, array in tensors.items():
        front = next((front for front in names if name.startswith(front)), None)
        if front is not None:
            made[names[front] + name.removeprefix(front)] = array
        elif not name.startswith("image_latents_temporal_encoder.attn1.to_"):
            rest[name] = array
    path = "image_latents_temporal_encoder.attn1"
    fused = [tensors[f"{path}.to_{letter}.weight"] for letter in "qkv"]
    made[f"{encoder}.0.fn.to_qkv.weight"] = np.concatenate(fused)
    return made | unet(rest, layers)
