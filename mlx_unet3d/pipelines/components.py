"""The parts that a `model_index.json` lists: reading, writing, sharing and releasing them."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx

from ..atomic import write_text
from ..checkpoints import find_folder, read_component_config, read_json
from ..checkpoints.config import blame
from ..checkpoints.hub import Hub, takes_hub
from ..checkpoints.source import choose_variants, pinned
from ..diffusers_names import answers_diffusers
from ..dtypes import as_dtype, default_dtype
from ..errors import CheckpointError
from ..models.pretrained import DIFFUSERS_VERSION, PretrainedModel
from ..recommended import Recommended
from ..schedulers import Scheduler, scheduler_of_pipeline

Pipeline = TypeVar("Pipeline", bound="Components")


@dataclass(frozen=True)
class Part:
    """A component of a pipeline.

    Attributes:
        kinds: classes that it may be of; the entry of `model_index.json` says which.
        is_optional: True if a pipeline works without it.
        may_be_none: True if calls can give what it makes; None must be said, in the index or as an argument.
        is_wide: True if it is read in `vae_dtype`, as half precision may overflow in it.
    """

    kinds: tuple[type, ...]
    is_optional: bool = False
    may_be_none: bool = False
    is_wide: bool = False

    @property
    def is_network(self) -> bool:
        """True for parts with weights."""
        return issubclass(self.kinds[0], PretrainedModel)

    @property
    def library(self) -> str:
        """The library that diffusers' index names for it."""
        own = self.kinds[0].__name__
        return "transformers" if own.startswith("CLIP") else "diffusers"


class Components:
    """Base of the pipelines: holds their parts.

    A subclass lists them in `parts`, which are its constructor's arguments in this order.

    Raises ValueError where parts do not fit together, TypeError where one is missing or of another class.
    """

    parts: ClassVar[dict[str, Part]]
    class_names: ClassVar[tuple[str, ...]]
    """Pipelines of diffusers whose folders this one reads; it writes the first."""
    default_guidance_scale: ClassVar[float]
    default_num_inference_steps: ClassVar[int] = 50
    default_num_frames: ClassVar[int] = 16
    index_options: ClassVar[dict[str, Any]] = {}
    """Values of `model_index.json` that are no parts, with their defaults; arguments and attributes too."""

    def __init_subclass__(cls) -> None:
        if "parts" in vars(cls):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            named = [
                inspect.Parameter(name, kind, default=None if part.is_optional else inspect.Parameter.empty)
                for name, part in sorted(cls.parts.items(), key=lambda item: item[1].is_optional)
            ]
            said = {"recommended": Recommended(), **cls.index_options}
            others = [inspect.Parameter(name, kind, default=value) for name, value in said.items()]
            cls.__signature__ = inspect.Signature([*named, *others])

    @answers_diffusers
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(type(self)).bind(*args, **kwargs)
        bound.apply_defaults()
        for name in ("recommended", *self.index_options):
            setattr(self, name, bound.arguments.pop(name))
        for name, value in bound.arguments.items():
            part = self.parts[name]
            may_be_none = part.is_optional or part.may_be_none
            if not (isinstance(value, part.kinds) or (value is None and may_be_none)):
                kinds = " or ".join(kind.__name__ for kind in part.kinds)
                raise TypeError(f"{name} is a {type(value).__name__}; give a {kinds}")
            setattr(self, name, value)
        self.recommended: Recommended
        absent = (name for name, part in self.parts.items() if part.may_be_none)
        self._absent = frozenset(name for name in absent if getattr(self, name) is None)
        self.sequential_guidance = False
        self._releases = False
        self.vae_scale_factor: int = self.vae.spatial_factor
        self._check_parts()
        networks = [getattr(self, name) for name in self._networks()]
        checksums = [str(network.weights_checksum) for network in networks if network is not None]
        self.weights_checksum = hashlib.sha256("/".join(checksums).encode()).hexdigest()[:16]
        """Fingerprint of the files of all networks; for records of what made a video."""

    def _check_parts(self) -> None:
        """ValueError where parts do not fit together."""

    @classmethod
    def _networks(cls) -> list[str]:
        return [name for name, part in cls.parts.items() if part.is_network]

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, as diffusers' pipelines give them."""
        return {name: getattr(self, name) for name in self.parts}

    # Folders.

    @classmethod
    @answers_diffusers
    @takes_hub
    def from_pretrained(
        cls: type[Pipeline],
        path_or_id: str | Path,
        *,
        dtype: mx.Dtype | str | None = None,
        vae_dtype: mx.Dtype | str | None = mx.float32,
        scheduler: Scheduler | str | None = None,
        variant: str | None = None,
        hub: Hub,
        readers: Mapping[str, Callable[..., PretrainedModel]] | None = None,
        **components: Any,
    ) -> Pipeline:
        """Read a diffusers pipeline folder, or one that `save_pretrained` wrote, or a hub id of one.

        "demo" is the small model that comes in this package.

        Args:
            dtype: of all networks but the VAE, see
                `UNet3DConditionModel.from_pretrained`; None for float16 on a GPU and float32 on a
                CPU, where half precision saves no time. `torch_dtype` is another name of it.
            vae_dtype: of the VAE, which is prone to overflow in half precision; None for that of the rest.
            scheduler: to take for the checkpoint's own; or the name of one to make from the checkpoint's
                config, of a class or from `schedulers.SCHEDULERS`.
            variant: such as "fp16"; networks without it are read from their plain files, with a warning.
            revision, local_files_only, token, cache_dir, hub: see `Hub`.
            readers: functions that read networks, by name, in place of `from_pretrained` of their classes
                and with the same arguments.
            components: parts to take in place of the folder's, by name.

        Raises FileNotFoundError, PermissionError, ConnectionError: see `find_folder`; CheckpointError.
        """
        dtype = as_dtype(dtype) or default_dtype()
        vae_dtype = as_dtype(vae_dtype, "vae_dtype") or dtype
        folder = find_folder(path_or_id, files=("model_index.json",), hub=hub)
        hub = pinned(hub, path_or_id, folder)
        index = cls._checked_index(path_or_id, read_json(folder / "model_index.json"), components)
        recommended = Recommended.of_index(index, folder / "model_index.json")
        listed = {name: part for name, part in cls.parts.items() if is_listed(index, name, part)}
        kinds = {name: part_class(index, name, part) for name, part in listed.items()}
        networks = [name for name in listed if listed[name].is_network and name not in components]
        stems = {name: kinds[name].weights_stem for name in networks}
        variants = choose_variants(path_or_id, stems, variant, hub=hub)
        plain = [name for name, chosen in variants.items() if chosen != variant]
        if plain:
            warnings.warn(
                f"{path_or_id} has no files of the variant {variant!r} for {' and '.join(plain)}; taking the "
                "plain ones",
                stacklevel=4,
            )
        made: dict[str, Any] = {
            name: None for name, part in cls.parts.items() if part.may_be_none and name not in listed
        }
        made |= components
        for name in listed:
            if name in made:
                continue
            if name in networks:
                wanted = vae_dtype if listed[name].is_wide else dtype
                read = (readers or {}).get(name, kinds[name].from_pretrained)
                made[name] = read(path_or_id, subfolder=name, variant=variants[name], dtype=wanted, hub=hub)
            elif name != "scheduler":
                made[name] = kinds[name].from_pretrained(path_or_id, subfolder=name, hub=hub)
            elif isinstance(scheduler, Scheduler):
                made[name] = scheduler
            else:
                file = "scheduler_config.json"
                config = read_component_config(path_or_id, file, subfolder=name, hub=hub)
                with blame(folder / name / file):
                    made[name] = scheduler_of_pipeline(config, index[name], scheduler)
        options = {name: index.get(name, default) for name, default in cls.index_options.items()}
        return cls(**made, **options, recommended=recommended)

    @classmethod
    def _checked_index(
        cls, path_or_id: str | Path, index: dict[str, Any], components: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a `model_index.json`; CheckpointError where it is that of another pipeline."""
        name = index.get("_class_name")
        if name not in cls.class_names:
            raise CheckpointError(
                f"{path_or_id}: model_index.json describes a {name!r}; {cls.__name__} reads "
                f"{', '.join(cls.class_names)}"
            )
        unknown = [name for name in components if name not in cls.parts]
        if unknown:
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}; parts are {', '.join(cls.parts)}")
        missing = [
            name
            for name, part in cls.parts.items()
            if name not in index and name not in components and not part.is_optional
        ]
        if missing:
            raise CheckpointError(
                f"{path_or_id}: model_index.json has no {', '.join(missing)}; the pipeline needs it"
            )
        return index

    @classmethod
    @answers_diffusers
    def from_pipe(cls: type[Pipeline], pipe: Components, **components: Any) -> Pipeline:
        """Make a pipeline of the parts of another, which it shares: the weights are in memory once.

        Args:
            pipe: has all parts that this pipeline needs and `components` do not give.
            components: parts to take in place of its own, by name.

        Raises ValueError where a part is missing or was released.
        """
        found = {name: components.get(name, getattr(pipe, name, None)) for name in cls.parts}
        given = components.keys() | pipe._absent
        missing = [
            name
            for name, part in cls.parts.items()
            if found[name] is None and not (part.is_optional or (part.may_be_none and name in given))
        ]
        if missing:
            raise ValueError(
                f"{cls.__name__} needs {', '.join(missing)}, which this {type(pipe).__name__} does not have; "
                f"give {missing[0]}="
            )
        options = {name: getattr(pipe, name, default) for name, default in cls.index_options.items()}
        return cls(**found, **options, recommended=pipe.recommended)

    @answers_diffusers
    def save_pretrained(self, folder: str | Path, *, layout: str = "mlx") -> None:
        """Write all components and `model_index.json`, that last: a failed save cannot be loaded.

        `layout="diffusers"` makes a folder that diffusers reads.
        """
        present = {name: part for name, part in self.components.items() if part is not None}
        needed = (name for name, part in self.parts.items() if part.is_network and not part.is_optional)
        self._need(*(name for name in needed if name not in self._absent))
        for part in present.values():
            if hasattr(part, "refuse_adapters"):
                part.refuse_adapters("saving")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").unlink(missing_ok=True)
        index: dict[str, Any] = {
            "_class_name": self.class_names[0],
            "_diffusers_version": DIFFUSERS_VERSION,
            **{name: getattr(self, name) for name in self.index_options},
        }
        for name, part in present.items():
            part.save_pretrained(folder / name, **({"layout": layout} if self.parts[name].is_network else {}))
            index[name] = [self.parts[name].library, type(part).__name__]
        index |= {name: [None, None] for name in sorted(self._absent)}
        if self.recommended.to_dict():
            index["_recommended"] = self.recommended.to_dict()
        write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")

    # Defaults of a call.

    def num_frames(self, value: int | None = None) -> int:
        """Return `value`, or where it is None what the checkpoint recommends, or the pipeline's default."""
        return first_given(value, self.recommended.num_frames, self.default_num_frames)

    def num_inference_steps(self, value: int | None = None) -> int:
        """Return `value`, or where it is None what the checkpoint recommends, or the pipeline's default."""
        recommended = self.recommended.num_inference_steps
        return first_given(value, recommended, self.default_num_inference_steps)

    def guidance_scale(self, value: float | None = None) -> float:
        """Return `value`, or where it is None what the checkpoint recommends, or the pipeline's default."""
        return first_given(value, self.recommended.guidance_scale, self.default_guidance_scale)

    def default_size(self) -> tuple[int | None, int | None]:
        """Return height and width in pixels where a call gives none; None where they must be given."""
        recommended = self.recommended.height, self.recommended.width
        size = self.unet.config.sample_size
        if None not in recommended or size is None:
            return recommended
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    # Memory.

    def enable_sequential_guidance(self) -> None:
        """Run the network twice a step, for the negative prompt and for the prompt, not once for both.

        About half the memory, the same result up to rounding. Without guidance there is nothing to divide.
        """
        self.sequential_guidance = True

    def disable_sequential_guidance(self) -> None:
        """Run the network once a step."""
        self.sequential_guidance = False

    def enable_release(self) -> None:
        """Let go of encoders once prompts and images are encoded, and of the UNet before frames are decoded.
        The pipeline makes one more video, and must then be loaded again."""
        self._releases = True

    def release(self, *names: str) -> None:
        """Let go of networks, and of the memory they take, if nobody else holds them.

        Later uses of them raise ValueError.
        """
        for name in names:
            if name not in self._networks():
                known = ", ".join(map(repr, self._networks()))
                raise ValueError(f"release({name!r}): the networks are {known}")
            setattr(self, name, None)
        mx.clear_cache()

    def _done_with(self, *names: str) -> None:
        if self._releases:
            self.release(*names)

    def _need(self, *names: str) -> None:
        for name in names:
            if name in self._absent:
                raise ValueError(
                    f"this pipeline was made without a {name.replace('_', ' ')}; give prompt_embeds and "
                    f"negative_prompt_embeds, or {name}= when it is made"
                )
            if getattr(self, name) is None:
                raise ValueError(
                    f"the {name.replace('_', ' ')} of this pipeline was released; load the pipeline again, "
                    "without enable_release() if it is to be called more than once"
                )


def is_listed(index: Mapping[str, Any], name: str, part: Part) -> bool:
    """Return True if a folder has a part; an index may list one that can be missing as [null, null]."""
    may_be_null = part.is_optional or part.may_be_none
    return name in index and not (may_be_null and index[name] in (None, [None, None]))


def part_class(index: Mapping[str, Any], name: str, part: Part) -> type:
    """Return the class that reads a part: of several, the one that `model_index.json` names."""
    entry = index[name]
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return next((kind for kind in part.kinds if kind.__name__ == named), part.kinds[0])


def first_given(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)
