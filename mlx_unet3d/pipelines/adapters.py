"""Adapters of a pipeline with text: LoRAs and textual inversions, for all networks that they are for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.adapters import TEXTUAL_INVERSION_NAMES, AdapterFile, learned_token, read_adapter
from ..checkpoints.hub import Hub, takes_hub
from ..diffusers_names import answers_diffusers
from ..errors import CheckpointError
from ..models.adapters import LoRAMixin, chosen_weights, networks_of
from ..tokenizer import CLIPTokenizer
from .components import Components


class AdapterMethods(Components):
    """A pipeline whose UNet and text encoders take adapters."""

    def _adaptable(self) -> dict[str, LoRAMixin]:
        """The networks that take LoRA, by name; ValueError where one was released."""
        names = [name for name in ("unet", "text_encoder", "text_encoder_2") if name in self.parts]
        self._need(*names)
        return {name: getattr(self, name) for name in names}

    @answers_diffusers
    def load_textual_inversion(
        self,
        source: str | Path | Mapping[str, mx.array] | AdapterFile,
        token: str | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: LoRAMixin | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
    ) -> list[str]:
        """Teach tokenizer and text encoder a learned token; returns its tokens, one a vector.

        A file of SDXL, with vectors "clip_l" and "clip_g", is for both encoders.

        A prompt with the token, such as "a <cat-toy> on a table", then means what was learned; one of several
        vectors is written out by itself.

        Args:
            source: a file of diffusers or the web UI, a folder or hub id that holds one, or arrays by key.
            token: what to call it; None for its own name.
            tokenizer, text_encoder: of the pipeline, the ones to teach; None for the first.
            weight_name: the file's name in the folder, "learned_embeds.safetensors" or ".bin" by default.
            subfolder: of the file, in the folder or on the hub.
            revision, local_files_only, cache_dir: how the hub is reached, see `Hub`.

        Raises:
            ValueError: the token is known, or has to be named.
            CheckpointError: the file is no textual inversion, or one for another text encoder.
        """
        self._need("text_encoder")
        hub = Hub(revision, local_files_only, cache_dir=cache_dir)
        names = TEXTUAL_INVERSION_NAMES
        file = read_adapter(source, weight_name=weight_name, names=names, subfolder=subfolder, hub=hub)
        if file.tensors.keys() == {"clip_l", "clip_g"}:
            pairs = [
                (replace(file, tensors={"emb_params": file.tensors[key]}), self._encoder_of(name))
                for key, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))
            ]
        else:
            pairs = [(file, (tokenizer or self.tokenizer, text_encoder or self.text_encoder))]
        learned = [(*learned_token(its, token), *encoder) for its, encoder in pairs]
        for name, embeddings, _, encoder in learned:
            width = encoder.config.hidden_size
            if embeddings.shape[1] != width:
                raise CheckpointError(
                    f"{file.name}: {name!r} has {embeddings.shape[1]} channels, this text encoder {width}; "
                    "it is for another model"
                )
        for name, embeddings, words, encoder in learned:
            names = [name, *(f"{name}_{i}" for i in range(1, len(embeddings)))]
            encoder.set_token_embeddings(words.add_tokens(names), embeddings)
        return names

    def _encoder_of(self, name: str) -> tuple[CLIPTokenizer, Any]:
        """A text encoder and its tokenizer; CheckpointError where the pipeline has none of that name."""
        if name not in self.parts:
            raise CheckpointError(
                "the embedding is for SDXL's two text encoders, and this pipeline has one; it is for another "
                "model"
            )
        self._need(name)
        return getattr(self, name.replace("text_encoder", "tokenizer")), getattr(self, name)

    @answers_diffusers
    @takes_hub
    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, mx.array] | AdapterFile,
        adapter_name: str = "default",
        *,
        weight: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
        hub: Hub,
    ) -> dict[str, int]:
        """Load a LoRA for the UNet, text encoders, or both; returns the number of layers of each.

        See `UNet3DConditionModel.load_lora_adapter` for the arguments and errors; single networks have the
        other methods for adapters too.
        """
        file = read_adapter(source, weight_name=weight_name, subfolder=subfolder, hub=hub)
        networks = self._adaptable()
        loaded: dict[str, int] = {}
        try:
            for name in networks_of(file, networks):
                loaded[name] = networks[name].load_lora_adapter(file, adapter_name, weight=weight)
        except (ValueError, CheckpointError):
            for name in loaded:
                networks[name].delete_adapters(adapter_name)
            raise
        return loaded

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use these adapters with these weights, and no other; see `UNet3DConditionModel.set_adapters`.

        `[]` uses none, until they are set again.
        """
        networks = self._adaptable().values()
        chosen = chosen_weights(adapter_names, adapter_weights)
        self._check_adapters(chosen)
        for network in networks:
            own = network.list_adapters()
            if own:
                its = {name: weight for name, weight in chosen.items() if name in own}
                network.set_adapters(list(its), list(its.values()))

    def _check_adapters(self, names: Iterable[str]) -> None:
        known = {name: None for its in self.get_list_adapters().values() for name in its}
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"there is no adapter {missing[0]!r}; there are: {', '.join(known) or 'none'}")

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of adapters of each network that has some."""
        lists = {name: list(network.list_adapters()) for name, network in self._adaptable().items()}
        return {name: adapters for name, adapters in lists.items() if adapters}

    def get_active_adapters(self) -> list[str]:
        """Return the names of adapters whose weight is not 0, in any network."""
        weights = [network.list_adapters() for network in self._adaptable().values()]
        return list({name: None for its in weights for name, weight in its.items() if weight})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters from all networks; ValueError for unknown names, or while they are fused."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_adapters(names)
        for network in self._adaptable().values():
            its = network.list_adapters()
            network.delete_adapters([name for name in names if name in its])

    @answers_diffusers
    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Make adapters part of the weights; see `UNet3DConditionModel.fuse_lora`."""
        adapted = [network for network in self._adaptable().values() if network.list_adapters()]
        if not adapted:
            raise ValueError("there is no adapter to fuse; load one with load_lora_weights")
        for network in adapted:
            network.fuse_lora(lora_scale)

    @answers_diffusers
    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`."""
        for network in self._adaptable().values():
            network.unfuse_lora()

    def unload_lora_weights(self) -> None:
        """Remove all adapters; fused ones stay in the weights for good."""
        for network in self._adaptable().values():
            network.unload_lora()
