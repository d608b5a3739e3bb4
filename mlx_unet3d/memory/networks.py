"""The networks of a pipeline as far as a plan needs them: configs and shapes, never weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints import Hub, find_folder, read_component_config, takes_hub
from ..checkpoints.config import ModelConfig, blame
from ..checkpoints.quantization import from_config, quantizations, quantize_layers
from ..checkpoints.source import find_file, pinned
from ..errors import CheckpointError
from ..layers.quantized import Quantization, can_quantize
from ..models.autoencoder_kl import AutoencoderKL
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from ..models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.loading import find_checkpoint
from ..models.motion_adapter import STEM, MotionAdapterConfig, adapter_config, motion_config
from ..models.pretrained import PretrainedModel
from ..models.unet_motion import UNetMotionModel
from ..recommended import Recommended
from .families import FAMILIES, Family
from .tracing import Graph, trace


@dataclass(frozen=True)
class Network:
    """A network that may not be loaded.

    Attributes:
        kind: its class.
        config: of the network.
        quantization: how layers are quantized, by path.
        adapters: bytes of what is loaded beside the weights, such as LoRAs.
    """

    kind: type[PretrainedModel]
    config: ModelConfig
    quantization: dict[str, Quantization] = field(default_factory=dict)
    adapters: int = 0

    @classmethod
    def of(cls, model: PretrainedModel) -> "Network":
        """Return the network of a loaded model."""
        bare = cls(type(model), model.config, quantizations(model))
        loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        return replace(bare, adapters=max(loaded - bare.nbytes(model.dtype), 0))

    def skeleton(self) -> PretrainedModel:
        """The network with weights that nobody has computed."""
        model = self.kind.from_config(self.config)
        quantize_layers(model, self.quantization)
        return model.eval()

    def nbytes(self, dtype: mx.Dtype) -> int:
        """Bytes of the weights, in `dtype` where they are not quantized, and of the adapters."""
        return self.adapters + sum(array.nbytes for _, array in _parameters(self.skeleton(), dtype))

    def trace(
        self,
        fn: Callable[..., mx.array | Sequence[mx.array]],
        arguments: Sequence[mx.array],
        dtype: mx.Dtype,
        gpu: bool,
    ) -> Graph:
        """The graph of `fn(model, *arguments)`."""
        model = self.skeleton()
        names, arrays = zip(*_parameters(model, dtype), strict=True)

        def run(*inputs: mx.array) -> mx.array | Sequence[mx.array]:
            model.update(tree_unflatten(list(zip(names, inputs[: len(names)], strict=True))))
            return fn(model, *inputs[len(names) :])

        return trace(run, [*arrays, *arguments], gpu)


def _parameters(model: PretrainedModel, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """Names and stand-ins of the parameters, which are never computed."""
    return [
        (name, mx.zeros(a.shape, dtype if mx.issubdtype(a.dtype, mx.floating) else a.dtype))
        for name, a in tree_flatten(model.parameters())
    ]


@dataclass(frozen=True)
class Networks:
    """The networks of a pipeline, those of its family, and the number of frames of its own where known."""

    unet: Network
    vae: Network
    text_encoder: Network | None = None
    num_frames: int | None = None
    text_encoder_2: Network | None = None
    image_encoder: Network | None = None

    @classmethod
    def of(cls, pipe: Any) -> "Networks":
        """Return the networks of a loaded pipeline, none of which was released."""
        parts = {name: getattr(pipe, name, None) for name in _KINDS}
        networks = {name: Network.of(part) for name, part in parts.items() if part is not None}
        return cls(**networks, num_frames=pipe.recommended.num_frames)

    @property
    def spatial_factor(self) -> int:
        """Pixels of an image for one of the latents, each way."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def family(self) -> Family:
        """The family of the UNet."""
        return FAMILIES[self.unet.kind]

    @property
    def embeds_guidance(self) -> bool:
        """True if the UNet takes the guidance scale as an embedding, and runs once a step at any scale."""
        plain_motion = self.unet.kind is UNetMotionModel and self.text_encoder_2 is None  # as in diffusers
        return self.unet.config.get("time_cond_proj_dim") is not None and not plain_motion

    @property
    def text_encoders(self) -> tuple[Network, ...]:
        """The networks that encode the prompt."""
        return tuple(n for n in (self.text_encoder, self.text_encoder_2) if n is not None)

    @property
    def default_frames(self) -> int:
        """Frames of a video where nothing else is said."""
        return self.num_frames or self.family.default_frames(self.unet.config)

    @property
    def default_size(self) -> tuple[int, int] | None:
        """Height and width of a video in pixels where nothing else is said; None where unknown."""
        size = self.unet.config.sample_size
        if self.family.size is not None or size is None:
            return self.family.size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * self.spatial_factor, width * self.spatial_factor


_KINDS: dict[str, tuple[type[PretrainedModel], ...]] = {
    "unet": tuple(FAMILIES),
    "vae": (AutoencoderKL, AutoencoderKLTemporalDecoder),
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModelWithProjection,),
    "image_encoder": (CLIPVisionModelWithProjection,),
}


@takes_hub
def read_networks(path_or_id: str | Path, *, motion_adapter: str | Path | None = None, hub: Hub) -> Networks:
    """The networks of a pipeline folder, a hub id, or "demo"; of the hub, configs alone are downloaded.

    A 2-D UNet beside a `motion_adapter` is planned as the network of both. Of a quantized network, all layers
    that can be are taken for quantized, as the recipes "mixed" and "uniform" have it.

    Args:
        path_or_id: the pipeline.
        motion_adapter: folder, hub id or file of motion modules, in place of the folder's own. Of a hub id
            the config alone is read, of a file the header; a file on the hub is downloaded.
        revision, local_files_only, token, cache_dir, hub: see `Hub`.

    Raises FileNotFoundError, PermissionError, ConnectionError: see `find_folder`; CheckpointError, also for a
    motion adapter that does not go with the UNet.
    """
    folder = find_folder(path_or_id, files=("model_index.json",), hub=hub)
    hub = pinned(hub, path_or_id, folder)
    index = read_component_config(path_or_id, "model_index.json", hub=hub)

    def config_of(name: str) -> dict[str, Any]:
        return read_component_config(path_or_id, "config.json", subfolder=name, hub=hub)

    config = config_of("unet")
    name = config.get("_class_name")
    if motion_adapter is not None and name not in ("UNet2DConditionModel", "UNetMotionModel"):
        raise CheckpointError(f"{path_or_id} has a {name}, into which no motion adapter goes; leave it out")
    if name == "UNet2DConditionModel" and (motion_adapter is not None or _lists(index, "motion_adapter")):
        with blame(folder / "motion_adapter" / "config.json" if motion_adapter is None else motion_adapter):
            found = (
                config_of("motion_adapter")
                if motion_adapter is None
                else _adapter_config(motion_adapter, replace(hub, revision=None))
            )
            adapter = MotionAdapterConfig.from_dict({k: v for k, v in found.items() if k != "quantization"})
            config = motion_config(UNetMotionModel, config, adapter) | {"_class_name": "UNetMotionModel"}
    elif name == "UNet2DConditionModel":
        raise CheckpointError(
            f"{path_or_id} makes images; it needs motion modules: give motion_adapter=, on the "
            "command line --motion-adapter"
        )
    networks = {"unet": _network("unet", config, folder)}
    family = FAMILIES[networks["unet"].kind]
    optional = (name for name in family.optional if _lists(index, name))
    encoders = (name for name in family.encoders if index.get(name) != [None, None])
    for name in ("vae", *encoders, *optional):
        networks[name] = _network(name, config_of(name), folder)
    recommended = Recommended.of_index(index, folder / "model_index.json")
    return Networks(**networks, num_frames=recommended.num_frames)


def _adapter_config(path_or_id: str | Path, hub: Hub) -> dict[str, Any]:
    """The config of a motion adapter: that of its folder, or inferred from the header of a lone file."""
    if find_file(path_or_id, hub=hub) is None:
        return read_component_config(path_or_id, "config.json", hub=hub)
    return adapter_config(find_checkpoint(path_or_id, STEM, files=True, hub=hub))


def _lists(index: dict[str, Any], name: str) -> bool:
    """Return True if a `model_index.json` has a component of that name."""
    entry = index.get(name)
    return isinstance(entry, list) and None not in entry


def _network(name: str, config: dict[str, Any], folder: Path) -> Network:
    """A component from its config."""
    kinds, source = _KINDS[name], str(folder / name / "config.json")
    found = config.get("_class_name")
    kind = next((k for k in kinds if found in (k.class_names or (k.__name__,))), kinds[0])
    kind.check_class_name(config, source)
    entry = config.pop("quantization", None)
    with blame(source):
        network = Network(kind, kind.config_class.from_dict(config))
    if entry is None:
        return network
    common, own = from_config(entry, source)
    layers = {p: m for p, m in network.skeleton().named_modules() if can_quantize(m)}
    chosen = {path: own.get(path, common) for path in layers}
    chosen = {p: q for p, q in chosen.items() if q.applies_to(tuple(layers[p].weight.shape))}
    return Network(kind, network.config, chosen)
