"""LoRA that brings a layer of its own: T2V-Turbo's, with a projection of the guidance scale.

T2V-Turbo (Li et al. 2024, arXiv:2405.18750) changes every layer of a UNet to which it first adds
`time_embedding.cond_proj`. Its `unet_lora.pt` is a list of up, down, up, down, ... without names, in the
order of registration, the added layer among them. Its own program starts that layer with random numbers,
which no file has; here it starts with zeros, their mean, and is what the file makes of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.adapter_keys import entry_of, is_list
from ..checkpoints.adapters import AdapterFile, read_adapter
from ..checkpoints.hub import Hub, takes_hub
from ..layers.adapted import AdaptedLayer
from ..layers.embeddings import NARROWEST
from .adapters import LoRAMixin

_ADDED, _BEFORE = "time_embedding.cond_proj", "time_embedding.linear_1"
"""The added layer, and the one that it is registered after."""


class AddedCondition(LoRAMixin):
    """A UNet that LoRA can give the projection of a guidance scale."""

    _condition_is_added = False

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
        """See `LoRAMixin.load_lora_adapter`. A file with the projection of a guidance scale, such as
        T2V-Turbo's list, also sets `time_cond_proj_dim` in the config, until it is deleted."""
        file = read_adapter(source, weight_name=weight_name, subfolder=subfolder, hub=hub)
        dim = self.missing_condition(file)
        if dim is not None:
            self.add_condition(dim)
        try:
            return super().load_lora_adapter(file, adapter_name, weight=weight)
        except BaseException:
            if dim is not None:
                self._remove_condition()
            raise

    def layers_of_list(self, file: AdapterFile) -> dict[tuple[str, ...], str]:
        """See `LoRAMixin.layers_of_list`; of a list that brings a layer, with that layer."""
        dim = self.missing_condition(file)
        if dim is None:
            return super().layers_of_list(file)
        self.add_condition(dim)
        try:
            return super().layers_of_list(file)
        finally:
            self._remove_condition()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """See `LoRAMixin.delete_adapters`."""
        super().delete_adapters(adapter_names)
        if self._condition_is_added and not isinstance(self.time_embedding.cond_proj, AdaptedLayer):
            self._remove_condition()

    def unload_lora(self) -> None:
        """See `LoRAMixin.unload_lora`."""
        stays = self._condition_is_added and self.time_embedding.cond_proj.fused
        super().unload_lora()
        if stays:
            self._condition_is_added = False  # for good, with what was fused into it
        elif self._condition_is_added:
            self._remove_condition()

    def missing_condition(self, file: AdapterFile) -> int | None:
        """Return the columns of the projection that a file brings and the UNet lacks; None for others."""
        if self.config.time_cond_proj_dim is not None:
            return None
        rows = self.config.block_out_channels[0]
        if not is_list(file):
            found = entry_of(file, _ADDED)
            array = next((found[role] for role in ("down", "weight", "change") if role in found), None)
            fits = array is not None and array.ndim == 2 and array.shape[1] >= NARROWEST
            return array.shape[1] if fits else None
        arrays, layers = list(file.tensors.values()), list(self._adaptable())
        if len(arrays) != 2 * (len(layers) + 1):
            return None
        place = 2 * (layers.index(_BEFORE) + 1)
        up, down = arrays[place : place + 2]
        fits = up.ndim == down.ndim == 2 and up.shape == (rows, down.shape[0])
        return down.shape[1] if fits and down.shape[1] >= NARROWEST else None

    def add_condition(self, dim: int) -> None:
        """Give the UNet a projection of `dim` columns, all zeros, until the adapter for it is deleted."""
        embedding, rows = self.time_embedding, self.config.block_out_channels[0]
        last = embedding.pop("linear_2")
        embedding.cond_proj = nn.Linear(dim, rows, bias=False)
        embedding.cond_proj.weight = mx.zeros((rows, dim), self.dtype)
        embedding.linear_2 = last  # behind it, in torch's order of registration
        self.config = replace(self.config, time_cond_proj_dim=dim)
        self._condition_is_added = True

    def _remove_condition(self) -> None:
        del self.time_embedding["cond_proj"]
        self.config = replace(self.config, time_cond_proj_dim=None)
        self._condition_is_added = False
