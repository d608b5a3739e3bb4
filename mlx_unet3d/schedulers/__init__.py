"""Samplers, each equal to the diffusers scheduler of its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arrays import SchedulerOutput
from .base import Scheduler
from .config import SchedulerConfig
from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .dpmsolver_multistep import DPMSolverMultistepScheduler
from .euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from .euler_discrete import EulerDiscreteScheduler
from .lcm import LCMScheduler
from .pndm import PNDMScheduler
from .unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "SCHEDULERS",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
    "scheduler_from_config",
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
    "lcm": (LCMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""Short names for command lines: the class, and the arguments that go before a model's config."""


def scheduler_from_config(config: Mapping[str, Any], name: str | None = None) -> Scheduler:
    """A scheduler for a model's scheduler config.

    Args:
        config: a dict as read from scheduler_config.json, or another scheduler's `config`.
        name: which scheduler: a short name of `SCHEDULERS` or a class name. None takes the config's
            own class.

    Raises:
        ValueError: no such name, or a config that does not say its class.
    """
    asked = name
    if asked is None:
        asked = config.class_name if isinstance(config, SchedulerConfig) else config.get("_class_name")
    if asked is None:
        raise ValueError("the scheduler config has no _class_name; name a scheduler, one of " + _names())
    if not isinstance(asked, str):
        raise ValueError(f"_class_name={asked!r} is no name; there are {_names()}")
    if asked in SCHEDULERS and name is not None:
        cls, overrides = SCHEDULERS[asked]
        return cls.from_config(config, **overrides)
    if asked in Scheduler.classes:
        return Scheduler.classes[asked].from_config(config)
    where = "" if name is not None else ", which the config asks for"
    raise ValueError(f"there is no scheduler {asked!r}{where}; there are {_names()}")


def _names() -> str:
    return ", ".join([*SCHEDULERS, *sorted(Scheduler.classes)])
