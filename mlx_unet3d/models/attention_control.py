"""Control of a network's attention layers: processors, slices, padding, fused projections, files.

Names and meanings are those of diffusers' UNets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.adapters import is_custom_diffusion, read_adapter
from ..checkpoints.hub import Hub, takes_hub
from ..layers.adapted import walk
from ..layers.attention import Attention
from ..layers.attention_adapters import (
    LoRAAttnProcessor,
    LoRAAttnProcessor2_0,
    LoRAXFormersAttnProcessor,
    lora_processor,
)
from ..layers.attention_processors import (
    PADDINGS,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    Processor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    processor_path,
)
from ..layers.image_attention import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from ..scalars import as_python
from .adapters import LoRAMixin, custom_diffusion_processors, write_adapter


@dataclass(frozen=True)
class _Frozen:
    """Keeps processors out of the parameter tree, which would include a plain dict."""

    processors: dict[str, Processor]


class AttentionControl(LoRAMixin):
    """A mixin for networks whose modules include `Attention`; put it before `PretrainedModel`."""

    processors_before_fusion: _Frozen | None = None

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Compute attention in slices of batch * heads, to save memory; the result stays the same.

        Replaces the processors. A slice is half the heads of a layer for "auto", one head for "max", or as
        many as an integer or a list (one a layer, in the order of `attn_processors`) says; None restores
        fused attention. Raises ValueError for sizes below 1 or above the number of heads, or a list of
        another length.
        """
        layers = list(self._attentions().values())
        slice_size = as_python(slice_size)
        if slice_size is None:
            self.set_attn_processor(AttnProcessor2_0())
            return
        if slice_size == "auto":
            sizes = [max(layer.heads // 2, 1) for layer in layers]
        elif slice_size == "max":
            sizes = [1] * len(layers)
        elif isinstance(slice_size, int) and not isinstance(slice_size, bool):
            sizes = [slice_size] * len(layers)
        elif isinstance(slice_size, list | tuple):
            sizes = [as_python(size) for size in slice_size]
        else:
            raise TypeError(
                f"slice_size={slice_size!r} must be 'auto', 'max', an integer, a list of integers or None"
            )
        if len(sizes) != len(layers):
            raise ValueError(
                f"You have provided {len(sizes)}, but this network has {len(layers)} different attention "
                f"layers. Make sure to match `len(slice_size)` to be {len(layers)}."
            )
        processors = []
        for layer, size in zip(layers, sizes, strict=True):
            if isinstance(size, int) and size > layer.heads:
                raise ValueError(f"size {size} has to be smaller or equal to {layer.heads}.")
            processors.append(SlicedAttnProcessor(size))
        for layer, processor in zip(layers, processors, strict=True):
            layer.set_processor(processor)

    def set_attention_padding(self, padding: str) -> None:
        """Pad attention heads with zeros to a width that has a fused kernel on a Mac's GPU.

        The result stays the same up to rounding. Kernels exist for 64, 72, 80, 96 and 128 channels a head.
        For others, such as the 40 of Stable Diffusion 1, all scores are written to memory: 8.6 GB for a layer
        of AnimateDiff at 512x512 and 16 frames.

        Args:
            padding: "auto", the default, pads where a query attends to more than 256 keys, and never on a
                CPU; "always" pads wherever a wider kernel exists, on a CPU too; "never".

        Heads of more than 128 channels have no wider kernel and stay as they are. Only processors with MLX's
        fused attention pad. Raises ValueError for another value.
        """
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r} is not known; use {', '.join(map(repr, PADDINGS))}")
        for layer in self._attentions().values():
            layer.padding = padding

    def _attentions(self) -> dict[str, Attention]:
        """Return the attention layers by path, in the order of diffusers' registration."""
        return {path: module for path, module in walk(self) if isinstance(module, Attention)}

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """The processors by path of the attention layer plus ".processor"; LoRA processors where their layers
        are set, as in diffusers 0.23."""
        found = {}
        for path, attn in self._attentions().items():
            lora = lora_processor(attn)
            found[processor_path(path)] = attn.get_processor() if lora is None else lora
        return found

    def set_attn_processor(
        self, processor: Processor | Mapping[str, Processor], _remove_lora: bool = False
    ) -> None:
        """Set one processor everywhere, or one a layer from a dict keyed like `attn_processors`.

        The layers of LoRA processors become the adapter "processors"; `_remove_lora=True` drops earlier ones.
        The dict is not changed. Raises ValueError for a dict of another length or a processor that does not
        suit its layer, and KeyError for a missing key; nothing is changed then.
        """
        layers = {processor_path(p): a for p, a in self._attentions().items()}
        if isinstance(processor, Mapping) and not isinstance(processor, nn.Module):
            if len(processor) != len(layers):
                raise ValueError(
                    f"A dict of processors was passed, but the number of processors {len(processor)} does "
                    f"not match the number of attention layers: {len(layers)}. Please make sure to pass "
                    f"{len(layers)} processor classes."
                )
            missing = [key for key in layers if key not in processor]
            if missing:
                raise KeyError(f"the dict of processors has none for {missing[0]!r}")
            chosen = {key: processor[key] for key in layers}
        else:
            chosen = dict.fromkeys(layers, processor)
        for key, layer in layers.items():
            layer.check_processor(chosen[key], _remove_lora)
        for key, layer in layers.items():
            layer.set_processor(chosen[key], _remove_lora=_remove_lora)

    def set_default_attn_processor(self) -> None:
        """Set the explicit `AttnProcessor` everywhere, without LoRA. Raises ValueError where the attention
        layers need the processor that is set, such as Custom Diffusion's."""
        standard = {
            AttnProcessor,
            AttnProcessor2_0,
            FusedAttnProcessor2_0,
            LoRAAttnProcessor,
            LoRAAttnProcessor2_0,
            LoRAXFormersAttnProcessor,
            SlicedAttnProcessor,
            XFormersAttnProcessor,
            IPAdapterAttnProcessor,
            IPAdapterAttnProcessor2_0,
            IPAdapterXFormersAttnProcessor,
        }
        for processor in self.attn_processors.values():
            if type(processor) not in standard:
                raise ValueError(
                    "Cannot call `set_default_attn_processor` when attention processors are of type "
                    f"{type(processor).__name__}; call `set_attn_processor` instead"
                )
        self.set_attn_processor(AttnProcessor(), _remove_lora=True)

    @takes_hub
    def load_attn_procs(
        self,
        source: str | Path | Mapping[str, mx.array],
        *,
        weight_name: str | None = None,
        adapter_name: str = "default",
        subfolder: str | None = None,
        hub: Hub,
    ) -> None:
        """Load a LoRA (see `load_lora_adapter`), or the processors of Custom Diffusion.

        Raises as `load_lora_adapter`.
        """
        file = read_adapter(source, weight_name=weight_name, subfolder=subfolder, hub=hub)
        if not is_custom_diffusion(file):
            self.load_lora_adapter(file, adapter_name)
            return
        processors = custom_diffusion_processors(file, self._attentions())
        self.set_attn_processor(processors)

    def save_attn_procs(self, folder: str | Path, *, weight_name: str | None = None) -> Path:
        """Write the weights of LoRA or Custom Diffusion processors under diffusers' names and return the
        file's path.

        `save_lora_adapter` writes adapters from `load_lora_adapter`. Raises ValueError where no processor has
        weights, or processors of both kinds are set.
        """
        found = {
            k: p
            for k, p in self.attn_processors.items()
            if isinstance(p, nn.Module) and not isinstance(p, IPAdapterAttnProcessor)
        }
        tensors = {
            f"{key}.{name}": array for key, p in found.items() for name, array in tree_flatten(p.parameters())
        }
        custom = {"custom_diffusion" in name for name in tensors}
        if len(custom) != 1:
            state = "of two kinds" if tensors else "without weights"
            raise ValueError(f"the attention processors are {state}; set LoRA or Custom Diffusion processors")
        kind = "custom_diffusion" if custom.pop() else "lora"
        name = weight_name or f"pytorch_{kind}_weights.safetensors"
        return write_adapter(Path(folder), name, tensors, {"format": "pt"})

    def fuse_qkv_projections(self) -> None:
        """Compute query, key and value in one matrix product (key and value in cross-attention)."""
        if self.processors_before_fusion is not None:
            return
        bases = {key: getattr(p, "base", p) for key, p in self.attn_processors.items()}  # below IP-Adapters
        self.processors_before_fusion = _Frozen(bases)
        for layer in self._attentions().values():
            layer.fuse_projections()
        self.set_attn_processor(FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`. Raises ValueError where it was not called."""
        if self.processors_before_fusion is None:
            raise ValueError("unfuse_qkv_projections: call fuse_qkv_projections first")
        for layer in self._attentions().values():
            layer.unfuse_projections()
        self.set_attn_processor(self.processors_before_fusion.processors)
        self.processors_before_fusion = None

    def save_pretrained(self, folder: str | Path, **options: Any) -> list[Path]:
        """See `PretrainedModel.save_pretrained`. Raises ValueError while projections are fused, or while
        adapters or processors with weights are set, which the network's checkpoint cannot hold."""
        if self.processors_before_fusion is not None:
            raise ValueError("the projections are fused; call unfuse_qkv_projections before saving")
        processors = {type(a.get_processor()) for a in self._attentions().values()}
        weighty = sorted(kind.__name__ for kind in processors if issubclass(kind, nn.Module))
        if weighty:
            raise ValueError(
                f"adapters are set ({', '.join(weighty)}) and would be lost; remove them before saving: "
                "set_attn_processor(AttnProcessor2_0())"
            )
        return super().save_pretrained(folder, **options)
