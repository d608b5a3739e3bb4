"""Adapters of a network: loading, combining, fusing and saving LoRA; Custom Diffusion."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..atomic import whole_file
from ..checkpoints.adapters import (
    AdapterFile,
    LayerLoRA,
    parse_lora,
    read_adapter,
    scaling_of,
)
from ..checkpoints.config import naming
from ..checkpoints.headers import write_safetensors
from ..checkpoints.layouts import to_diffusers, to_mlx
from ..errors import CheckpointError
from ..layers.adapted import (
    ADAPTABLE,
    AdaptedLayer,
    Branch,
    LowRank,
    layout_of,
    replace_module,
    walk,
    weight_shape,
)
from ..layers.attention import Attention
from ..layers.attention_adapters import CustomDiffusionAttnProcessor2_0


class LoRAMixin:
    """LoRA for a network; the names of the methods are those of diffusers' `PeftAdapterMixin`."""

    lora_component: ClassVar[str]
    """What files call this network: "unet" or "text_encoder"."""

    def load_lora_adapter(
        self,
        source: str | Path | Mapping[str, mx.array] | AdapterFile,
        adapter_name: str = "default",
        *,
        weight: float = 1.0,
        weight_name: str | None = None,
        **hub: Any,
    ) -> int:
        """Put a LoRA beside the layers that it is for; returns the number of layers.

        Several can be loaded, each under its own name; what they add is summed. In files for more than one
        network, the parts for others are passed over.

        Args:
            source: a safetensors file or torch pickle, a folder or hub id that holds one, or arrays in
                torch's layout by key. The spellings of diffusers, PEFT, kohya and Text-To-Video-Finetuning
                are known, see `checkpoints.adapters`.
            weight: how much of it is used; any number, 1 for as it was trained.
            weight_name: the file's name in the folder.
            hub: `revision`, `subfolder`, `local_files_only`, `token`, `cache_dir`.

        Raises:
            ValueError: the name is taken, or adapters are fused.
            FileNotFoundError: there is no file.
            CheckpointError: it is damaged, fits none of the layers or only some, or is not a LoRA. Nothing is
                changed then.
        """
        if adapter_name in self.list_adapters():
            raise ValueError(
                f"there is an adapter {adapter_name!r}; delete it, or choose another adapter_name"
            )
        self._refuse_fused("load another adapter")
        weight = _number(adapter_name, weight)
        file = read_adapter(source, weight_name=weight_name, **hub)
        layers = self._adaptable()
        with naming(file.name):
            parsed = parse_lora(file, self.lora_component, layers)
            if not parsed:
                raise CheckpointError(
                    f"{file.name} has nothing for the {self.lora_component}: none of its {len(file.tensors)} "
                    "tensors names a layer of it"
                )
            made = {
                path: _low_rank(file, self.lora_component, path, entry, layers[path])
                for path, entry in parsed.items()
            }
        dtype = self.dtype
        for path, low_rank in made.items():
            layer = layers[path]
            if not isinstance(layer, AdaptedLayer):
                layer = AdaptedLayer(layer)
                replace_module(self, path, layer)
            layer.branches[adapter_name] = Branch(low_rank, weight, dtype).eval()
            mx.eval(layer.branches[adapter_name].parameters())
        return len(made)

    def list_adapters(self) -> dict[str, float]:
        """The adapters and their weights."""
        return {name: b.amount for layer in self._adapted().values() for name, b in layer.branches.items()}

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use these adapters with these weights, one for all or one each, and no other.

        Raises ValueError for names that there are not, another number of weights, or fused adapters.
        """
        chosen = chosen_weights(adapter_names, weights)
        self._refuse_fused("change weights")
        self._check_names(list(chosen))
        for layer in self._adapted().values():
            for name, branch in layer.branches.items():
                branch.amount = chosen.get(name, 0.0)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; ValueError for names that there are not, or while they are fused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        self._refuse_fused("delete one")
        for path, layer in self._adapted().items():
            for name in names:
                layer.branches.pop(name, None)
            if not layer.branches:
                replace_module(self, path, layer.base)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add all adapters, times `lora_scale`, to the weights, so that they cost no time.

        `unfuse_lora` brings back the original weights, which are kept until then or until `unload_lora`.
        Raises ValueError where there are none, they are fused already, or weights are quantized.
        """
        layers = self._adapted()
        if not layers:
            raise ValueError("there is no adapter to fuse; load one with load_lora_adapter")
        self._refuse_fused("fuse again")
        try:
            for layer in layers.values():
                layer.fuse(_number("lora_scale", lora_scale))
        except ValueError:
            self.unfuse_lora()
            raise

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, bit for bit."""
        for layer in self._adapted().values():
            layer.unfuse()

    def unload_lora(self) -> None:
        """Remove all adapters; fused ones stay in the weights for good."""
        for path, layer in self._adapted().items():
            replace_module(self, path, layer.base)

    def save_lora_adapter(
        self, folder: str | Path, adapter_name: str = "default", *, weight_name: str | None = None
    ) -> Path:
        """Write an adapter as diffusers does, with PEFT's names; returns the file.

        `weight_name` is "pytorch_lora_weights.safetensors" by default. ValueError for an unknown name.
        """
        self._check_names([adapter_name])
        tensors: dict[str, mx.array] = {}
        alphas: dict[str, float] = {}
        for path, layer in sorted(self._adapted().items()):
            if adapter_name not in layer.branches:
                continue
            low_rank = layer.branches[adapter_name].low_rank()
            if low_rank.up is None:
                raise ValueError(
                    f"{path} of {adapter_name!r} is no low-rank change and cannot be saved as LoRA"
                )
            layout, rank = layout_of(layer.base), low_rank.down.shape[0]
            name = f"{self.lora_component}.{path}"
            ones = (1,) * (to_diffusers(layout, low_rank.down).ndim - 2)
            tensors[f"{name}.lora_A.weight"] = to_diffusers(layout, low_rank.down)
            tensors[f"{name}.lora_B.weight"] = low_rank.up.reshape(*low_rank.up.shape, *ones)
            alphas[path] = low_rank.scaling * rank
        settings = {f"{self.lora_component}.alpha_pattern": alphas}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
        return write_adapter(
            Path(folder), weight_name or "pytorch_lora_weights.safetensors", tensors, metadata
        )

    def _adapted(self) -> dict[str, AdaptedLayer]:
        return {path: m for path, m in self.named_modules() if isinstance(m, AdaptedLayer)}

    def _adaptable(self) -> dict[str, nn.Module]:
        adapted = self._adapted()
        inside = tuple(f"{path}." for path in adapted)
        layers = {path: m for path, m in walk(self) if isinstance(m, (*ADAPTABLE, AdaptedLayer))}
        return {path: m for path, m in layers.items() if not path.startswith(inside)}

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.list_adapters()
        missing = [name for name in names if name not in known]
        if missing:
            there = ", ".join(known) if known else "none"
            raise ValueError(f"there is no adapter {missing[0]!r}; there are: {there}")

    def _refuse_fused(self, what: str) -> None:
        if any(layer.fused for layer in self._adapted().values()):
            raise ValueError(f"adapters are fused; call unfuse_lora before you {what}")


def chosen_weights(
    adapter_names: str | Sequence[str], weights: float | Sequence[float] = 1.0
) -> dict[str, float]:
    """The weight of each name; one weight serves all. ValueError for another number of them."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    amounts = [weights] * len(names) if isinstance(weights, (int, float)) else list(weights)
    if len(amounts) != len(names):
        raise ValueError(f"there are {len(names)} adapter names and {len(amounts)} weights")
    return {name: _number(name, amount) for name, amount in zip(names, amounts, strict=True)}


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"the weight of {what} is {value!r}; it must be a finite number")
    return float(value)


def _low_rank(file: AdapterFile, component: str, path: str, entry: LayerLoRA, layer: nn.Module) -> LowRank:
    """The arrays of a file in MLX's layout, held against the layer."""
    base = layer.base if isinstance(layer, AdaptedLayer) else layer
    shape, layout = weight_shape(base), layout_of(base)
    down, up = entry.down, entry.up
    if entry.stable:
        change = _stable_lora(down, up, shape, layout)
        low_rank = change if isinstance(change, LowRank) else None
    elif down.ndim < 2 or up.ndim < 2:
        low_rank = None
    else:
        rank = down.shape[0]
        try:
            turned = to_mlx(layout, down) if down.ndim > 2 else down
            flat = up.reshape(up.shape[0], -1)  # (O, R, 1, 1): a 1x1 convolution
        except ValueError:
            turned, flat = down, up
        fits = (rank, *shape[1:]) == turned.shape and flat.shape == (shape[0], rank) and rank > 0
        low_rank = LowRank(turned, flat, scaling_of(file, component, path, entry, rank)) if fits else None
    if low_rank is None:
        raise CheckpointError(
            f"{file.name}: {path} is {shape} here; down {tuple(entry.down.shape)} and up "
            f"{tuple(entry.up.shape)} do not fit it. The adapter is for another network"
        )
    return low_rank


def _stable_lora(down: mx.array, up: mx.array, shape: tuple[int, ...], layout: str) -> LowRank | None:
    """loralib's layout: of a convolution with kernel k, (R k, I k) and (O k, R k), whose product is read in
    the memory order of the weight; over frames, the average over a second k. None where it does not fit."""
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        return None
    if layout == "linear":
        return LowRank(down, up) if (up.shape[0], down.shape[1]) == shape else None
    out, height, width, channels = shape
    if (up.shape[0], down.shape[1]) != (out * height, channels * height):
        return None
    product = up.astype(mx.float32) @ down.astype(mx.float32)
    change = product.reshape(out, channels, height, height)
    if layout == "conv3d_temporal":
        change = change.mean(axis=-1, keepdims=True)
    elif height != width:
        return None
    return LowRank(mx.contiguous(change.transpose(0, 2, 3, 1)), None)


def write_adapter(
    folder: Path, name: str, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file, whole or not at all, into a folder, made if need be; returns the file."""
    if not name.endswith(".safetensors"):
        raise ValueError(f"weight_name={name!r} must end in .safetensors, the only format that is written")
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / name) as part:
        write_safetensors(part, tensors, metadata)
    return folder / name


def custom_diffusion_processors(
    file: AdapterFile, attentions: Mapping[str, Attention]
) -> dict[str, CustomDiffusionAttnProcessor2_0]:
    """Processors for all attention layers, with the weights of a file of Custom Diffusion where it has some.

    Raises CheckpointError for keys of no layer, and shapes that do not fit.
    """
    grouped: dict[str, dict[str, mx.array]] = {path: {} for path in attentions}
    for key, array in file.tensors.items():
        path, _, name = key.removeprefix("unet.").partition(".processor.")
        if path not in grouped or "custom_diffusion" not in name:
            raise CheckpointError(
                f"{file.name}: {key[:200]!r} is no Custom Diffusion of a layer of this network"
            )
        grouped[path][name] = array
    processors = {}
    for path, weights in grouped.items():
        attn = attentions[path]
        processor = CustomDiffusionAttnProcessor2_0(
            train_kv="to_k_custom_diffusion.weight" in weights,
            train_q_out="to_q_custom_diffusion.weight" in weights,
            hidden_size=attn.query_dim,
            cross_attention_dim=attn.cross_attention_dim if attn.is_cross_attention else None,
            out_bias="to_out_custom_diffusion.0.bias" in weights,
        )
        wanted = {name: array.shape for name, array in tree_flatten(processor.parameters())}
        if wanted != {name: array.shape for name, array in weights.items()}:
            raise CheckpointError(
                f"{file.name}: {path} has {', '.join(sorted(weights))} of other shapes than this network, or "
                "lacks some; it is for another network"
            )
        processor.load_weights(list(weights.items()))
        processors[f"{path}.processor"] = processor.eval()
    return processors
