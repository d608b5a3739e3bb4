"""Parts of a pipeline's folder besides the networks of its source."""

from dataclasses import replace

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
