"""Samplers, each equal to the diffusers scheduler of its name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .arrays import SchedulerOutput
from .base import Scheduler
from .config import SchedulerConfig
from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .deis_multistep import DEISMultistepScheduler
from .dpmsolver_multistep import DPMSolverMultistepScheduler
from .euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from .euler_discrete import EulerDiscreteScheduler
from .heun_discrete import HeunDiscreteScheduler
from .lcm import LCMScheduler
from .pndm import PNDMScheduler
from .tcd import TCDScheduler
from .unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "REFUSED",
    "SCHEDULERS",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "scheduler_from_config",
    "scheduler_of_pipeline",
]

_PLAIN_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}

SCHEDULERS: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "deis": (DEISMultistepScheduler, {"algorithm_type": "deis"}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", **_PLAIN_SIGMAS},
    ),
    "dpm++-karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", **_PLAIN_SIGMAS, "use_karras_sigmas": True},
    ),
    "dpm++-sde": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", **_PLAIN_SIGMAS},
    ),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "tcd": (TCDScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""Short names for command lines: the class, and arguments that override a model's config."""


REFUSED: dict[str, str] = {
    "CMStochasticIterativeScheduler": "LCMScheduler",
    "CosineDPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
    "DDIMParallelScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDPMScheduler",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler": "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
    "EDMEulerScheduler": "EulerDiscreteScheduler",
    "IPNDMScheduler": "PNDMScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler": "HeunDiscreteScheduler",
    "LMSDiscreteScheduler": "DEISMultistepScheduler",
    "SASolverScheduler": "DPMSolverMultistepScheduler",
    "UnCLIPScheduler": "DDPMScheduler",
}
"""Unsupported diffusers classes, and the nearest supported one."""


def scheduler_from_config(config: Mapping[str, Any], name: str | None = None) -> Scheduler:
    """Make a scheduler from a model's scheduler config.

    Args:
        config: a dict as read from scheduler_config.json, or another scheduler's `config`.
        name: a short name of `SCHEDULERS` or a class name; None takes the config's own class.

    Raises:
        ValueError: an unknown name, or a config without a class.
    """
    if name is not None and name in SCHEDULERS:
        cls, overrides = SCHEDULERS[name]
        return cls.from_config(config, **overrides)
    if name is not None:
        return _class(name, "").from_config(config)
    own = config.class_name if isinstance(config, SchedulerConfig) else config.get("_class_name")
    if own is None:
        raise ValueError("the scheduler config has no _class_name; name a scheduler, one of " + _names())
    return _class(own, ", which the config asks for").from_config(config)


def scheduler_of_pipeline(
    config: Mapping[str, Any], entry: Sequence[str], name: str | None = None
) -> Scheduler:
    """Make the scheduler of a pipeline folder, of the class in model_index.json as in diffusers.

    Warns where the config names another class.

    Args:
        config: a dict as read from scheduler_config.json.
        entry: the entry "scheduler" of model_index.json: a library and a class name.
        name: another scheduler to use, as in `scheduler_from_config`.

    Raises:
        ValueError: an unknown scheduler, or an entry that names none.
    """
    if name is not None:
        return scheduler_from_config(config, name)
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise ValueError(
            f'model_index.json has for scheduler {repr(entry)[:100]}; it must be ["diffusers", a class name]'
        )
    own = config.get("_class_name", entry[1])
    scheduler = _class(entry[1], ", which model_index.json asks for").from_config(config)
    if own != entry[1]:
        warnings.warn(
            f"model_index.json asks for {entry[1]}, and scheduler_config.json is of {repr(own)[:100]}; "
            "model_index.json decides, as in diffusers",
            stacklevel=3,
        )
    return scheduler


def _class(name: Any, where: str) -> type[Scheduler]:
    """Return the class of a name; `where` tells the error message where the name comes from."""
    if isinstance(name, str) and name in Scheduler.classes:
        return Scheduler.classes[name]
    if isinstance(name, str) and name.startswith("FlowMatch"):
        others = "it is for flow matching, which these models are not trained on"
    elif isinstance(name, str) and name in REFUSED:
        nearest = REFUSED[name]
        others = f"the nearest is {nearest}: use scheduler={nearest!r}, or --scheduler {nearest}"
    else:
        others = f"there are {_names()}"
    raise ValueError(f"there is no scheduler {repr(name)[:100]}{where}; {others}")


def _names() -> str:
    return ", ".join([*SCHEDULERS, *sorted(Scheduler.classes)])
