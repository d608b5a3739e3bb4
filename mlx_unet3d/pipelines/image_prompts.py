"""Images as prompts: IP-Adapters of a pipeline, from images to the states that its UNet takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import mlx.core as mx

from ..checkpoints import read_component_config
from ..checkpoints.hub import Hub, takes_hub
from ..diffusers_names import answers_diffusers
from ..image_processor import CLIPImageProcessor, Pictures
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.ip_adapter_files import IPAdapterSource, encoders_needed, find_files
from .components import Part
from .embedded_guidance import EmbeddedGuidance

IMAGE_PARTS = {
    "feature_extractor": Part((CLIPImageProcessor,), is_optional=True),
    "image_encoder": Part((CLIPVisionModelWithProjection,), is_optional=True),
}
"""The parts that `ImagePrompts` needs for images, which `load_ip_adapter` adds where they are missing."""


class PromptImages(NamedTuple):
    """Embeddings of images for the UNet: for each IP-Adapter an array of B rows; None without images."""

    positive: list[mx.array] | None = None
    negative: list[mx.array] | None = None


IMAGE_ENCODER = "image_encoder"
Needed = tuple[str, str, int]
_SHARED = f"models/{IMAGE_ENCODER}"


def check_encoder(needed: Sequence[Needed], config: Mapping[str, Any], where: str, cure: str) -> None:
    """Raise ValueError unless an image encoder has the widths that files of IP-Adapters need."""
    for name, key, width in needed:
        if config.get(key) != width:
            raise ValueError(
                f"{name} is for an image encoder of {key}={width}, and {where} has {key}={config.get(key)}; "
                f"{cure}"
            )


def find_encoder(
    source: str | Path,
    subfolder: str | None,
    folder: str,
    needed: Sequence[Needed],
    hub: Hub,
) -> tuple[str | Path, str]:
    """Return folder or hub id, and the folder in it, of the image encoder for files of IP-Adapters.

    Args: see `load_ip_adapter`; `needed` as `encoders_needed` returns it.

    Raises FileNotFoundError where there is none, ValueError where there are only others.
    """
    place = PurePosixPath(folder)
    if len(place.parts) == 1 and subfolder is not None:
        place = subfolder / place
    places: list[tuple[str | Path, str]] = [(source, str(place))]
    if folder == IMAGE_ENCODER:
        places += [(source, _SHARED)] if str(place) != _SHARED else []
        local = Path(source).expanduser()
        places += [(local.resolve().parent, _SHARED)] if local.is_dir() else []
    errors: list[Exception] = []
    for where, inside in places:
        try:
            config = read_component_config(where, "config.json", subfolder=inside, hub=hub)
            check_encoder(needed, config, f"that in {where}/{inside}", "give the one that comes with it")
        except (FileNotFoundError, ValueError) as error:
            errors.append(error)
        else:
            return where, inside
    other = next((error for error in errors if not isinstance(error, FileNotFoundError)), None)
    if other is not None:
        raise other
    name, key, width = needed[0]
    raise FileNotFoundError(
        f"{name} needs an image encoder of {key}={width}, and there is none in {source}/{place}; put the "
        f"folder {IMAGE_ENCODER} that comes with the adapter there ({errors[0]})"
    )


class ImagePrompts(EmbeddedGuidance):
    """A pipeline whose UNet takes IP-Adapters: images as prompts beside the text (arXiv:2308.06721)."""

    @answers_diffusers
    @takes_hub
    def load_ip_adapter(
        self,
        source: IPAdapterSource | Sequence[IPAdapterSource],
        subfolder: str | Sequence[str | None] | None = None,
        weight_name: str | Sequence[str | None] | None = None,
        image_encoder_folder: str | None = IMAGE_ENCODER,
        *,
        hub: Hub,
    ) -> None:
        """Load one IP-Adapter or several into the UNet, and their image encoder where the pipeline has none.

        Args:
            source, subfolder, weight_name: see `UNetMotionModel.load_ip_adapter`.
            image_encoder_folder: where the image encoder of the (first) folder or hub id is: a name in
                `subfolder`, or a path with a slash from the top. None for no image encoder: calls then take
                `ip_adapter_image_embeds` alone. Files and arrays come without. Where the encoder in the
                default folder is missing or of another width, that in the folder `models` is taken, in which
                the authors keep the one that most of their adapters share.
            hub: how the hub is reached: `revision`, `local_files_only`, `token`, `cache_dir`.

        Raises as `UNetMotionModel.load_ip_adapter`, FileNotFoundError where there is no image encoder, and
        ValueError where it has another width than the adapter. Nothing is changed then.
        """
        self._need("unet")
        files = find_files(source, subfolder, weight_name, hub)
        first, within = (x[0] if isinstance(x, list | tuple) else x for x in (source, subfolder))
        encoder = self.image_encoder
        is_folder = isinstance(first, str | Path) and not Path(first).expanduser().is_file()
        needed = encoders_needed(files)
        if image_encoder_folder is None:
            pass
        elif encoder is not None:
            cure = "set image_encoder = None first, and the adapter's own is read"
            check_encoder(needed, encoder.config, "the pipeline's image encoder", cure)
        elif is_folder and needed:
            where, folder = find_encoder(first, within, image_encoder_folder, needed, hub)
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                where, subfolder=folder, dtype=self.unet.dtype, hub=hub
            )
        self.unet.load_ip_adapter(files)
        self.image_encoder = encoder
        if self.feature_extractor is None and encoder is not None:
            size = encoder.config.image_size
            self.feature_extractor = CLIPImageProcessor(size=size, crop_size=size)

    def set_ip_adapter_scale(self, scale: float | Mapping[str, Any] | Sequence[Any]) -> None:
        """Set how much images count; see `UNetMotionModel.set_ip_adapter_scale`."""
        self._need("unet")
        self.unet.set_ip_adapter_scale(scale)

    def unload_ip_adapter(self) -> None:
        """Remove all IP-Adapters; the image encoder stays."""
        self._need("unet")
        self.unet.unload_ip_adapter()

    @answers_diffusers
    def save_pretrained(self, folder: str | Path, *, layout: str = "mlx") -> None:
        """See `Components.save_pretrained`; ValueError while an IP-Adapter is loaded, before anything is
        written."""
        if self._ip_adapters():
            raise ValueError("an IP-Adapter is loaded; before saving, remove it with unload_ip_adapter")
        super().save_pretrained(folder, layout=layout)

    def encode_ip_adapter_image(
        self, image: Pictures | Sequence[Pictures], *, guidance_scale: float | None = None
    ) -> list[mx.array]:
        """Return the embeddings of images, as `ip_adapter_image_embeds` takes them.

        Args:
            image: an image for the IP-Adapter, or a list with one entry for each IP-Adapter: an image, or a
                list of images that it sees together.
            guidance_scale: of the run; at most 1: nothing is guided.

        Returns (2, n, P) for each, n images, first those of no image, for the negative prompt; (1, n, P)
        where nothing is guided. Adapters of the kinds "plus" and "full" take hidden states, (2, n, L, E).
        Raises ValueError where there is no image encoder, and for another number of entries.
        """
        adapters = self._ip_adapters()
        if not adapters:
            raise ValueError("ip_adapter_image: there is no IP-Adapter to look at it; call load_ip_adapter")
        if self.image_encoder is None or self.feature_extractor is None:
            raise ValueError(
                "ip_adapter_image: this pipeline has no image encoder; load one with the IP-Adapter, "
                "load_ip_adapter(folder, image_encoder_folder=...), or give ip_adapter_image_embeds"
            )
        images = list(image) if isinstance(image, list | tuple) else [image]
        if len(images) != len(adapters):
            raise ValueError(
                f"ip_adapter_image has {len(images)} entries for {len(adapters)} IP-Adapters; give one for "
                "each: several images for one IP-Adapter are a list within the list"
            )
        is_guided = self.is_guided(guidance_scale)
        made = []
        for its, adapter in zip(images, adapters, strict=True):
            pixels = self.feature_extractor(its)  # (n, 3, H, W)
            embeds = self._embed(pixels, hidden=bool(adapter.axes))
            rows = [embeds]
            if is_guided:
                nothing = mx.zeros_like
                negative = self._embed(nothing(pixels), hidden=True) if adapter.axes else nothing(embeds)
                rows = [negative, embeds]
            made.append(mx.stack(rows))
        mx.eval(made)
        return made

    def _embed(self, pixels: mx.array, hidden: bool) -> mx.array:
        output = self.image_encoder(pixels, output_hidden_states=hidden)
        return output.hidden_states[-2] if hidden else output.image_embeds

    def _ip_adapters(self) -> list[Any]:
        """The projections of the UNet's IP-Adapters."""
        self._need("unet")
        return self.unet.encoder_hid_proj.image_projection_layers if "encoder_hid_proj" in self.unet else []

    def _image_embeds(self, image: Any, embeds: Any, guidance_scale: float | None) -> list[mx.array] | None:
        """The embeddings of a call, which was given images, embeddings, or neither."""
        if image is not None and embeds is not None:
            raise ValueError("give either ip_adapter_image or ip_adapter_image_embeds, and not both")
        return embeds if image is None else self.encode_ip_adapter_image(image, guidance_scale=guidance_scale)

    def _image_states(self, embeds: Sequence[mx.array] | None, batch: int, is_guided: bool) -> PromptImages:
        """The embeddings of images as rows for a batch; ValueError where they do not fit."""
        adapters = self._ip_adapters()
        if embeds is None:
            if adapters:
                raise ValueError(
                    "an IP-Adapter is loaded: give ip_adapter_image or ip_adapter_image_embeds, or call "
                    "unload_ip_adapter"
                )
            return PromptImages()
        if not isinstance(embeds, list | tuple) or len(embeds) != len(adapters):
            count = len(embeds) if isinstance(embeds, list | tuple) else type(embeds).__name__
            raise ValueError(
                f"ip_adapter_image_embeds must be a list with an array for each of {len(adapters)} "
                f"IP-Adapters, as encode_ip_adapter_image returns it; it is {count}"
            )
        halves = 2 if is_guided else 1
        positive, negative = [], []
        for x in map(mx.array, embeds):
            rows = x.shape[0] // halves
            if x.shape[0] % halves or rows not in (1, batch):
                raise ValueError(
                    f"ip_adapter_image_embeds has an array of {x.shape[0]} rows; it must have {halves}, or "
                    f"{halves * batch}" + (", the negative ones first" if is_guided else "")
                )
            rows = [mx.repeat(half, batch // rows, axis=0) for half in mx.split(x, halves)]
            positive.append(rows[-1])
            negative.append(rows[0])
        return PromptImages(positive, negative if is_guided else None)
