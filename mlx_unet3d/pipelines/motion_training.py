"""The sampler, steps and guidance that motion modules of AnimateDiff were trained for.

The weights of AnimateDiff, AnimateLCM and AnimateDiff-Lightning have the same names and shapes, so that names
of files and repositories tell them apart.
Source: the authors' settings, and the examples in diffusers' documentation of these models.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..schedulers import Scheduler
from .components import Recommended

_LIGHTNING = re.compile(r"lightning", re.I)
STEPS = re.compile(r"(\d+)[-_ ]?steps?(?![a-z])", re.I)
"""The number of steps in a name."""
_LCM = re.compile(r"lcm", re.I)


@dataclass(frozen=True)
class Training:
    """The use that motion modules were trained for.

    Attributes:
        title: a name for messages.
        scheduler: a class of diffusers.
        settings: keys that replace those of the base model's scheduler config.
        recommended: fields of `Recommended`; others are the pipeline's.
        advice: more to know, for messages.
    """

    title: str
    scheduler: str
    settings: Mapping[str, Any]
    recommended: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def scheduler_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of `scheduler_config.json`, given that of the base model."""
        return Scheduler.classes[self.scheduler].from_config(base, **self.settings).config.to_dict()

    def recommend(self, base: Recommended) -> Recommended:
        """Return the use to recommend, given that of the base model."""
        return replace(base, **self.recommended)


ANIMATEDIFF = Training(
    "AnimateDiff's motion modules",
    "DDIMScheduler",
    dict(beta_schedule="linear", clip_sample=False, steps_offset=1, timestep_spacing="linspace"),
)
ANIMATE_LCM = Training(
    "AnimateLCM's motion modules",
    "LCMScheduler",
    dict(beta_schedule="linear"),
    dict(num_inference_steps=6, guidance_scale=2.0),
    "load the LoRA that comes with them, at a weight of 0.8",
)


def training_of(name: str, *, authors: bool = False, mid: bool = True, tables: bool = True) -> Training:
    """Return the training of motion modules; AnimateDiff's own for names that say no other.

    Args:
        name: of the file, folder or repository, and what their metadata say.
        authors: True if the tensors have the names of AnimateDiff's authors.
        mid: True if there is one in the mid block.
        tables: True if there are tables of positions; AnimateLCM's own file has none.
    """
    if _LIGHTNING.search(name):
        found = STEPS.search(name)
        steps = 4 if found is None else max(int(found[1]), 1)
        return Training(
            "AnimateDiff-Lightning's motion modules",
            "EulerDiscreteScheduler",
            dict(beta_schedule="linear", timestep_spacing="trailing"),
            dict(num_inference_steps=steps, guidance_scale=1.0),
        )
    if _LCM.search(name) or (authors and mid and not tables):
        return ANIMATE_LCM
    return ANIMATEDIFF
