"""Parts of a pipeline's folder besides the networks of its source."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_unet3d.recommended import KEY, Recommended

from .kinds import BY_NAME, kind_of
from .networks import Ways, part_of
from .plan import CheckpointPlan


def finish(plan: CheckpointPlan, ways: Ways) -> CheckpointPlan:
    """Return the plan with the parts of a network that the pipeline also has under another name.

    Only diffusers needs them: its index of AnimateDiff also has the motion modules of the UNet as a
    `motion_adapter`. They are the same tensors of the same files.
    """
    index, components = dict(plan.index), list(plan.components)
    for component in plan.components:
        for name, (cls, config) in kind_of(component.cls).parts.items():
            index.pop(name, None)
            if ways.layout == "diffusers":
                components.append(part_of(component, BY_NAME[cls], config(component.config), name))
                index[name] = ["diffusers", cls]
    return replace(plan, index=index, components=components)


def with_recommendation(
    index: dict[str, Any], recommended: Mapping[str, Any], path: str | Path
) -> dict[str, Any]:
    """The index, read from `path`, with what is recommended for its use; what it says of that itself stays.

    Raises CheckpointError for values that no video can have.
    """
    both = {**recommended, **Recommended.of_index(index, path).to_dict()}
    return {**index, KEY: both} if both else index


def lists(index: Mapping[str, Any], name: str) -> bool:
    """Return True if a `model_index.json` has a component of that name, and not only a place for it."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and None not in entry
