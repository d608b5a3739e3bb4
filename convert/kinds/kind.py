"""The description of a network for the converter: a `Kind` holds everything specific to it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_unet3d.checkpoints.parts import KeyMap, Part
from mlx_unet3d.checkpoints.prefixes import unwrapped
from mlx_unet3d.checkpoints.quantization import choose
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.models.pretrained import PretrainedModel

from .pipeline import Pipeline

Config = Mapping[str, Any]
Inference = Callable[[Shapes], tuple[dict[str, Any], dict[str, Any]]]
"""Infers the config keys that shapes define, and returns values of published files for the others.

Raises CheckpointError where a required tensor is missing.
"""


@dataclass(frozen=True)
class Family:
    """A kind of file.

    Attributes:
        title: its name in messages.
        signs: tensors that all files of the kind have, and that no other kind has together.
        key_map: makes, from all keys, the function that returns the parameters in a key.
        within: possible prefixes of keys, besides the network's name in a pipeline, if the network is part of
            a larger one.
        without: tensors that no file of the kind has.
        alone: True if keys may have no prefix.
        assumed: config keys that shapes do not define, where they differ from the kind's `infer`.
    """

    title: str
    signs: tuple[str, ...]
    key_map: Callable[[Collection[str]], KeyMap]
    within: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    alone: bool = True
    assumed: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """Arguments of a small forward, NumPy arrays and numbers, for this package and the reference.

    Attributes:
        args, kwargs: the arguments.
        method: the method of the network; None to call it.
    """

    args: tuple[Any, ...]
    kwargs: Config = field(default_factory=dict)
    method: str | None = None

    def run(self, model: Any, convert: Callable[[Any], Any]) -> Any:
        """Return the array that `model` computes from the converted arguments."""
        args = [convert(value) for value in self.args]
        kwargs = {
            name: {k: convert(v) for k, v in value.items()} if isinstance(value, dict) else convert(value)
            for name, value in self.kwargs.items()
        }
        result = (model if self.method is None else getattr(model, self.method))(*args, **kwargs)
        for name in ("sample", "text_embeds", "image_embeds", "last_hidden_state"):
            result = getattr(result, name, result)
        return result


Rule = Callable[[PretrainedModel, Quantization, str, bool], dict[str, Quantization]]
"""Returns the quantization of a network's layers, given the requested one, a recipe, and True if it is
alone."""


def as_asked(
    model: PretrainedModel, quantization: Quantization, recipe: str, alone: bool
) -> dict[str, Quantization]:
    """Quantize by the recipe; ValueError if no layer divides into groups."""
    chosen = choose(model, quantization, recipe)
    if not chosen:
        raise ValueError(
            f"no layer of {type(model).__name__} divides into groups of {quantization.group_size}; choose "
            "smaller groups"
        )
    return chosen


def linear_beside_others(
    model: PretrainedModel, quantization: Quantization, recipe: str, alone: bool
) -> dict[str, Quantization]:
    """Quantize as requested if the network is alone; in a pipeline, quantize linear layers to 8 bits."""
    if alone:
        return as_asked(model, quantization, recipe, alone)
    return choose(model, Quantization(bits=8), "linear")


def never(
    model: PretrainedModel, quantization: Quantization, recipe: str, alone: bool
) -> dict[str, Quantization]:
    """Do not quantize the autoencoder of a pipeline; ValueError for one that is alone."""
    if alone:
        raise ValueError(
            "a VAE is not quantized, as it is small and its errors are seen at once; leave out -q"
        )
    return {}


@dataclass(frozen=True)
class Kind:
    """A network.

    Attributes:
        cls: its class.
        component: its name in a pipeline.
        families: its kinds of files, besides folders with a `config.json`.
        infer: infers its config from shapes, see `Inference`.
        inputs: makes the inputs of a small forward from its config; None without a forward.
        quantize: see `Rule`.
        library: the package of the reference class, which has the same name.
        pipelines: of a UNet, the pipelines that its original files make, each for some configs.
        from_image: whether it makes videos of images.
        combine: of what is no network by itself but a part of one: the config of that, given its own, that of
            the other part, and both files for messages. Raises CheckpointError where they do not go together.
        called: its class in `config.json`, where that is not `cls`.
        parts: the networks that lie within one of this kind, by their names in its pipeline: the class,
            and the config by that of the network.
        about_others: what a file of this network tells of the configs of the others in it.
    """

    cls: type[PretrainedModel]
    component: str
    families: tuple[Family, ...]
    infer: Inference
    inputs: Callable[[Config], Inputs] | None
    quantize: Rule = as_asked
    library: str = "diffusers"
    pipelines: tuple[Pipeline, ...] = ()
    from_image: bool = False
    combine: Callable[[Config, Config, str, str], dict[str, Any]] | None = None
    called: str = ""
    parts: Mapping[str, tuple[str, Callable[[Config], dict[str, Any]]]] = field(default_factory=dict)
    about_others: Callable[[Config], Mapping[str, Config]] | None = None

    @property
    def name(self) -> str:
        """The name of its class in files and messages."""
        return self.called or self.cls.__name__

    def pipeline(self, config: Config) -> Pipeline | None:
        """The pipeline of a UNet of a config; None for what is no UNet."""
        return next((made for made in self.pipelines if made.only is None or made.only(config)), None)

    def check_class_name(self, config: Config, where: str) -> None:
        """Raise CheckpointError for the `config.json` of another class."""
        if not self.called:
            self.cls.check_class_name(config, where)
        elif config.get("_class_name") not in (None, self.called):
            raise CheckpointError(f"{where} is for the class {config['_class_name']}, not {self.called}")

    @property
    def names(self) -> tuple[str, ...]:
        """Its classes in `config.json` and `model_index.json`."""
        return (self.called,) if self.called else self.cls.class_names or (self.cls.__name__,)

    def prefixes(self, family: Family, keys: Collection[str]) -> Iterator[str]:
        """Return possible prefixes of a network's keys: none in a file of its own, or its name in a pipeline,
        the network around it, and wrappers, in any nesting."""
        sign = family.signs[0]
        within = [unwrapped(f"{prefix}{sign}")[1] for prefix in family.within]
        within += [sign] if family.alone else []
        for key in keys:
            if key == sign or key.endswith(f".{sign}"):
                owner, name = unwrapped(key)
                if owner in (None, self.component) and name in within:
                    yield key.removesuffix(sign)

    def usual_prefixes(self, family: Family) -> tuple[str, ...]:
        """Return the prefixes of a family's keys without wrappers."""
        return (*(("",) if family.alone else ()), *family.within, f"{self.component}.")


def own_names(cls: type[PretrainedModel]) -> Callable[[Collection[str]], KeyMap]:
    """Return the key map of files written by diffusers or transformers."""

    def make(keys: Collection[str]) -> KeyMap:
        def key_map(key: str) -> list[Part]:
            name = cls.rename_key(key, keys)
            return [] if name is None else [Part(name)]

        return key_map

    return make


def diffusers_files(cls: type[PretrainedModel], *signs: str, without: tuple[str, ...] = ()) -> Family:
    """Return the family of files written by diffusers or transformers."""
    article = "an" if cls.__name__[0] in "AEIOU" and not cls.__name__.startswith("UN") else "a"
    title = f"{article} {cls.__name__} with diffusers' names"
    return Family(title, signs, own_names(cls), without=without)
