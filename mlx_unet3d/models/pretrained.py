"""The base of all networks: made from a config, loaded from and saved to checkpoint folders."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.config import ModelConfig, blame
from ..checkpoints.hub import Hub, takes_hub
from ..checkpoints.layouts import parameter_layouts, to_diffusers
from ..checkpoints.matching import Expected
from ..checkpoints.quantization import choose, choose_as, quantizations, quantize_layers, to_config
from ..checkpoints.source import read_component_config
from ..checkpoints.storage import checksum, parse_size, write_component
from ..diffusers_names import answers_diffusers
from ..dtypes import as_dtype
from ..errors import CheckpointError
from ..layers.adapted import AdaptedLayer
from ..layers.quantized import Quantization, QuantizedLayer
from .loading import (
    Checkpoint,
    Source,
    common_dtype,
    find_checkpoint,
    matched,
    read_parameters,
)

Model = TypeVar("Model", bound="PretrainedModel")

DIFFUSERS_VERSION = "0.42.1"
"""The version of the config format that is written."""

CONSTANTS = frozenset({"pe"})
"""Names of arrays that are made by a formula: files hold them, and need not; they are no parameters."""

_QUANTIZED = (QuantizedLayer, nn.QuantizedLinear, nn.QuantizedEmbedding)


class PretrainedModel(nn.Module):
    """A network with a config; diffusers' `ModelMixin` and `ConfigMixin`.

    A subclass sets `config_class`, whose fields are its arguments, and builds its modules of `self.config`,
    which this `__init__` makes and checks. Its parameters are named as in diffusers' files, apart from those
    that `rename_key` renames.
    """

    config_class: ClassVar[type[ModelConfig]]
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    class_names: ClassVar[tuple[str, ...]] = ()
    """The `_class_name`s that it reads, its own name where empty; the first is written."""

    config: ModelConfig
    weights_checksum: str | None = None
    """Fingerprint of the files that it was loaded from, see `checksum`; None if there are none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in vars(cls):
            cls.__signature__ = inspect.signature(cls.config_class)
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{cls.config_class.documentation()}"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if hasattr(type(self), "config_class"):
            self.config = self.config_class(*args, **kwargs)

    @classmethod
    def rename_key(cls, key: str, keys: Collection[str]) -> str | None:
        """Parameter name of the `key` of a file that has `keys`; None drops the tensor.

        The hook for legacy names. A parameter name must come back unchanged, so that renaming
        twice is renaming once.
        """
        return key

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any], **overrides: Any) -> Model:
        """Make an untrained model; `overrides` replace values of the config.

        Raises:
            CheckpointError: the config is that of another class.
            TypeError: an override is not a field of the config.
        """
        cls.check_class_name(config, "the config")
        made = cls.config_class.from_dict(config)
        unknown = sorted(overrides.keys() - set(made))
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no config key {', '.join(unknown)}; it has {', '.join(made)}"
            )
        return cls(**cls.config_class.from_dict({**made, **overrides}))

    @classmethod
    @takes_hub
    def load_config(cls, path_or_id: str | Path, *, subfolder: str | None = None, hub: Hub) -> dict[str, Any]:
        """Read the `config.json` of a folder or hub id as it is; arguments and errors are `find_folder`'s."""
        return read_component_config(path_or_id, "config.json", subfolder=subfolder, hub=hub)

    @classmethod
    @answers_diffusers
    @takes_hub
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: mx.Dtype | str | None = None,
        hub: Hub,
    ) -> Model:
        """Load a model, in evaluation mode, from a diffusers folder or one in the MLX layout.

        The files' own metadata tells the layout. Names and shapes are all checked before any
        tensor is read; tensors are then read one at a time, so the peak is the model and about one
        tensor.

        Args:
            path_or_id: folder, or hub id `owner/name`.
            subfolder: the folder of the component inside it, such as "unet".
            variant: weight files such as "fp16", see `weight_files`; None takes the plain ones.
            dtype: float32, float16 or bfloat16 for all floating parameters, as MLX's dtype or torch's or
                as a string; None keeps the files'. Files of mixed floating dtypes then load, with a warning,
                in the one that has the most bytes. `torch_dtype` is another name of it.
            revision, local_files_only, token, cache_dir, hub: see `Hub`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see `find_folder` and
                `weight_files`.
            CheckpointError: the files are damaged, or not those of this class and config.
        """
        dtype = as_dtype(dtype)
        checkpoint = find_checkpoint(
            path_or_id, cls.weights_stem, subfolder=subfolder, variant=variant, hub=hub
        )
        config_file = checkpoint.where / "config.json"
        cls.check_class_name(checkpoint.config, str(config_file))
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization"}
        # MLX is lazy: the random start values are replaced before anything computes them.
        with blame(config_file):
            model = cls.from_config(config)
        if "quantization" in checkpoint.config:
            model._quantize_as(checkpoint)
        return model.load_checkpoints([Source(checkpoint)], dtype)

    def load_checkpoints(
        self: Model,
        sources: Sequence[Source],
        dtype: mx.Dtype | None = None,
        own: Mapping[str, mx.array] | None = None,
    ) -> Model:
        """Load all parameters from one checkpoint or several; returns the model, in evaluation mode.

        Names and shapes are all checked before any tensor is read.

        Args:
            sources: the checkpoints and their parts. A kernel that two of them have is made of both: its
                input channels of the first, and those that are left of the second.
            dtype: of all floating parameters; None takes that of the first checkpoint.
            own: parameters that are there already, by name.

        Raises CheckpointError where a checkpoint does not fit, or parameters are left over.
        """
        names = [matched(self, source) for source in sources]
        dtype = as_dtype(dtype)
        if dtype is None:
            first = sources[0].checkpoint
            dtype = common_dtype(first.where, first.headers)
        loaded = dict(own or {})
        for source, its in zip(sources, names, strict=True):
            for name, array in read_parameters(self, source.checkpoint, its, dtype):
                if name in loaded:
                    first = loaded[name]
                    array = mx.concatenate([first, array[..., first.shape[-1] :]], axis=-1)
                    mx.eval(array)
                loaded[name] = array
        for name, wanted in self.expected_tensors().items():  # constants that files need not hold
            if wanted.optional and name not in loaded:
                loaded[name] = dict(tree_flatten(self.parameters()))[name]
        cast = [
            (k, a.astype(dtype) if dtype is not None and mx.issubdtype(a.dtype, mx.floating) else a)
            for k, a in loaded.items()
        ]
        self.load_weights(cast, strict=True)
        files = [path for source in sources for path in source.checkpoint.headers]
        self.weights_checksum = checksum(files)
        return self.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: str = "mlx",
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = True,
    ) -> list[Path]:
        """Write `config.json` and safetensors files; returns the weight files.

        A save that fails leaves the folder as it was, or without loadable weights if it is cut off
        at the very end; weight files of an earlier save of the same variant are replaced.

        Args:
            folder: made if need be.
            layout: "mlx", or "diffusers" for files that diffusers loads too.
            variant: infix of the file names, such as "fp16".
            max_shard_size: bytes, or text such as "5GB", above which the weights are divided over
                files.
            overwrite: False raises where there is a checkpoint.

        Raises:
            ValueError: unknown layout, or "diffusers" for a quantized model.
            FileExistsError: `overwrite=False` and the folder has a config or weights of the
                variant.
        """
        if layout not in ("mlx", "diffusers"):
            raise ValueError(f"layout={layout!r} must be 'mlx' or 'diffusers'")
        self.refuse_adapters("saving")
        quantization = quantizations(self)
        tensors = dict(tree_flatten(self.parameters()))
        if layout == "diffusers":
            if quantization:
                raise ValueError("diffusers does not read MLX's quantized weights; save with layout='mlx'")
            layouts = parameter_layouts(self)
            tensors = {
                name: to_diffusers(layouts.get(name, "identity"), array) for name, array in tensors.items()
            }
        config = self.config_to_save()
        if quantization:
            config["quantization"] = to_config(quantization)
        return write_component(
            Path(folder).expanduser(),
            config,
            tensors,
            stem=self.weights_stem,
            variant=variant,
            metadata={"format": "mlx" if layout == "mlx" else "pt"},
            max_shard_bytes=parse_size(max_shard_size),
            overwrite=overwrite,
        )

    def quantize(
        self: Model,
        bits: int | None = None,
        *,
        group_size: int | None = None,
        mode: str = "affine",
        recipe: str = "mixed",
    ) -> Model:
        """Quantize weights in place, each layer's when it is first needed; returns the model.

        Args:
            bits, group_size, mode: see `Quantization`.
            recipe: "mixed", all linear layers and convolutions whose rows divide into groups, with the first,
                last and time layers, shortcuts, and what leads into and out of a transformer in 8 bits;
                "uniform", all of them alike; "linear", linear layers and 1x1 convolutions alone.

        Raises ValueError for settings that do not exist, and for a model that is quantized already.
        """
        self.refuse_adapters("quantizing")
        if quantizations(self):
            raise ValueError(
                f"this {type(self).__name__} is quantized already; load the original to quantize it"
            )
        quantize_layers(self, choose(self, Quantization(bits, group_size, mode), recipe))
        return self

    def config_to_save(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            **self.config,
            "_class_name": (self.class_names or (type(self).__name__,))[0],
            "_diffusers_version": DIFFUSERS_VERSION,
        }

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the first floating parameter."""
        for _, array in tree_flatten(self.parameters()):
            if mx.issubdtype(array.dtype, mx.floating):
                return array.dtype
        raise ValueError(f"{type(self).__name__} has no floating parameters, so it has no dtype")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; those packed in a quantized weight count one by one.

        Args:
            only_trainable: leave out frozen parameters.
            exclude_embeddings: leave out the tables of embedding layers.
        """
        total = 0
        for module in self.modules():
            own = module.trainable_parameters() if only_trainable else module.parameters()
            packed = isinstance(module, _QUANTIZED)
            for name, array in own.items():
                if (
                    not isinstance(array, mx.array)
                    or name in CONSTANTS
                    or (packed and name in ("scales", "biases"))
                ):
                    continue
                if exclude_embeddings and isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
                    continue
                total += array.size * 32 // module.bits if packed and name == "weight" else array.size
        return total

    @classmethod
    def check_class_name(cls, config: Mapping[str, Any], where: str) -> None:
        """CheckpointError where a `config.json` is that of another class."""
        known = cls.class_names or (cls.__name__,)
        name = config.get("_class_name")
        if name is not None and name not in known:
            raise CheckpointError(
                f"{where} is for the class {name}, not {' or '.join(known)}; use the class of that "
                "name, or the subfolder of the component"
            )

    def expected_tensors(self) -> dict[str, Expected]:
        """Return the tensors that a checkpoint must hold, by parameter name."""
        layouts = parameter_layouts(self)
        return {
            name: Expected(
                tuple(array.shape),
                array.dtype,
                layouts.get(name, "identity"),
                optional=name.rpartition(".")[2] in CONSTANTS,
            )
            for name, array in tree_flatten(self.parameters())
        }

    def refuse_adapters(self, before: str) -> None:
        """Raise ValueError where adapters are loaded; `before` is the work that they are in the way of."""
        if any(isinstance(module, AdaptedLayer) for module in self.modules()):
            raise ValueError(
                f"adapters are loaded; before {before}, remove them with delete_adapters, or make them part "
                "of the weights with fuse_lora and unload_lora"
            )

    def _quantize_as(self, checkpoint: Checkpoint) -> None:
        """Give the layers that the files hold quantized their quantized form."""
        if checkpoint.layout != "mlx":
            raise CheckpointError(
                f"{checkpoint.where} has a quantization in config.json and weights in the layout of "
                "diffusers, which does not go together; convert the checkpoint again"
            )
        where = str(checkpoint.where / "config.json")
        chosen = choose_as(self, checkpoint.config["quantization"], checkpoint.keys, where)
        quantize_layers(self, chosen)
