"""LoRAs as a part of the weights, a tensor at a time, with the sampler that they were distilled for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_unet3d.checkpoints.adapter_keys import is_list
from mlx_unet3d.checkpoints.adapters import read_adapter
from mlx_unet3d.checkpoints.hub import Hub
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.adapted import LowRank
from mlx_unet3d.models.adapters import LoRAMixin, networks_of
from mlx_unet3d.models.added_condition import AddedCondition
from mlx_unet3d.pipelines.few_steps import T2V_TURBO, training_of_lora
from mlx_unet3d.scalars import as_finite

from .kinds import kind_of
from .plan import CheckpointPlan, ComponentPlan

Loras = Sequence[tuple[str | Path, float]]
"""Files, folders or hub ids of LoRAs, and their weights."""


def with_loras(plan: CheckpointPlan, loras: Loras, hub: Hub) -> CheckpointPlan:
    """Return the plan with LoRAs added to the weights; of few steps, with their sampler, steps and guidance.

    Raises FileNotFoundError as `find_folder`; ValueError for a weight that is no number; CheckpointError for
    a LoRA that fits no network, only a part of its layers, or that holds parameters in full.
    """
    where = replace(hub, revision=None)  # the base model's
    for source, weight in loras:
        plan = _with_lora(plan, str(source), as_finite(f"the weight of {source}", weight), where)
    return plan


def _with_lora(plan: CheckpointPlan, source: str, weight: float, hub: Hub) -> CheckpointPlan:
    file = read_adapter(source, hub=hub)
    able = [c for c in plan.components if issubclass(c.cls, LoRAMixin)]
    networks = {c.cls.lora_component: c.cls.from_config(_bare(c)) for c in able}
    owners = {c.cls.lora_component: c.name for c in able}
    training = training_of_lora(source, file.path.name)
    counts = []
    for component in networks_of(file, networks):
        network, owner = networks[component], owners[component]
        dim = network.missing_condition(file) if isinstance(network, AddedCondition) else None
        if dim is not None:
            network.add_condition(dim)
            training = T2V_TURBO if is_list(file) else training
        changes = {path: (one, weight) for path, one in network.lora_changes(file, weights=False).items()}
        counts.append(f"{len(changes)} layers of the {owner or component}")
        parts = kind_of(type(network)).parts  # networks that have some of its parameters too
        components = [
            _changed(c, changes, dim, file.name, whole=c.name == owner) if c.name in (owner, *parts) else c
            for c in plan.components
        ]
        plan = replace(plan, components=components)
    notes = [*plan.notes, f"LoRA {source}: {', '.join(counts)}, weight {weight:g}"]
    if training is None or not weight or plan.index is None or plan.scheduler is None:
        return replace(plan, notes=notes)
    index = dict(plan.index)
    index["scheduler"] = ["diffusers", training.scheduler]
    own = index.get("_recommended")
    index["_recommended"] = {**(own if isinstance(own, dict) else {}), **training.recommended}
    settings = ", ".join(f"{key}={value!r}" for key, value in training.settings.items())
    made_for = f"{training.scheduler}{settings and ' with '}{settings}, as {training.title} was distilled for"
    notes.append(f"scheduler: {made_for}")
    scheduler = training.scheduler_config(plan.scheduler)
    return replace(plan, index=index, scheduler=scheduler, notes=notes)


def _bare(component: ComponentPlan) -> dict[str, Any]:
    """The config of a network without its quantization, which comes after LoRA."""
    return {key: value for key, value in component.config.items() if key != "quantization"}


def _changed(
    component: ComponentPlan,
    changes: dict[str, tuple[LowRank, float]],
    dim: int | None,
    name: str,
    whole: bool,
) -> ComponentPlan:
    """Return the plan of a network, or of a part of it, with changes of its layers, and with the projection
    of the guidance scale that has `dim` columns."""
    made: dict[str, Callable[[], mx.array]] = {}
    for path, (change, weight) in changes.items():
        if change.down is not None:
            made[f"{path}.weight"] = partial(_times, weight, change.change)
        if change.bias is not None:
            made[f"{path}.bias"] = partial(_times, weight * change.scaling, partial(_single, change.bias))
    there = {tensor.name for tensor in component.tensors}
    constants, config = dict(component.constants), dict(component.config)
    if dim is not None and whole:
        key = "time_embedding.cond_proj.weight"
        dtype = next(t.dtype for t in component.tensors if t.name == "time_embedding.linear_1.weight")
        constants[key] = made.pop(key)().astype(dtype)
        config["time_cond_proj_dim"] = dim
    missing = [key for key in made if key not in there]
    if missing and whole:
        raise CheckpointError(f"{name} changes {missing[0]}, which this network does not have")
    tensors = [
        replace(tensor, changes=(*tensor.changes, made[tensor.name])) if tensor.name in made else tensor
        for tensor in component.tensors
    ]
    reason = f"{component.reason}; with {Path(name).name}"
    return replace(component, config=config, tensors=tensors, constants=constants, reason=reason, folder=None)


def _times(weight: float, make: Callable[[], mx.array]) -> mx.array:
    return weight * make()


def _single(array: mx.array) -> mx.array:
    return array.astype(mx.float32)
