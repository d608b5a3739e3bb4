"""A pipeline of tiny networks with seeded weights, and its folder, made by this package alone."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_unet3d import (
    AnimateDiffSDXLPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    DDIMScheduler,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    StableVideoDiffusionPipeline,
    TextToVideoPipeline,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from mlx.utils import tree_map_with_path
from mlx_unet3d.layers.adapted import layout_of, weight_shape
from mlx_unet3d.pipelines.components import Recommended

UNET = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=12,
    attention_head_dim=4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=4,
)
VAE = dict(
    block_out_channels=(4, 4, 4, 8),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=2,
    sample_size=32,
)
TEXT = dict(
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_act="gelu",
)
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def randomize(model, seed=0):
    """Seeded weights, with no layer at its neutral start: temporal convolutions begin as the identity."""
    rng = np.random.default_rng(seed)

    def change(path, p):
        if path.endswith("weight") and p.ndim == 1:
            return p  # of a norm: one
        scale = 0.1 if p.ndim == 1 else (p.size // p.shape[0]) ** -0.5
        return mx.array(rng.normal(0, scale, p.shape).astype(np.float32))

    model.update(tree_map_with_path(change, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def write_tokenizer(folder: Path) -> int:
    """A CLIP vocabulary of single characters, padded with "!" (0) as ModelScope's; returns its size."""
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    special["unk_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)


VISION = dict(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
    projection_dim=12,
)
SVD = dict(
    block_out_channels=(32, 32),
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    cross_attention_dim=12,
    num_attention_heads=(2, 2),
    layers_per_block=1,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=12,
    num_frames=3,
)
TEMPORAL_VAE = dict(
    block_out_channels=(32,) * 4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    layers_per_block=1,
)
SVD_SCHEDULER = dict(
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
    timestep_type="continuous",
)


def write_pipeline(folder: Path) -> Path:
    """A pipeline folder in the MLX layout: a copy of the one that is made once a run."""
    return Path(shutil.copytree(_pipeline().name, folder, dirs_exist_ok=True))


MOTION = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    cross_attention_dim=12,
    num_attention_heads=2,
    motion_num_attention_heads=2,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=4,
)


def write_stable_diffusion(folder: Path, motion_adapter: Path) -> Path:
    """A Stable Diffusion folder in the layout of diffusers, and the motion adapter that goes with it."""
    write_pipeline(folder)
    unet = randomize(UNetMotionModel(**MOTION), 0)
    unet.save_motion_modules(motion_adapter, layout="diffusers")
    shutil.rmtree(folder / "unet")
    (file,) = unet.save_pretrained(folder / "unet", layout="diffusers")
    tensors = mx.load(str(file))
    flat = {name: array for name, array in tensors.items() if ".motion_modules." not in name}
    mx.eval(flat)
    mx.save_safetensors(str(file), flat, {"format": "pt"})
    config = {name: value for name, value in MOTION.items() if "motion" not in name and "heads" not in name}
    for name in ("down_block_types", "up_block_types"):
        config[name] = [kind.replace("Motion", "2D") for kind in MOTION[name]]
    config |= {"_class_name": "UNet2DConditionModel", "attention_head_dim": MOTION["num_attention_heads"]}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def unnamed_lora(network, seed=0, size=0.3) -> dict[str, mx.array]:
    """Up and down for each layer of a network, in torch's layout and order: a file without names."""
    rng, made = np.random.default_rng(seed), []
    for layer in network._adaptable().values():
        out, *kernel, channels = weight_shape(layer)
        kernel = [*kernel, 1] if layout_of(layer) == "conv3d_temporal" else kernel
        for shape in ((out, 2, *(1 for _ in kernel)), (2, channels, *kernel)):
            made.append(mx.array((size * rng.normal(size=shape)).astype(np.float32)))
    return {f"{i:04}": array for i, array in enumerate(made)}


def write_stable_diffusion_xl(folder: Path) -> Path:
    """A folder of AnimateDiff on SDXL, whose motion modules are those of `write_stable_diffusion`."""
    base = TextToVideoPipeline.from_pretrained(_pipeline().name)
    words = base.text_encoder.config.vocab_size
    size = dict(addition_time_embed_dim=2, projection_class_embeddings_input_dim=12 + 8)
    config = MOTION | size | {"addition_embed_type": "text_time", "cross_attention_dim": 24}
    pipe = AnimateDiffSDXLPipeline(
        **base.components
        | {
            "unet": randomize(UNetMotionModel(**config), 4),
            "text_encoder_2": randomize(
                CLIPTextModelWithProjection(vocab_size=words, **TEXT, projection_dim=8), 5
            ),
            "tokenizer_2": base.tokenizer,
        }
    )
    pipe.save_pretrained(folder)
    return folder


def write_ip_adapter(folder: Path, name: str) -> Path:
    """A plain IP-Adapter of the network of `write_stable_diffusion`, in a folder with its image encoder."""
    encoder = randomize(CLIPVisionModelWithProjection(**VISION), 3)
    encoder.save_pretrained(folder / "image_encoder")
    width, channels = MOTION["cross_attention_dim"], VISION["projection_dim"]
    rng = np.random.default_rng(6)
    shapes = {
        "image_proj.proj.weight": (4 * width, channels),
        "image_proj.proj.bias": (4 * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    for i, attention in enumerate(UNetMotionModel(**MOTION)._image_attentions().values()):
        for letter in "kv":
            shapes[f"ip_adapter.{2 * i + 1}.to_{letter}_ip.weight"] = (attention.query_dim, width)
    arrays = {key: mx.array(rng.normal(size=shape).astype(np.float32)) for key, shape in shapes.items()}
    mx.save_safetensors(str(folder / name), arrays)
    return folder


def processor() -> CLIPImageProcessor:
    """The image processor of VISION."""
    return CLIPImageProcessor(size=32, crop_size=32)


def write_stable_video(folder: Path) -> Path:
    """A Stable Video Diffusion folder in the MLX layout, whose videos are 3 frames of 32x48."""
    unet = randomize(UNetSpatioTemporalConditionModel(**SVD), 0)
    unet.add_embedding.linear_2.weight *= 20  # so that motion and rate show in pixels
    pipe = StableVideoDiffusionPipeline(
        vae=randomize(AutoencoderKLTemporalDecoder(**TEMPORAL_VAE), 1),
        image_encoder=randomize(CLIPVisionModelWithProjection(**VISION), 2),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SVD_SCHEDULER),
        feature_extractor=processor(),
        recommended=Recommended(height=32, width=48),
    )
    pipe.save_pretrained(folder)
    return folder


def write_i2vgen_xl(folder: Path) -> Path:
    """An I2VGen-XL folder in the MLX layout, whose videos are 3 frames of 32x48."""
    words = write_tokenizer(folder / "tokenizer")
    pipe = I2VGenXLPipeline(
        vae=randomize(AutoencoderKL(**VAE), 1),
        text_encoder=randomize(CLIPTextModel(vocab_size=words, **TEXT), 2),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", subfolder=None),
        image_encoder=randomize(CLIPVisionModelWithProjection(**VISION), 3),
        feature_extractor=processor(),
        unet=randomize(I2VGenXLUNet(**{k: v for k, v in UNET.items() if k != "sample_size"}), 0),
        scheduler=DDIMScheduler(**SCHEDULER),
        recommended=Recommended(num_frames=3, height=32, width=48),
    )
    pipe.save_pretrained(folder)
    return folder


@cache
def _pipeline() -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    words = write_tokenizer(folder / "tokenizer")
    pipe = TextToVideoPipeline(
        unet=randomize(UNet3DConditionModel(**UNET), 0),
        vae=randomize(AutoencoderKL(**VAE), 1),
        text_encoder=randomize(CLIPTextModel(vocab_size=words, **TEXT), 2),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", subfolder=None),
        scheduler=DDIMScheduler(**SCHEDULER),
    )
    pipe.save_pretrained(folder)
    return made
