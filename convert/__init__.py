"""The converter: checkpoints as they are found -> folders that load at once, without torch.

In a checkout this folder runs as `python -m convert`; installed it is the package `mlx_unet3d_convert`
and the command `mlx-unet3d convert`.
"""

from .conversion import convert
from .plan import ComponentPlan, TensorPlan
from .planning import plan_checkpoint

__all__ = ["ComponentPlan", "TensorPlan", "convert", "plan_checkpoint"]
