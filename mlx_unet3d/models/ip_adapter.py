"""IP-Adapters of a network: images as prompts, beside the text (arXiv:2308.06721).

Names of methods and their meanings are those of diffusers' `IPAdapterMixin`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.hub import Hub, takes_hub
from ..layers.adapted import ADAPTABLE
from ..layers.attention import Attention
from ..layers.attention_processors import AttnProcessor
from ..layers.image_attention import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from ..layers.image_projection import MultiIPAdapterImageProjection
from ..layers.text_context import TextContext
from ..scalars import as_finite
from .ip_adapter_files import IPAdapterSource, find_files, parse_file

_WHERE = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.")


class IPAdapterMixin:
    """IP-Adapters for a video UNet; put it before `VideoUNet`."""

    @takes_hub
    def load_ip_adapter(
        self,
        source: IPAdapterSource | Sequence[IPAdapterSource],
        subfolder: str | Sequence[str | None] | None = None,
        weight_name: str | Sequence[str | None] | None = None,
        *,
        hub: Hub,
    ) -> None:
        """Load one or several IP-Adapters, in place of earlier ones. Each starts with a scale of 1.

        From then on a forward needs `added_cond_kwargs={"image_embeds": [...]}` with one array an adapter.
        Plain adapters take the embeddings (B, images, C) of `CLIPVisionModelWithProjection`; "plus" and
        "full" ones its second to last hidden states (B, images, L, C).

        Args:
            source: a safetensors file or torch pickle, a folder or hub id that holds one, or arrays; or a
                list of these.
            subfolder, weight_name: of the file in the folder or on the hub; or a list.
            hub: how the hub is reached: `revision`, `local_files_only`, `token`, `cache_dir`.

        Raises:
            ValueError: lists of different lengths, a folder without `weight_name`, or processors without
                support for images.
            FileNotFoundError: a file is missing.
            CheckpointError: a file is damaged, is no IP-Adapter or one of an unsupported kind, or is for
                another network. Nothing is changed then.
        """
        files = find_files(source, subfolder, weight_name, hub)
        layers = self._image_attentions()
        for path, attn in layers.items():
            base = _base(attn)
            if not isinstance(base, AttnProcessor):
                raise ValueError(
                    f"{path} has a {type(base).__name__}, which does not support images; call "
                    "set_attn_processor(AttnProcessor2_0()) before load_ip_adapter"
                )
        parsed = [parse_file(file, list(layers.values())) for file in files]
        projections, weights = zip(*parsed, strict=True)
        hidden = MultiIPAdapterImageProjection(projections)
        hidden.set_dtype(self.dtype)
        mx.eval(hidden.parameters())
        for i, attn in enumerate(layers.values()):
            processor = IPAdapterAttnProcessor2_0(
                attn.heads * attn.dim_head, attn.cross_attention_dim, [4] * len(files)
            )
            for k, pairs in enumerate(weights):
                key, value = (array.astype(self.dtype) for array in pairs[i])
                processor.to_k_ip[k].weight, processor.to_v_ip[k].weight = key, value
            mx.eval(processor.parameters())
            attn.set_processor(processor.standing_on(_base(attn)).eval())
        self.encoder_hid_proj = hidden.eval()
        self.config.encoder_hid_dim_type = "ip_image_proj"

    def set_ip_adapter_scale(self, scale: float | Mapping[str, Any] | Sequence[Any]) -> None:
        """Set the weight of images: one scale for all adapters, or a list with one each; 0 disables one.

        A scale is a number or, as in diffusers, a dict with scales for some places and 0 for all others:
        {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": 1.0}.

        Raises ValueError for another number of scales, unknown places, and scales that are not numbers;
        nothing is changed then.
        """
        processors = {
            path: attn.processor
            for path, attn in self._image_attentions().items()
            if isinstance(attn.processor, IPAdapterAttnProcessor)
        }
        if not processors:
            raise ValueError("no IP-Adapter is loaded; load one with load_ip_adapter")
        count = self.encoder_hid_proj.num_ip_adapters
        scales = list(scale) if isinstance(scale, list | tuple) else [scale] * count
        if len(scales) != count:
            raise ValueError(f"there are {len(scales)} scales for {count} IP-Adapters; give one for each")
        by_path = [_scales_by_path(one, list(processors)) for one in scales]
        for path, processor in processors.items():
            processor.scale = [scales[path] for scales in by_path]

    def unload_ip_adapter(self) -> None:
        """Remove all IP-Adapters and restore the network without them."""
        for attn in self._image_attentions().values():
            attn.processor = _base(attn)
        self.pop("encoder_hid_proj", None)
        self.config.encoder_hid_dim_type = None

    def embed_context(
        self, encoder_hidden_states: mx.array, image_embeds: mx.array | Sequence[mx.array]
    ) -> TextContext:
        """Combine text states and image tokens into one context, which replaces `encoder_hidden_states` and
        `image_embeds` in all steps.

        Args:
            encoder_hidden_states: (B, L, D), or with a row a frame.
            image_embeds: see `load_ip_adapter`.

        Raises ValueError where no IP-Adapter is loaded.
        """
        self._needs_ip_adapter()
        return TextContext(encoder_hidden_states).with_images(self.encoder_hid_proj, image_embeds)

    def save_pretrained(self, folder: str | Path, **options: Any) -> list[Path]:
        """See `VideoUNet.save_pretrained`. Raises ValueError while an IP-Adapter is loaded, which has its own
        file."""
        self._refuse_ip_adapter("saving")
        return super().save_pretrained(folder, **options)

    def quantize(self, *args: Any, **options: Any) -> Any:
        """See `PretrainedModel.quantize`. Raises ValueError while an IP-Adapter is loaded: load it
        afterwards."""
        self._refuse_ip_adapter("quantizing")
        return super().quantize(*args, **options)

    # Parts of a forward.

    def _take_images(
        self, context: Any, added: Mapping[str, Any] | None, batch: int
    ) -> tuple[Any, Mapping[str, Any] | None]:
        """Return the context and `added_cond_kwargs` of a forward. Move images into the context if it is a
        `TextContext`, which projects them only once."""
        if added is None or added.get("image_embeds") is None:
            return context, added
        images = added["image_embeds"]
        self._needs_ip_adapter()
        self.encoder_hid_proj.check(images, batch)
        if isinstance(context, TextContext):
            context = context.with_images(self.encoder_hid_proj, images)
            added = {name: value for name, value in added.items() if name != "image_embeds"}
        return context, added

    def _beside_images(self, context: Any, added: Mapping[str, Any] | None, batch: int) -> Any:
        """Return the context for the layers: with images if and only if an IP-Adapter is loaded."""
        images = (added or {}).get("image_embeds")
        if images is not None:
            return TextContext(context).with_images(self.encoder_hid_proj, images)
        beside = context.images if isinstance(context, TextContext) else ()
        if beside:
            self._needs_ip_adapter()
        elif "encoder_hid_proj" in self:
            raise ValueError(
                "an IP-Adapter is loaded: give added_cond_kwargs={'image_embeds': [...]} with an array for "
                "each, or call unload_ip_adapter"
            )
        for image in beside:
            if image.states.shape[0] != batch:
                raise ValueError(
                    f"the images of the context have {image.states.shape[0]} rows; they must have one a "
                    f"sample, {batch}"
                )
        return context

    def _needs_ip_adapter(self) -> None:
        if "encoder_hid_proj" not in self:
            raise ValueError(
                "image_embeds are given, but no IP-Adapter is loaded; call load_ip_adapter, or leave them out"
            )

    def _refuse_ip_adapter(self, before: str) -> None:
        if "encoder_hid_proj" in self:
            raise ValueError(f"an IP-Adapter is loaded; before {before}, remove it with unload_ip_adapter")

    # Layers of the network itself, without those of IP-Adapters.

    def _attentions(self) -> dict[str, Attention]:
        return {k: a for k, a in super()._attentions().items() if not k.startswith("encoder_hid_proj.")}

    def _image_attentions(self) -> dict[str, Attention]:
        """Return the layers that attend to text and images, in the order of files."""
        return {path: attn for path, attn in self._attentions().items() if attn.is_cross_attention}

    def _adaptable(self, kinds: tuple[type[nn.Module], ...] = ADAPTABLE) -> dict[str, nn.Module]:
        found = super()._adaptable(kinds).items()
        return {
            path: layer
            for path, layer in found
            if not path.startswith("encoder_hid_proj.") and "_ip." not in path
        }


def _base(attn: Attention) -> Any:
    """Return the processor of a layer without its IP-Adapter."""
    processor = attn.processor
    return processor.base if isinstance(processor, IPAdapterAttnProcessor) else processor


# Scales.


def _scales_by_path(scale: Any, paths: Sequence[str]) -> dict[str, float]:
    """Return the scale of one adapter for each layer."""
    if not isinstance(scale, Mapping):
        return dict.fromkeys(paths, as_finite("the scale of an IP-Adapter", scale))
    places = {path: _WHERE.match(path) for path in paths}
    counts: dict[tuple[str, str | None], int] = {}
    for match in places.values():
        way, level, _, layer = (match[1] or "mid", match[2], match[3], int(match[4]))
        counts[way, level] = max(counts.get((way, level), 0), layer + 1)
    scales: dict[tuple[str, str | None], list[float]] = {place: [0.0] * n for place, n in counts.items()}
    for way, value in scale.items():
        there = [place for place in counts if place[0] == way]
        if isinstance(value, Mapping):
            levels = {f"block_{level}": (way, level) for way, level in there if level is not None}
            unknown = sorted(map(str, value.keys() - levels.keys()))
            given = {levels[name]: part for name, part in value.items() if name in levels}
        else:
            unknown, given = ([] if there else [""]), dict.fromkeys(there, value)
        if unknown:
            known = ", ".join(sorted({f"{w}.block_{lv}" if lv is not None else w for w, lv in counts}))
            raise ValueError(
                f"the scale of an IP-Adapter has no place {f'{way}.{unknown[0]}'.rstrip('.')!r}; there are "
                f"{known}"
            )
        for place, part in given.items():
            numbers = list(part) if isinstance(part, list | tuple) else [part]
            numbers = numbers * counts[place] if len(numbers) == 1 else numbers
            if len(numbers) != counts[place]:
                name = place[0] if place[1] is None else f"{place[0]}.block_{place[1]}"
                raise ValueError(
                    f"{name} has {counts[place]} transformers, and {len(numbers)} scales were given"
                )
            scales[place] = [as_finite("the scale of an IP-Adapter", number) for number in numbers]
    return {path: scales[m[1] or "mid", m[2]][int(m[4])] for path, m in places.items()}
