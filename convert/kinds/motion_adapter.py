"""MotionAdapter: the motion modules of AnimateDiff, AnimateLCM, AnimateDiff-Lightning and PIA."""

from typing import Any

import mlx_unet3d
from mlx_unet3d.checkpoints.shapes import Shapes
from mlx_unet3d.models.motion_adapter import infer_adapter

from .kind import Family, Kind, diffusers_files, own_names

MODULE = "down_blocks.0.motion_modules.0"


def infer(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `Inference`."""
    assumed = dict(motion_num_attention_heads=8, motion_norm_num_groups=32)
    if not any(name.endswith(".pe") for name in shapes.shapes):
        assumed["motion_max_seq_length"] = 32
    return {k: v for k, v in infer_adapter(shapes).items() if k not in assumed}, assumed


MOTION_ADAPTER = Kind(
    mlx_unet3d.MotionAdapter,
    "motion_adapter",
    (
        Family(
            "a motion module of AnimateDiff",
            tuple(
                f"{MODULE}.temporal_transformer.{name}.weight"
                for name in ("norm", "proj_in", "transformer_blocks.0.attention_blocks.0.to_q")
            ),
            own_names(mlx_unet3d.MotionAdapter),
        ),
        diffusers_files(
            mlx_unet3d.MotionAdapter,
            f"{MODULE}.norm.weight",
            f"{MODULE}.transformer_blocks.0.attn1.to_q.weight",
            without=("down_blocks.0.resnets.0.conv1.weight",),
        ),
    ),
    infer,
    None,
)
