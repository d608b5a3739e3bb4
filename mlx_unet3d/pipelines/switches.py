"""Switches of pipelines: those of their networks, and those that have nothing to do on Apple silicon."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import mlx.core as mx

from ..diffusers_names import AdvisingType, advice_for, answers_diffusers
from .components import Components
from .progress import checked_options

Pipeline = TypeVar("Pipeline", bound="Switches")

_SHARED = "CPU and GPU share memory; see enable_release()"
_FUSED = "attention is fused already"


class Switches(Components, metaclass=AdvisingType):
    """A pipeline with the switches of diffusers; names of diffusers that it lacks say what to write."""

    progress_bar_config: ClassVar[Mapping[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        raise advice_for(type(self), name)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the UNet."""
        self._need("unet")
        return self.unet.dtype

    @property
    def device(self) -> mx.Device:
        """MLX's default device, on which everything is computed."""
        return mx.default_device()

    # Switches of the UNet and the VAE.

    def enable_attention_slicing(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """See `UNet3DConditionModel.set_attention_slice`; it saves where attention is not fused."""
        self._need("unet")
        self.unet.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention at once."""
        self.enable_attention_slicing(None)

    set_attention_slice = enable_attention_slicing

    def enable_vae_slicing(self) -> None:
        """Decode and encode frame by frame; see `AutoencoderKL.enable_slicing`."""
        self._need("vae")
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode and encode some frames at a time."""
        self._need("vae")
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode and encode large frames in tiles, which changes them; see `AutoencoderKL.enable_tiling`."""
        self._need("vae")
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode and encode frames without tiles."""
        self._need("vae")
        self.vae.disable_tiling()

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """See `UNet3DConditionModel.enable_freeu`; for video 0.9, 0.2, 1.2, 1.4."""
        self._need("unet")
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Disable FreeU."""
        self._need("unet")
        self.unet.disable_freeu()

    @answers_diffusers
    def fuse_qkv_projections(self, unet: bool = True) -> None:
        """See `UNet3DConditionModel.fuse_qkv_projections`; `unet=False` does nothing, as in diffusers."""
        self._need("unet")
        if unet:
            self.unet.fuse_qkv_projections()

    @answers_diffusers
    def unfuse_qkv_projections(self, unet: bool = True) -> None:
        """Undo `fuse_qkv_projections`. Raises ValueError where it was not called."""
        self._need("unet")
        if unet:
            self.unet.unfuse_qkv_projections()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of tqdm for the bars of calls, such as `leave=False`.

        `disable` decides where a call's `progress` is None. Raises TypeError for unknown options.
        """
        self.progress_bar_config = checked_options(options)

    # Switches that have nothing to do.

    def to(self: Pipeline, *args: Any, **kwargs: Any) -> Pipeline:
        """Return the pipeline as it is; warn where the device is another than MLX's default device.

        Raises TypeError for a dtype, which is chosen when a pipeline is loaded.
        """
        for value in (*args, *kwargs.values()):
            name = str(value).partition(":")[0]
            if isinstance(value, mx.Dtype) or name.startswith("torch.") or kwargs.get("dtype") is value:
                raise TypeError(f"to({value}): choose the dtype when loading, from_pretrained(..., dtype=)")
            on_gpu = mx.default_device() == mx.gpu
            if name not in (("mps", "cuda", "gpu") if on_gpu else ("cpu",)):
                self._nothing_to_do("to", "MLX computes on its default device, mx.set_default_device")
        return self

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Do nothing but warn; `enable_release` is the one that saves memory here."""
        self._nothing_to_do("enable_model_cpu_offload", _SHARED)

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Do nothing but warn; `enable_release` is the one that saves memory here."""
        self._nothing_to_do("enable_sequential_cpu_offload", _SHARED)

    def enable_group_offload(self, *_: Any, **__: Any) -> None:
        """Do nothing but warn; `enable_release` is the one that saves memory here."""
        self._nothing_to_do("enable_group_offload", _SHARED)

    def enable_xformers_memory_efficient_attention(self, *_: Any, **__: Any) -> None:
        """Do nothing but warn: attention is fused already."""
        self._nothing_to_do("enable_xformers_memory_efficient_attention", _FUSED)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing but warn: attention is fused always."""
        self._nothing_to_do("disable_xformers_memory_efficient_attention", _FUSED)

    def set_use_memory_efficient_attention_xformers(self, *_: Any, **__: Any) -> None:
        """Do nothing but warn: attention is fused already."""
        self._nothing_to_do("set_use_memory_efficient_attention_xformers", _FUSED)

    def set_lora_device(self, *_: Any, **__: Any) -> None:
        """Do nothing but warn: memory is shared by CPU and GPU here."""
        self._nothing_to_do("set_lora_device", "CPU and GPU share memory")

    def _nothing_to_do(self, name: str, why: str) -> None:
        warnings.warn(f"{name} does nothing in mlx_unet3d: {why}", stacklevel=3)
