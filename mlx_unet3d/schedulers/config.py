"""The configuration of a scheduler: its constructor arguments, passed between classes and saved to disk."""

from __future__ import annotations

import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..atomic import write_text
from ..checkpoints.hub import Hub, takes_hub
from ..scalars import as_python

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "scheduler_config.json"

# The release of diffusers whose defaults and results the schedulers match; saved configs name it.
DIFFUSERS_VERSION = "0.42.1"

# Arguments of unsupported diffusers schedulers, which config files may contain.
FOREIGN_KEYS = frozenset({"noise_sampler_seed", "rho", "sigma_data", "sigma_schedule"})

# Arguments that diffusers' classes lack: saved only where they were given.
OWN_KEYS = frozenset({"distilled_spacing"})


class SchedulerConfig(Mapping[str, Any]):
    """The arguments of a scheduler, read-only, by item (`config["beta_end"]`) or attribute.

    Attributes:
        class_name: the scheduler class of the arguments.
        given: the names that were passed; the others have the class's defaults. `from_config` passes only
            these to another class, which uses its own defaults for the rest.
        carried: arguments of other scheduler classes in the config. They have no effect, and are kept so that
            those classes can be made from this config again.
    """

    def __init__(
        self,
        class_name: str,
        values: Mapping[str, Any],
        given: frozenset[str],
        carried: Mapping[str, Any] | None = None,
    ) -> None:
        frozen = {name: _frozen(value) for name, value in values.items()}
        vars(self).update(
            class_name=class_name,
            given=given,
            carried={name: _frozen(value) for name, value in (carried or {}).items()},
            _values=frozen,
        )

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        values = vars(self).get("_values", {})  # empty during copying and unpickling
        if name in values:
            return values[name]
        raise AttributeError(f"{vars(self).get('class_name')} has no argument {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"a config is read-only, so {name}={value!r} cannot be set; make a new scheduler with "
            f"from_config(config, {name}={value!r})"
        )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"{self.class_name}({arguments})"

    def to_dict(self) -> dict[str, Any]:
        """Return all arguments, with the carried ones, as diffusers writes them to scheduler_config.json."""
        values = {**self.carried, **self}
        unsaid = OWN_KEYS & set(self) - self.given
        values = {name: _plain(value) for name, value in values.items() if name not in unsaid}
        return {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION, **values}

    def replaced(self, **values: Any) -> SchedulerConfig:
        """Return this config with other values of some of its own arguments."""
        return SchedulerConfig(self.class_name, {**self, **values}, self.given, self.carried)

    def carrying(self, carried: Mapping[str, Any]) -> SchedulerConfig:
        """Return this config with other arguments carried for other classes."""
        return SchedulerConfig(self.class_name, self, self.given, carried)


def configured(init: Callable[..., None]) -> Callable[..., None]:
    """Make a constructor record its arguments as `self.config` before its body runs.

    The arguments of a scheduler are its configuration, so their names and defaults are written only once, in
    the signature.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments = {name: as_python(value) for name, value in bound.arguments.items()}
        given = frozenset(bound.arguments) - {"self"}
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "self"}
        self.config = SchedulerConfig(type(self).__name__, values, given)
        init(*bound.args, **bound.kwargs)

    return wrapper


def argument_names(cls: type) -> frozenset[str]:
    """Return the names of a scheduler's constructor arguments."""
    return frozenset(inspect.signature(cls.__init__).parameters) - {"self"}


def split_config(
    config: Mapping[str, Any], own: frozenset[str], known: frozenset[str], class_name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a config into the arguments for a class and those to carry for others.

    Args:
        config: a `SchedulerConfig`, or a dict as read from scheduler_config.json.
        own: the argument names of the class.
        known: the argument names of all scheduler classes.
        class_name: named in the warning.

    Returns:
        (arguments, carried). Names that no scheduler has are left out with one warning.
    """
    if isinstance(config, SchedulerConfig):
        values = {name: value for name, value in config.items() if name in config.given}
        values.update(config.carried)
    else:
        defaulted = config.get("_use_default_values", ())  # a marker in configs of live diffusers objects
        values = {name: value for name, value in config.items() if name not in defaulted}
        values = {name: value for name, value in values.items() if not name.startswith("_")}
    arguments = {name: value for name, value in values.items() if name in own}
    carried = {name: value for name, value in values.items() if name in known - own}
    unknown = sorted(values.keys() - own - known)
    if unknown:
        warnings.warn(
            f"the scheduler config holds {', '.join(map(repr, unknown))}, which no scheduler "
            f"knows; {class_name} runs without. Check the spelling in scheduler_config.json.",
            stacklevel=3,
        )
    return arguments, carried


class ConfigMixin:
    """Base of the schedulers that makes them from configs and saves their configs."""

    classes: ClassVar[dict[str, type[Any]]] = {}
    """The scheduler classes by name."""

    config: SchedulerConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(vars(cls).get("__init__"), "__wrapped__"):  # made by `configured`, so not a base class
            ConfigMixin.classes[cls.__name__] = cls

    def __repr__(self) -> str:
        return repr(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a scheduler of this class from the config of any other, as in diffusers.

        Args:
            config: another scheduler's `config`, or a dict as read from scheduler_config.json.
            overrides: arguments of this class that override those of the config.

        Only arguments that were given to the other scheduler are passed on; for the rest, this class uses its
        own defaults. (So a DDIM config without `timestep_spacing` makes a "linspace" DPM-Solver.) Arguments
        of other scheduler classes are carried without effect; names that no scheduler has are left out with a
        warning.

        Raises:
            TypeError: an override is no argument of this class.
        """
        own = argument_names(cls)
        strange = sorted(overrides.keys() - own)
        if strange:
            raise TypeError(
                f"{cls.__name__} has no argument {', '.join(strange)}; it has {', '.join(sorted(own))}"
            )
        known = FOREIGN_KEYS.union(*map(argument_names, ConfigMixin.classes.values()))
        arguments, carried = split_config(config, own, known, cls.__name__)
        scheduler = cls(**{**arguments, **overrides})
        scheduler.config = scheduler.config.carrying(carried)
        return scheduler

    @classmethod
    @takes_hub
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        hub: Hub,
        **overrides: Any,
    ) -> Self:
        """Make a scheduler of this class from the scheduler_config.json in a folder or hub repository.

        Args:
            path_or_id: a folder, or a hub id.
            subfolder: "scheduler" where `path_or_id` is a complete pipeline.
            hub: how the hub is reached: `revision`, `local_files_only`, `token`, `cache_dir`.
            overrides: arguments of the class that replace values of the config, as in `from_config`.
        """
        from ..checkpoints import read_component_config

        config = read_component_config(path_or_id, CONFIG_NAME, subfolder=subfolder, hub=hub)
        return cls.from_config(config, **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write scheduler_config.json, which diffusers reads as well, into a folder, and make the folder if
        needed."""
        target = Path(folder) / CONFIG_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"
        write_text(target, text)

    def _check_choice(self, name: str, choices: Sequence[Any]) -> None:
        value = self.config.get(name, choices[0])
        if value not in choices:
            raise ValueError(
                f"{type(self).__name__} has no {name}={value!r}; it has " + ", ".join(map(repr, choices))
            )

    def _refuse(self, name: str, allowed: Any, reason: str) -> None:
        """Raise an error for an argument of the diffusers class unless it has the one supported value."""
        value = self.config[name]
        if value != allowed:
            raise ValueError(
                f"{type(self).__name__} does not support {name}={value!r}, only {allowed!r}: {reason}"
            )


def _frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
