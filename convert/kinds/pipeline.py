"""Pipelines of original files, which have no index or scheduler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_unet3d.models.pretrained import DIFFUSERS_VERSION


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a UNet.

    Attributes:
        name: diffusers' class.
        networks: the class of each network, by its name in the pipeline.
        scheduler: the content of `scheduler_config.json`.
        tokenizer: True if it has one.
        only: returns True for the UNet configs that it supports; None for all.
        pads_with_zero: True if texts were padded with id 0 in training, as OpenCLIP does.
    """

    name: str
    networks: Mapping[str, str]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bool = True
    only: Callable[[Mapping[str, Any]], bool] | None = None
    pads_with_zero: bool = True

    def index(self) -> dict[str, Any]:
        """Return the content of `model_index.json`."""
        parts = {
            name: ["transformers" if cls.startswith("CLIP") else "diffusers", cls]
            for name, cls in self.networks.items()
        }
        parts["scheduler"] = ["diffusers", self.scheduler["_class_name"]]
        if self.tokenizer:
            parts["tokenizer"] = ["transformers", "CLIPTokenizer"]
        named = {"_class_name": self.name, "_diffusers_version": DIFFUSERS_VERSION}
        return named | dict(sorted(parts.items()))
