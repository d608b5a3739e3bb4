"""The converter: any checkpoint -> a folder that loads directly, without torch.

In a checkout, this folder runs as `python -m convert`; installed it is the package `mlx_unet3d_convert`
and the command `mlx-unet3d convert`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert
    from .plan import ComponentPlan, TensorPlan
    from .planning import plan_checkpoint

__all__ = ["ComponentPlan", "TensorPlan", "convert", "plan_checkpoint"]

_MODULES = {
    "convert": "conversion",
    "plan_checkpoint": "planning",
    "ComponentPlan": "plan",
    "TensorPlan": "plan",
}


def __getattr__(name: str) -> Any:
    # Not at the top: without a backend MLX cannot be imported, which the command says in one line.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
