"""Adapters of a network: loading, combining, fusing and saving LoRA; Custom Diffusion."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..atomic import whole_file
from ..checkpoints.adapter_keys import LayerLoRA, components_of, flat, is_list, parse_lora
from ..checkpoints.adapters import AdapterFile, read_adapter
from ..checkpoints.config import blame
from ..checkpoints.headers import write_safetensors
from ..checkpoints.hub import Hub, takes_hub
from ..checkpoints.layouts import to_diffusers
from ..errors import CheckpointError
from ..layers.adapted import (
    ADAPTABLE,
    CHANGEABLE,
    AdaptedLayer,
    Branch,
    LowRank,
    layout_of,
    replace_module,
    walk,
)
from ..layers.attention import Attention
from ..layers.attention_adapters import CustomDiffusionAttnProcessor2_0
from ..scalars import as_finite, as_python
from .adapter_changes import change_of, is_change_of
from .adapter_lists import layers_of_list


class LoRAMixin:
    """LoRA for a network; the names of the methods are those of diffusers' `PeftAdapterMixin`."""

    lora_component: ClassVar[str]
    """The name of this network in files: "unet" or "text_encoder"."""

    @takes_hub
    def load_lora_adapter(
        self,
        source: str | Path | Mapping[str, mx.array] | AdapterFile,
        adapter_name: str = "default",
        *,
        weight: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
        hub: Hub,
    ) -> int:
        """Put a LoRA beside the layers that it is for; returns the number of layers.

        Several can be loaded, each under its own name; what they add is summed. In files for more than one
        network, the parts for others are passed over.

        Args:
            source: a safetensors file or torch pickle, a folder or hub id that holds one, or arrays in
                torch's layout by key. The spellings of diffusers, PEFT, kohya and Text-To-Video-Finetuning
                are known, see `checkpoints.adapters`.
            weight: factor of the change; any number, 1 for as it was trained.
            weight_name: the file's name in the folder.
            subfolder: the folder of the file inside a folder or hub id.
            revision, local_files_only, token, cache_dir, hub: see `checkpoints.Hub`.

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
        weight = as_finite(f"the weight of {adapter_name}", weight)
        file = read_adapter(source, weight_name=weight_name, subfolder=subfolder, hub=hub)
        layers, made, dtype = self._adaptable(CHANGEABLE), self.lora_changes(file), self.dtype
        for path, low_rank in made.items():
            layer = layers[path]
            if not isinstance(layer, AdaptedLayer):
                layer = AdaptedLayer(layer)
                replace_module(self, path, layer)
            layer.branches[adapter_name] = Branch(low_rank, weight, dtype).eval()
            mx.eval(layer.branches[adapter_name].parameters())
        return len(made)

    def lora_changes(self, file: AdapterFile, *, weights: bool = True) -> dict[str, LowRank]:
        """Return what a file adds to each layer that it is for, by path; arguments and errors as above.

        `weights=False` is for a network whose own weights are not there: CheckpointError for a parameter that
        the file holds in full, as its change is the difference from them.
        """
        layers = self._adaptable(CHANGEABLE)
        with blame(file.name):
            parsed = self._parse(file, layers)
            if not parsed:
                raise CheckpointError(
                    f"{file.name} has nothing for the {self.lora_component}: none of its {len(file.tensors)} "
                    "tensors names a layer of it"
                )
            full = [entry for entry in parsed.values() if entry.weight is not None or entry.bias is not None]
            if full and not weights:
                raise CheckpointError(
                    f"{file.name} holds parameters in full ({full[0].shown()}), which a conversion cannot "
                    "add; load it with the model, by --lora of generate"
                )
            made = {
                path: change_of(file, self.lora_component, path, entry, layers[path])
                for path, entry in parsed.items()
            }
        return {path: low_rank for path, low_rank in made.items() if low_rank is not None}

    def list_adapters(self) -> dict[str, float]:
        """Return the adapters and their weights."""
        return {name: b.amount for layer in self._adapted().values() for name, b in layer.branches.items()}

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use these adapters with these weights, one for all or one each, and no other.

        Raises ValueError for unknown names, another number of weights, or fused adapters.
        """
        chosen = chosen_weights(adapter_names, weights)
        self._refuse_fused("change weights")
        self._check_names(list(chosen))
        for layer in self._adapted().values():
            for name, branch in layer.branches.items():
                branch.amount = chosen.get(name, 0.0)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; ValueError for unknown names, or while they are fused."""
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
                layer.fuse(as_finite("lora_scale", lora_scale))
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
            if low_rank.bias is not None:
                tensors[f"{name}.lora_B.bias"] = low_rank.bias
            alphas[path] = low_rank.scaling * rank
        settings = {f"{self.lora_component}.alpha_pattern": alphas}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
        return write_adapter(
            Path(folder), weight_name or "pytorch_lora_weights.safetensors", tensors, metadata
        )

    def _adapted(self) -> dict[str, AdaptedLayer]:
        return {path: m for path, m in self.named_modules() if isinstance(m, AdaptedLayer)}

    def _adaptable(self, kinds: tuple[type[nn.Module], ...] = ADAPTABLE) -> dict[str, nn.Module]:
        """List the layers of these kinds, adapted ones included, by path in the order of registration."""
        found: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for path, module in walk(self):
            if inside and path.startswith(inside):
                continue
            if isinstance(module, AdaptedLayer):
                inside += (f"{path}.",)
            base = module.base if isinstance(module, AdaptedLayer) else module
            if isinstance(base, kinds):
                found[path] = module
        return found

    def other_layer_names(self, paths: Collection[str]) -> dict[str, str]:
        """Return other names that files have for the layers at `paths`, and the path of each."""
        return {}

    def _parse(self, file: AdapterFile, layers: Mapping[str, nn.Module]) -> dict[str, LayerLoRA]:
        """Return the entries of a file for the layers, by path; see `parse_lora` for the errors."""
        if is_list(file):
            return self._parse_list(file)
        names = {flat(path.removesuffix(".0")): path for path in layers if path.endswith("to_out.0")}
        names |= {flat(name): path for name, path in self.other_layer_names(layers).items()}
        return parse_lora(file, self.lora_component, names | {flat(path): path for path in layers})

    def layers_of_list(self, file: AdapterFile) -> dict[tuple[str, ...], str]:
        """Find the lists of layers that a file without names can be for, and the classes of each.

        There are none where the file is named after the other network, as trainers do: 300_text_encoder.pt.
        """
        stem = "" if file.path is None else file.path.stem
        other = "text_encoder" if self.lora_component == "unet" else "unet"
        if stem.endswith(other):
            return {}
        return layers_of_list(self, self._adaptable(), list(file.tensors.values()), is_change_of)

    def _parse_list(self, file: AdapterFile) -> dict[str, LayerLoRA]:
        found = self.layers_of_list(file)
        count = len(file.tensors)
        if not found:
            raise CheckpointError(
                f"{file.name} is a list of {count} tensors without names, which must be an up and a down of "
                f"each layer of the {self.lora_component}, here {len(self._adaptable())}, or of those inside "
                "modules of some classes; no set of classes has layers of these shapes in this order, so it "
                "is for another network, or cut short"
            )
        if len(found) > 1:
            raise CheckpointError(
                f"{file.name} is a list of {count} tensors without names, which can be for the layers in "
                f"{' or in '.join(list(found.values())[:4])}; give a file with names"
            )
        (paths,) = found
        arrays = iter(file.tensors.values())
        return {path: LayerLoRA(up=next(arrays), down=next(arrays)) for path in paths}

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.list_adapters()
        missing = [name for name in names if name not in known]
        if missing:
            there = ", ".join(known) if known else "none"
            raise ValueError(f"there is no adapter {missing[0]!r}; there are: {there}")

    def _refuse_fused(self, what: str) -> None:
        if any(layer.fused for layer in self._adapted().values()):
            raise ValueError(f"adapters are fused; call unfuse_lora before you {what}")


def networks_of(file: AdapterFile, networks: Mapping[str, LoRAMixin]) -> list[str]:
    """Choose the networks of a pipeline that a file is for.

    Keys name them. A list without names is for the one network whose layers it fits; of several, for the one
    that the file is named after. CheckpointError where it fits none, or names a network that is not there.
    """
    if not is_list(file):
        wanted = sorted(components_of(file), reverse=True)
        unknown = [name for name in wanted if name not in networks]
        if unknown:
            raise CheckpointError(
                f"{file.name} has layers of a {unknown[0]}, which this pipeline does not have; it is for "
                "another kind of model"
            )
        return wanted
    fitting = [name for name, network in networks.items() if network.layers_of_list(file)]
    if len(fitting) > 1 and file.path is not None:
        fitting = [name for name in fitting if file.path.stem.endswith(name)] or fitting
    if len(fitting) != 1:
        raise CheckpointError(
            f"{file.name} is a list of {len(file.tensors)} tensors without names, which fits the layers of "
            f"{' and of '.join(fitting) or 'no network of this pipeline'}; load it into one network by its "
            "load_lora_adapter, or give a file with names"
        )
    return fitting


def chosen_weights(
    adapter_names: str | Sequence[str], weights: float | Sequence[float] = 1.0
) -> dict[str, float]:
    """Return the weight of each name; one weight serves all. ValueError for another number of them."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    weights = as_python(weights)
    amounts = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
    if len(amounts) != len(names):
        raise ValueError(f"there are {len(names)} adapter names and {len(amounts)} weights")
    return {
        name: as_finite(f"the weight of {name}", amount) for name, amount in zip(names, amounts, strict=True)
    }


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
    """Make processors for all attention layers, with the weights that a file of Custom Diffusion has.

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
