"""What `info` says of files and folders; see test_hub for repositories."""

import json
import shutil
from pathlib import Path

import mlx_unet3d
import mlx.core as mx
import numpy as np
import pytest
import test_convert_refusals as made
import tiny
from mlx_unet3d import media
from mlx_unet3d.cli import main
from mlx_unet3d.latents import save_latents


def ones(**shapes):
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def ip_adapter(text, **projection):
    named = {f"image_proj.{name.replace('__', '.')}": shape for name, shape in projection.items()}
    return made.write("ip.bin", ones(**{"ip_adapter.1.to_k_ip.weight": (4, text)}, **named))


def lora(key, shape):
    return made.write("lora.pt", {key: np.ones(shape, np.float32)})


def latents(steps):
    shape = (1, 4, 2, 4, 4)
    settings = dict(prompt="a cat", num_frames=2, height=32, width=32, model="demo", steps=9)
    path = Path("out.gif.latents.safetensors")
    save_latents(path, mx.zeros(shape), settings, [mx.zeros(shape)] * steps)
    return path


def video(suffix):
    metadata = dict(prompt="a cat", steps=9, guidance=7.5, model="demo", seed=0)
    path = f"out{suffix}"
    media.write_video(path, np.zeros((2, 32, 32, 3), np.uint8), fps=8, metadata=metadata)
    return path


def network(cls, **config):
    return made.network(cls(**config))


LORA_OF = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
IP = "generate PROMPT --model MODEL --motion-adapter ADAPTER --ip-adapter ip.bin --ip-image PICTURE"
CASES = {
    "motion module": (
        made.adapter,
        "MotionAdapter, ", "F32", "a motion module of AnimateDiff", "motion_max_seq_length=32",
        "for another model (levels of 32, 64 channels)",
        "DDIMScheduler with beta_schedule='linear'",
        "convert --hf-path STABLE_DIFFUSION --motion-adapter motion --mlx-path FOLDER",
    ),
    "motion module of diffusers": (
        lambda: network(mlx_unet3d.MotionAdapter, block_out_channels=(32, 64), motion_layers_per_block=1),
        "MotionAdapter, ", "generate PROMPT --model STABLE_DIFFUSION --motion-adapter x.safetensors",
    ),
    "base": (
        made.base,
        "UNet2DConditionModel, ", "in_channels=4", "cross_attention_dim=24; assumed attention_head_dim=8",
        "convert --hf-path A_FOLDER_WITH_IT_AND_THE_VAE_TEXT_ENCODER --mlx-path FOLDER "
        "--motion-adapter ADAPTER --tokenizer PIPELINE, then generate PROMPT --model FOLDER",
    ),
    "inpainting": (
        lambda: made.base(in_channels=9), "none here: base is an inpainting model, with 9 input channels",
    ),
    "SVD": (
        lambda: network(mlx_unet3d.UNetSpatioTemporalConditionModel, **tiny.SVD),
        "UNetSpatioTemporalConditionModel, ", "AND_THE_VAE_IMAGE_ENCODER --mlx-path FOLDER, then generate "
        "--model FOLDER --image PICTURE",
    ),
    "VAE": (made.vae, "AutoencoderKL, ", "latent_channels=4", "a part of a pipeline: put it beside the UNet"),
    "text encoder": (made.text, "CLIPTextModel, ", "hidden_size=64", "a part of a pipeline"),
    "motion LoRA": (
        lambda: lora(f"{made.MODULE}.transformer_blocks.0.attn1.to_q_lora.down.weight", (4, 320)),
        "a LoRA of motion modules, 1,280 parameters", "rank 4 in 1 layers",
        "generate PROMPT --model MODEL --motion-adapter ADAPTER --lora lora.pt",
    ),
    "LoRA": (
        lambda: lora(LORA_OF, (16, 768)),
        "a LoRA, ", "rank 16 in 1 layers", "for Stable Diffusion 1.5 (text of 768 channels)",
        "generate PROMPT --model MODEL --lora lora.pt",
    ),
    "LoRA of SDXL": (lambda: lora(LORA_OF, (16, 2048)), "for Stable Diffusion XL (text of 2048 channels)"),
    "IP-Adapter": (
        lambda: ip_adapter(768, proj__weight=(3072, 1024), norm__weight=(768,)),
        "an IP-Adapter, ", "of the kind plain", "for an image encoder of projection_dim=1024",
        "for Stable Diffusion 1.5", IP,
    ),
    "IP-Adapter, plus": (
        lambda: ip_adapter(2048, proj_in__weight=(1280, 1280), latents=(1, 16, 1280)),
        "of the kind plus", "hidden_size=1280", "for Stable Diffusion XL", IP,
    ),
    "IP-Adapter, full face": (
        lambda: ip_adapter(768, proj__0__weight=(1280, 1280), proj__3__weight=(768,)),
        "of the kind full", "for an image encoder of hidden_size=1280", IP,
    ),
    "embedding": (
        lambda: made.write("cat.pt", {"<cat>": np.ones((4, 768), np.float32)}),
        "a textual inversion, ", "4 vectors under the name '<cat>' for Stable Diffusion 1.5",
        "generate PROMPT --model MODEL --embedding cat.pt",
    ),
    "ControlNet": (
        lambda: made.keys("controlnet_cond_embedding.conv_in.weight"), "a ControlNet, 9 parameters",
        "none here: it steers a UNet and is none; give the UNet",
    ),
    "unfinished run": (
        lambda: latents(3), "of a run, 3 steps done, 1x4x2x4x4", "prompt", "a cat",
        "generate --resume out.gif.latents.safetensors",
    ),
    "finished run": (lambda: latents(0), "finished, to be decoded", "decode out.gif.latents.safetensors"),
    **{
        f"video{suffix}": (lambda suffix=suffix: video(suffix), "made by this program", "a cat", "guidance",
                           f"generate --from out{suffix}")
        for suffix in (".gif", ".webp", ".png", "/")
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_files(name, capsys):
    make, *words = CASES[name]
    assert main(["info", str(make())]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for word in words:
        assert word in out
    assert [line.split()[0] for line in out.splitlines()][-1] == "use"


REFUSED = {
    "empty": (lambda: made.content(b""), "x.safetensors is empty"),
    "cut short": (lambda: made.shortened(made.adapter()), "is not a torch file, or a damaged one"),
    "tensors of nobody": (lambda: made.keys("some.weight"), "holds none of the networks"),
    "foreign video": (lambda: media.write_video("x.gif", np.zeros((2, 8, 8, 3), np.uint8)) or "x.gif",
                      "x.gif holds no settings"),
    "video of another program": (
        lambda: media.write_video("x.gif", np.zeros((2, 8, 8, 3), np.uint8), metadata={"a": 1}) or "x.gif",
        "x.gif has no settings of mlx-unet3d in it",
    ),
    "no folder": (lambda: "./nothing", "nothing does not exist; pass an existing folder or a hub id"),
    "no id": (lambda: "nothing", "'nothing' is neither an existing folder nor a hub id"),
    "empty folder": (lambda: Path("x").mkdir() or "x", "x has neither model_index.json (a pipeline)"),
    "latents of others": (
        lambda: mx.save_safetensors("x.safetensors", {"latents": mx.ones(3)}) or "x.safetensors",
        "x.safetensors does not hold latents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name, capsys):
    make, message = REFUSED[name]
    assert main(["info", str(make())]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_folders(capsys):
    def info(path):
        assert main(["info", str(path)]) == 0
        return capsys.readouterr().out

    tiny.write_stable_diffusion(Path("sd"), Path("motion"))
    assert "use               generate PROMPT --model sd --motion-adapter ADAPTER\n" in info("sd")
    assert "generate PROMPT --model STABLE_DIFFUSION --motion-adapter motion\n" in info("motion")
    tiny.write_stable_video(Path("svd"))
    said = info("svd")
    assert "use               generate --model svd --image PICTURE\n" in said
    assert "recommended       height=32, width=48\n" in said
    assert "block_out_channels=32/32, layers_per_block=1, cross_attention_dim=12" in said
    assert "a part of a pipeline; alone convert --hf-path svd/vae" in info("svd/vae")
    index = json.loads(Path("svd/model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    Path("svd/model_index.json").write_text(json.dumps(index))
    assert "none here: there are pipelines for TextToVideoSDPipeline, " in info("svd")
    Path("files").mkdir()
    shutil.rmtree("motion")
    shutil.move(made.adapter(), "files/mm.ckpt")
    assert "--motion-adapter files/mm.ckpt --mlx-path" in info("files")
    for i in range(5):
        shutil.copy("files/mm.ckpt", f"files/{i}.ckpt")
    said = info("files")
    assert "  4.ckpt\n" in said
    assert "info files/FILE says what one of these files holds" in said


def test_a_pipeline_of_pickles(capsys):
    tiny.write_pipeline(Path("x"))
    file = Path("x/unet/diffusion_pytorch_model.safetensors")
    tensors = {name: np.array(array) for name, array in mx.load(str(file)).items()}
    file.unlink()
    made.write("x/unet/diffusion_pytorch_model.bin", tensors)
    assert main(["info", "x"]) == 0
    said = capsys.readouterr().out
    assert "torch pickle (to be converted to safetensors first)" in said
    assert (
        "use               convert --hf-path x --mlx-path FOLDER, as its weights are pickles, then " in said
    )
    assert said.endswith("generate PROMPT --model FOLDER\n")
