"""Files that are mixed up, or are no networks of the converter: told by name, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import mlx_unet3d
import numpy as np
import original_files as original
import pytest
import tiny
from mlx_unet3d.cli import main

MODULE = "down_blocks.0.motion_modules.0.temporal_transformer"
SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
ONES = np.ones((3, 3), np.float32)
UNET = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    layers_per_block=1,
)
XL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=6 * 256 + 8,
)


def base(**config):
    """A checkpoint of Stable Diffusion, as far as its UNet goes."""
    unet = mlx_unet3d.UNetMotionModel(**UNET | dict(cross_attention_dim=24) | config)
    flat = {k: v for k, v in original.as_diffusers(unet).items() if ".motion_modules." not in k}
    named = original.numbered_unet(flat, unet.config.layers_per_block)
    return write("base", {f"model.diffusion_model.{key}": value for key, value in named.items()})


def adapter(**config):
    made = mlx_unet3d.MotionAdapter(**dict(block_out_channels=(32, 64), motion_layers_per_block=1) | config)
    return write("motion", original.motion_module(original.as_diffusers(made)))


def write(name, tensors):
    return original.write_pickle(Path(name), tensors)


def keys(*names):
    return write("x", dict.fromkeys(names, ONES))


def folder():
    made = mlx_unet3d.UNet3DConditionModel(**tiny.UNET)
    made.save_pretrained("x", layout="diffusers")
    return Path("x")


def content(data, name="x.safetensors"):
    Path(name).write_bytes(data)
    return Path(name)


def shortened(path):
    return content(path.read_bytes()[:-2000], "short.ckpt")


def network(model):
    """A file of a network under diffusers' names."""
    model.save_pretrained("made", layout="diffusers")
    (file,) = Path("made").glob("*.safetensors")
    Path("x.safetensors").write_bytes(file.read_bytes())
    shutil.rmtree("made")
    return Path("x.safetensors")


def vae():
    return network(mlx_unet3d.AutoencoderKL(**tiny.VAE))


def text():
    return network(mlx_unet3d.CLIPTextModel(vocab_size=20, **tiny.TEXT | {"hidden_size": 64}))


def pipeline(name="x", without=(), **index):
    """A folder of a text-to-video pipeline, with another index, and without some folders."""
    made = tiny.write_pipeline(Path(name))
    path = made / "model_index.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | index).items() if v}))
    for part in without:
        shutil.rmtree(made / part)
    return made


def three_levels():
    down = ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion")
    up = ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion")
    return base(block_out_channels=(32, 64, 64), down_block_types=down, up_block_types=up)


def xl():
    down = ("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion")
    up = ("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion")
    widths = dict(block_out_channels=(32, 64, 64), down_block_types=down, up_block_types=up)
    return base(cross_attention_dim=2048, **widths, **XL)


TRANSFORMER = "a diffusion transformer (as of Stable Diffusion 3, Flux, CogVideoX and Wan)"
BASE = "makes no video by itself; pass --motion-adapter"
CASES = {
    "HotShot-XL": (
        lambda: keys("down_blocks.0.temporal_attentions.0.pos_encoder.positional_encoding"),
        None,
        "HotShot-XL's motion modules",
    ),
    "SparseCtrl": (
        lambda: keys(f"{MODULE}.norm.weight", "controlnet_cond_embedding.conv_in.weight"),
        None,
        "a SparseCtrl encoder",
    ),
    "ControlNet": (lambda: keys("controlnet_cond_embedding.conv_in.weight"), None, "a ControlNet"),
    "ControlNet of its authors": (
        lambda: keys("control_model.input_hint_block.0.weight"), None, "a ControlNet",
    ),
    "motion LoRA": (
        lambda: keys(f"{MODULE}.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight"),
        None,
        "a LoRA of motion modules",
    ),
    "domain adapter": (lambda: keys(f"{SPATIAL}.processor.to_q_lora.up.weight"), None, "holds a LoRA"),
    "LoRA of PEFT": (lambda: keys(f"base_model.model.{SPATIAL}.to_q.lora_A.weight"), None, "holds a LoRA"),
    "LoRA of kohya": (
        lambda: keys("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), None, "holds a LoRA",
    ),
    "LyCORIS": (lambda: keys("lora_unet_down_blocks_0_proj_in.hada_w1_a"), None, "a LyCORIS adapter"),
    "IP-Adapter": (lambda: keys("ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"), None, "IP-Adapter"),
    "FaceID": (
        lambda: keys("ip_adapter.0.to_q_lora.down.weight", "image_proj.norm.weight"), None, "an IP-Adapter",
    ),
    "textual inversion": (lambda: keys("emb_params"), None, "a textual inversion"),
    "textual inversion of diffusers": (
        lambda: write("x", {"<cat>": np.ones((2, 768), np.float32)}), None, "a textual inversion",
    ),
    "LoRA in a list": (lambda: keys("0", "1", "2", "3"), None, "a LoRA (a list of halves)"),
    "Custom Diffusion": (lambda: keys(f"{SPATIAL}.to_k_custom_diffusion.weight"), None, "Custom Diffusion"),
    "T2I-Adapter": (lambda: keys("adapter.body.0.resnets.0.block1.weight"), None, "a T2I-Adapter"),
    "T5": (
        lambda: keys("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        None,
        "a T5 text encoder: no video UNet takes its texts",
    ),
    "Stable Diffusion 3": (lambda: keys("model.diffusion_model.joint_blocks.0.x"), None, TRANSFORMER),
    "Flux": (lambda: keys("double_blocks.0.img_attn.qkv.weight"), None, TRANSFORMER),
    "Flux of diffusers": (lambda: keys("transformer_blocks.0.attn.add_q_proj.weight"), None, TRANSFORMER),
    "Wan": (lambda: keys("blocks.0.self_attn.q.weight"), None, TRANSFORMER),
    "TAESD": (lambda: keys("decoder.layers.3.conv.0.weight"), None, "a tiny autoencoder (TAESD)"),
    "ESRGAN": (lambda: keys("body.0.rdb1.conv1.weight"), None, "an upscaler of pictures (ESRGAN)"),
    "safety checker": (lambda: keys("concept_embeds"), None, "a safety checker"),
    "latents": (lambda: keys("latents"), None, "the latents of a run: see them with decode"),
    "a tensor of nobody": (lambda: keys("some.weight"), None, "holds none of the networks that this"),
    "empty": (lambda: content(b""), None, "x.safetensors is empty; download it again"),
    "text": (lambda: content(b"hello, this is text"), None, "x.safetensors is not a safetensors file"),
    "web page": (lambda: content(b"<!DOCTYPE html><html>"), None, "a web page; download the file itself"),
    "git-lfs": (lambda: content(b"version https://git-lfs.github.com/spec/v1"), None, "`git lfs pull`"),
    "GGUF": (lambda: content(b"GGUF\3\0\0\0\0\0\0\0\0\0\0\0"), None, "is a GGUF file"),
    "cut short": (lambda: shortened(adapter()), None, "short.ckpt is not a torch file, or a damaged one"),
    "safetensors cut short": (
        lambda: content(vae().read_bytes()[:-99], "x.safetensors"), None, "x.safetensors is cut short",
    ),
    "damaged module": (lambda: base(), lambda: shortened(adapter()), "short.ckpt is not a torch file"),
    "empty module": (lambda: base(), lambda: content(b""), "x.safetensors is empty"),
    "empty folder": (lambda: Path("x").mkdir() or Path("x"), None, "x/config.json does not exist"),
    "no UNet": (lambda: pipeline(unet=None), None, "x/model_index.json has no UNet"),
    "no folder of the UNet": (lambda: pipeline(without=["unet"]), None, "x has no folder 'unet'"),
    "pipeline of Stable Diffusion 3": (
        lambda: pipeline(unet=None, transformer=["diffusers", "SD3Transformer2DModel"]),
        None,
        "x/model_index.json has a SD3Transformer2DModel and no UNet",
    ),
    "pipeline of another UNet": (
        lambda: pipeline(unet=["diffusers", "Kandinsky3UNet"]), None, "['diffusers', 'Kandinsky3UNet']; this",
    ),
    "upscaler": (lambda: base(in_channels=7), lambda: adapter(), "is an upscaler, with 7 input channels"),
    "VAE for a module": (
        lambda: base(), vae, "holds an AutoencoderKL with diffusers' names, no motion module",
    ),
    "text encoder for a module": (lambda: base(), text, "holds a CLIPTextModel with diffusers' names, no"),
    "IP-Adapter for a module": (lambda: base(), lambda: keys("ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
    "IP-Adapter for a base": (
        lambda: keys("ip_adapter.1.to_k_ip.weight"),
        lambda: adapter(),
        "an IP-Adapter: it steers a UNet by pictures and is none, and is read as it is: generate "
        "--ip-adapter FILE --ip-image PICTURE",
    ),
    "ControlNet for a base": (
        lambda: keys("controlnet_cond_embedding.conv_in.weight"), lambda: adapter(), "a ControlNet",
    ),
    "text encoder for a base": (
        text, lambda: adapter(), "has no UNet of Stable Diffusion, into which the motion",
    ),
    "Stable Video Diffusion for a base": (
        lambda: network(mlx_unet3d.UNetSpatioTemporalConditionModel(**tiny.SVD)),
        lambda: adapter(),
        "is a UNetSpatioTemporalConditionModel, into which no motion adapter goes",
    ),
    "pipeline of Stable Video Diffusion for a base": (
        lambda: tiny.write_stable_video(Path("x")),
        lambda: adapter(),
        "has no UNet of Stable Diffusion, into which the motion",
    ),
    "SDXL and a module of version 2": (
        xl, lambda: adapter(), "has motion modules for another model (levels of 32, 64 channels)",
    ),
    "LoRA for a base": (
        lambda: keys(f"{SPATIAL}.to_q.lora_A.weight"), lambda: adapter(), "holds a LoRA",
    ),
    "LoRA for a module": (
        lambda: base(),
        lambda: keys(f"{MODULE}.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight"),
        "a LoRA of motion modules",
    ),
    "base for a module": (lambda: base(), lambda: base(), "no motion module"),
    "module for a base": (
        lambda: adapter(), lambda: adapter(), "has no UNet of Stable Diffusion, into which the motion",
    ),
    "video UNet for a base": (
        lambda: folder(), lambda: adapter(), "is a UNet3DConditionModel, into which no motion",
    ),
    "UNet for a motion folder": (lambda: base(), lambda: folder(), "is for the class UNet3D"),
    "base without a module": (lambda: base(), None, BASE),
    "Stable Diffusion 2": (
        lambda: base(cross_attention_dim=1024, num_attention_heads=1),
        lambda: adapter(),
        "is a Stable Diffusion 2, with text of 1024",
    ),
    "inpainting": (lambda: base(in_channels=9), lambda: adapter(), "is an inpainting model, with 9"),
    "editing": (lambda: base(in_channels=8), lambda: adapter(), "is a model that edits images, with 8"),
    "depth": (lambda: base(in_channels=5), lambda: adapter(), "is a depth model, with 5 input channels"),
    "refiner": (
        lambda: base(cross_attention_dim=1280, **XL), lambda: adapter(), "is the refiner of Stable Diffusion",
    ),
    "module of other levels": (
        three_levels, lambda: adapter(), "(levels of 32, 64 channels)",
    ),
    "module of SDXL": (
        lambda: base(),
        lambda: adapter(block_out_channels=(32, 64, 64), use_motion_mid_block=False),
        "has motion modules for Stable Diffusion XL (levels of 32, 64, 64 channels)",
    ),
    "module of other widths": (
        lambda: base(), lambda: adapter(block_out_channels=(64, 64)), "levels of 64, 64 channels",
    ),
    "module of other layers": (
        lambda: base(), lambda: adapter(motion_layers_per_block=2), "the motion adapter has",
    ),
    "PIA": (lambda: base(), lambda: adapter(conv_in_channels=9), "is of PIA, which widens"),
    "no such module": (lambda: base(), lambda: Path("nowhere"), "'nowhere' is neither"),
    "half a module": (
        lambda: base(),
        lambda: write(
            "half",
            {
                k: v
                for k, v in original.motion_module(
                    original.as_diffusers(
                        mlx_unet3d.MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1)
                    )
                ).items()
                if "up_blocks.1" not in k
            },
        ),
        "up_blocks.1.motion_modules.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    make, motion, message = CASES[name]
    arguments = ["convert", "--hf-path", str(make()), "--mlx-path", "out"]
    if motion is not None:
        arguments += ["--motion-adapter", str(motion())]
    before = sorted(os.listdir())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mlx-unet3d: error: ")
    assert error.count("\n") == 1 or "\nmissing (" in error
    assert sorted(os.listdir()) == before
