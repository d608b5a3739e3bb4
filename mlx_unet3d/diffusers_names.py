"""Names of diffusers that are called otherwise here, mean nothing here, or need another call.

`answers_diffusers` reads the tables of arguments, `AdvisingType` and `advice_for` that of attributes.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

RENAMED: dict[str, dict[str, str]] = {
    "from_pretrained": {"torch_dtype": "dtype", "pretrained_model_name_or_path": "path_or_id"},
    "from_pipe": {"pipeline": "pipe"},
    "save_pretrained": {"save_directory": "folder"},
    "load_ip_adapter": {"pretrained_model_name_or_path_or_dict": "source"},
    "load_lora_weights": {"pretrained_model_name_or_path_or_dict": "source"},
    "load_textual_inversion": {"pretrained_model_name_or_path": "source"},
}
"""Arguments by method, with their names here."""

USELESS: dict[str, dict[str, str]] = {
    "from_pretrained": {
        "device_map": "MLX computes on its default device",
        "low_cpu_mem_usage": "tensors are read one at a time anyhow",
        "requires_safety_checker": "videos are not checked",
        "safety_checker": "videos are not checked",
        "use_safetensors": "safetensors are all that is read",
    },
    "load_ip_adapter": {"low_cpu_mem_usage": "tensors are read one at a time anyhow"},
    "load_lora_weights": {"low_cpu_mem_usage": "tensors are read one at a time anyhow"},
    "save_pretrained": {"safe_serialization": "safetensors are all that is written"},
}
"""Arguments by method that change nothing, with the reason; they warn."""

_ON_ITS_OWN = "save the networks one by one: pipe.unet.save_pretrained(folder, {}), and so on"
_CHOSEN = "set_adapters(names) first chooses the adapters that are fused"

ADVICE: dict[str, dict[str, str]] = {
    "__init__": {
        "motion_adapter": "give from_pretrained(base_model, motion_adapter=...), or to the constructor "
        "unet=UNetMotionModel.from_unet2d(base_model, motion_adapter, subfolder='unet')",
    },
    "__call__": {"latents": "a video may be given as latents: video=latents (B, C, F, h, w), as mx.array"},
    "encode_prompt": {
        "device": "leave it out, MLX computes on its default device",
        "do_classifier_free_guidance": "give guidance_scale, 1 for no guidance",
        "num_images_per_prompt": "give num_videos_per_prompt to the call",
        "num_videos_per_prompt": "give num_videos_per_prompt to the call",
    },
    "from_pretrained": {
        "custom_pipeline": "there are the pipelines of this package alone",
        "custom_revision": "there are the pipelines of this package alone",
        "force_download": "delete the model from the hub's cache, `hf cache rm`, to download it again",
        "output_loading_info": "a load that does not fit raises an error that lists the keys",
        "proxies": "set HTTPS_PROXY in the environment",
        "quantization_config": "quantize by `mlx-unet3d convert -q`, or pipe.unet.quantize()",
        "use_onnx": "there are networks of MLX alone",
    },
    "fuse_lora": {
        "adapter_names": _CHOSEN,
        "components": "pipe.unet.fuse_lora() fuses those of one network",
        "safe_fusing": "leave it out, and call unfuse_lora() if a video is not finite",
    },
    "fuse_qkv_projections": {"vae": "leave it out, those of the VAE stay apart"},
    "load_lora_weights": {"hotswap": "delete_adapters(name), then load the other one"},
    "save_pretrained": {
        "max_shard_size": _ON_ITS_OWN.format("max_shard_size='2GB'"),
        "push_to_hub": "`mlx-unet3d convert --upload-repo OWNER/NAME` sends a model to the hub",
        "use_flashpack": "leave it out, safetensors are all that is written",
        "variant": _ON_ITS_OWN.format("variant='fp16'"),
    },
    "unfuse_lora": {"components": "pipe.unet.unfuse_lora() takes those of one network out"},
    "unfuse_qkv_projections": {"vae": "leave it out, those of the VAE stay apart"},
    "export_to_video": {
        "bitrate": "leave it out; .mp4 is written in constant quality",
        "macro_block_size": "leave it out; sizes stay as they are, up to an odd row or column",
        "quality": "leave it out; .mp4 is written without visible loss",
    },
}
"""Arguments by method that are not here, with what to write; they raise TypeError."""

_SHARED = "there is nothing to undo, as CPU and GPU share memory; enable_release() saves memory"
_OF_A_CALL = "give it to a call; a pipeline keeps no state of a run"
_CONFIGS = "each part has a config, pipe.unet.config; save_pretrained writes model_index.json"
_PREPARED = "steps(...) does it; latents= begins with your own"
_ADAPTERS = "get_list_adapters() lists adapters, set_adapters(names, weights) chooses them"

ATTRIBUTES: dict[str, str] = {
    "check_inputs": "a call checks its arguments before it begins",
    "clip_skip": _OF_A_CALL,
    "config": _CONFIGS,
    "config_name": _CONFIGS,
    "cross_attention_kwargs": _OF_A_CALL,
    "decode_latents": "write decode(latents), which returns frames (B, F, H, W, 3) in [0, 1]",
    "denoising_end": _OF_A_CALL,
    "disable_lora": "write set_adapters([]), and set_adapters(names, weights) to go back",
    "do_classifier_free_guidance": _OF_A_CALL,
    "download": "from_pretrained downloads; or use huggingface_hub.snapshot_download(hub_id)",
    "enable_free_noise_split_inference": "write unet.enable_frame_chunking(frames) and "
    "unet.enable_pixel_chunking(pixels)",
    "enable_lora": "write set_adapters(names, weights)",
    "enable_lora_hotswap": "write delete_adapters(name), then load_lora_weights",
    "encode_image": "write encode_ip_adapter_image(image)",
    "encode_video": _PREPARED,
    "extract_init_dict": _CONFIGS,
    "from_config": _CONFIGS,
    "from_single_file": "write `mlx-unet3d convert --hf-path FILE --mlx-path FOLDER`, then "
    "from_pretrained(FOLDER)",
    "fused_loras": _ADAPTERS,
    "get_config_dict": _CONFIGS,
    "get_guidance_scale_embedding": "a call computes it",
    "get_timesteps": _PREPARED,
    "guidance_rescale": _OF_A_CALL,
    "has_compatibles": _CONFIGS,
    "hf_device_map": _SHARED,
    "ignore_for_config": _CONFIGS,
    "interrupt": "loop over steps(...), and leave the loop to stop",
    "load_config": _CONFIGS,
    "load_lora_into_text_encoder": "write load_lora_weights(source)",
    "load_lora_into_unet": "write load_lora_weights(source), or unet.load_lora_adapter(source)",
    "lora_scale": _ADAPTERS,
    "lora_state_dict": "load_lora_weights reads the file; mx.load(file) returns its arrays",
    "maybe_convert_prompt": "a call writes out learned tokens of several vectors",
    "maybe_free_model_hooks": _SHARED,
    "model_cpu_offload_seq": _SHARED,
    "name_or_path": "keep the path that from_pretrained was given",
    "num_fused_loras": _ADAPTERS,
    "num_timesteps": "the records of steps(...) have it as `total`",
    "numpy_to_pil": "give output_type='pil' to a call",
    "pack_weights": "write unet.save_lora_adapter(folder, name)",
    "parameters": "each network has its own, unet.parameters()",
    "prepare_extra_step_kwargs": _PREPARED,
    "prepare_image_latents": _PREPARED,
    "prepare_ip_adapter_image_embeds": "write encode_ip_adapter_image(image)",
    "prepare_latents": _PREPARED,
    "progress_bar": "a call shows progress by itself, and steps(...) can be looped over by tqdm",
    "push_to_hub": "`mlx-unet3d convert --upload-repo OWNER/NAME` sends a model to the hub",
    "register_for_auto_class": "there are the pipelines of this package alone",
    "register_modules": "write from_pipe(pipe, unet=...)",
    "register_to_config": _CONFIGS,
    "remove_all_hooks": _SHARED,
    "reset_device_map": _SHARED,
    "save_config": _CONFIGS,
    "save_lora_weights": "write unet.save_lora_adapter(folder, name)",
    "text_encoder_name": _ADAPTERS,
    "to_json_file": _CONFIGS,
    "to_json_string": _CONFIGS,
    "unet_name": _ADAPTERS,
    "unload_textual_inversion": "load the pipeline again, without the learned token",
    "upcast_vae": "the VAE is float32 already, unless from_pretrained(..., vae_dtype=...) says otherwise",
    "write_lora_layers": "write unet.save_lora_adapter(folder, name)",
}
"""Attributes of pipelines that are not here, with what to write; they raise AttributeError."""

_READ = "give the path of a picture to a call, or write mlx_unet3d.media.read_image(path)"
_FLAT = (
    "images are made by image models; write AnimateDiffPipeline.from_pretrained(model, motion_adapter=...)"
)

NAMES: dict[str, str] = {
    "AutoPipelineForText2Image": _FLAT,
    "CLIPImageProcessorPil": "write CLIPImageProcessor",
    "StableDiffusionPipeline": _FLAT,
    "StableDiffusionXLPipeline": _FLAT,
    "UNet2DConditionModel": "write UNetMotionModel.from_unet2d(model, motion_adapter, subfolder='unet')",
    "load_image": _READ,
    "load_video": "write mlx_unet3d.media.read_video(path), which returns frames and frames a second",
}
"""Names of diffusers' top level that are not here, with what to write."""


def answers_diffusers(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a method take the arguments of diffusers' method of its name, or say what to write.

    See `RENAMED`, `USELESS`, which warn, and `ADVICE`, which raise TypeError; the method's own arguments go
    before them.
    """
    name = "from_pretrained" if function.__name__ == "load_pipeline" else function.__name__
    renamed, useless, advice = (table.get(name, {}) for table in (RENAMED, USELESS, ADVICE))
    own = inspect.signature(function).parameters.keys()
    foreign = (renamed.keys() | useless.keys() | advice.keys()) - own

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        for other in kwargs.keys() & foreign:
            if other in advice:
                raise TypeError(f"{name} takes no {other}: {advice[other]}")
            value = kwargs.pop(other)
            if other in useless:
                warnings.warn(f"{other} does nothing in mlx_unet3d: {useless[other]}", stacklevel=2)
            elif renamed[other] in kwargs:
                raise TypeError(f"{name} takes {renamed[other]} or {other}, its other name, not both")
            else:
                kwargs[renamed[other]] = value
        return function(*args, **kwargs)

    return call


def advice_for(owner: type, name: str) -> AttributeError:
    """Return the error of an attribute that a pipeline class does not have, with what to write."""
    known = ATTRIBUTES.get(name)
    if known is None:
        return AttributeError(f"{owner.__name__!r} object has no attribute {name!r}")
    return AttributeError(f"{owner.__name__} has no {name}: {known}")


class AdvisingType(type):
    """The type of classes whose missing attributes say what to write, see `ATTRIBUTES`."""

    def __getattr__(cls, name: str) -> Any:
        raise advice_for(cls, name)


def instead(name: str) -> str:
    """Return what to write for a name of diffusers' top level, with a colon before it; "" for any other."""
    if name in NAMES:
        return f": {NAMES[name]}"
    if name.endswith("Scheduler"):
        from .schedulers import REFUSED, Scheduler

        known = ", ".join(sorted(Scheduler.classes))
        return f": write {REFUSED[name]}, the nearest" if name in REFUSED else f": there are {known}"
    return ""
