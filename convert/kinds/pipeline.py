"""Pipelines of original files, which have no index or scheduler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx_unet3d
from mlx_unet3d.models.pretrained import DIFFUSERS_VERSION

Config = Mapping[str, Any]
TOKENIZERS = ("tokenizer", "tokenizer_2")
FEATURE_EXTRACTOR = "feature_extractor"


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a UNet.

    Attributes:
        name: diffusers' class.
        networks: the class of each network, by its name in the pipeline.
        scheduler: the content of `scheduler_config.json`.
        tokenizers: their names, and whether texts were padded with id 0 in training, as OpenCLIP does, or
            else with the end of a text.
        feature_extractor: whether it has an image processor.
        only: which configs of the UNet it is for; None for all.
        recommend: the use to recommend, see `Recommended`, by the config of the UNet and its name.
    """

    name: str
    networks: Mapping[str, str]
    scheduler: Config = field(default_factory=dict)
    tokenizers: Mapping[str, bool] = field(default_factory=lambda: {"tokenizer": True})
    feature_extractor: bool = False
    only: Callable[[Config], bool] | None = None
    recommend: Callable[[Config, str], dict[str, Any]] = lambda config, name: {}

    def index(self) -> dict[str, Any]:
        """Return the content of `model_index.json`."""
        parts = {
            name: ["transformers" if cls.startswith("CLIP") else "diffusers", cls]
            for name, cls in self.networks.items()
        }
        parts["scheduler"] = ["diffusers", self.scheduler["_class_name"]]
        parts |= {name: ["transformers", "CLIPTokenizer"] for name in self.tokenizers}
        if self.feature_extractor:
            parts[FEATURE_EXTRACTOR] = ["transformers", "CLIPImageProcessor"]
        named = {"_class_name": self.name, "_diffusers_version": DIFFUSERS_VERSION}
        return named | dict(sorted(parts.items()))

    def image_processor(self) -> dict[str, Any] | None:
        """The content of `preprocessor_config.json`, CLIP's; None without a feature extractor."""
        return mlx_unet3d.CLIPImageProcessor().to_dict() if self.feature_extractor else None
