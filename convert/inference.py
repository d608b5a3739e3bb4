"""The config of a network from the names and shapes of its tensors, for files without a `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx_unet3d
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import PretrainedModel

_TRANSFORMER_IN_HEADS = 8  # of any UNet3DConditionModel
_CLIP_HEAD_DIM = 64  # of all published CLIP text towers


@dataclass(frozen=True)
class Shapes:
    """The shapes of a network's tensors, by parameter name.

    Attributes:
        where: the file, for messages.
        shapes: by name, as they lie in the file.
        layout: "mlx" or "diffusers".
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    layout: str

    def outputs(self, name: str) -> int:
        """The first axis of a tensor: output channels, rows."""
        return self._axis(name, 0)

    def inputs(self, name: str) -> int:
        """The axis of input channels."""
        return self._axis(name, -1 if self.layout == "mlx" else 1)

    def count(self, name: str) -> int:
        """How many tensors there are of a name with `{}` for their numbers, from 0 on."""
        number = 0
        while name.format(number) in self.shapes:
            number += 1
        return number

    def _axis(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.where} has no tensor for the parameter {name!r}, whose shape tells the config; is "
                "the file whole? If not, download it again"
            )
        if len(shape) <= max(axis, 0):
            raise CheckpointError(f"{self.where}: {name!r} has shape {shape}, which is not one of its kind")
        return shape[axis]


def infer_config(cls: type[PretrainedModel], shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config that the shapes tell, and the keys that no shape tells, with ModelScope's values.

    Raises CheckpointError where a tensor that tells something is missing.
    """
    return _INFERENCES[cls](shapes)


def _unet(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    levels = range(shapes.count("down_blocks.{}.resnets.0.conv1.weight"))
    ups = range(shapes.count("up_blocks.{}.resnets.0.conv1.weight"))

    def attends(path: str) -> bool:
        return f"{path}.attentions.0.norm.weight" in shapes.shapes

    told = dict(
        in_channels=shapes.inputs("conv_in.weight"),
        out_channels=shapes.outputs("conv_out.weight"),
        down_block_types=tuple(
            "CrossAttnDownBlock3D" if attends(f"down_blocks.{i}") else "DownBlock3D" for i in levels
        ),
        up_block_types=tuple("CrossAttnUpBlock3D" if attends(f"up_blocks.{i}") else "UpBlock3D" for i in ups),
        block_out_channels=tuple(shapes.outputs(f"down_blocks.{i}.resnets.0.conv1.weight") for i in levels),
        layers_per_block=shapes.count("down_blocks.0.resnets.{}.conv1.weight"),
        cross_attention_dim=shapes.inputs(
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        ),
        attention_head_dim=shapes.outputs("transformer_in.proj_in.weight") // _TRANSFORMER_IN_HEADS,
    )
    if "time_embedding.cond_proj.weight" in shapes.shapes:
        told["time_cond_proj_dim"] = shapes.inputs("time_embedding.cond_proj.weight")
    assumed = dict(
        norm_num_groups=32,
        norm_eps=1e-5,
        act_fn="silu",
        downsample_padding=1,
        mid_block_scale_factor=1,
        sample_size=32,
    )
    return told, assumed


def _vae(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    levels = range(shapes.count("encoder.down_blocks.{}.resnets.0.conv1.weight"))
    told = dict(
        in_channels=shapes.inputs("encoder.conv_in.weight"),
        out_channels=shapes.outputs("decoder.conv_out.weight"),
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * shapes.count("decoder.up_blocks.{}.resnets.0.conv1.weight"),
        block_out_channels=tuple(
            shapes.outputs(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in levels
        ),
        layers_per_block=shapes.count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        latent_channels=shapes.inputs("decoder.conv_in.weight"),
        use_quant_conv="quant_conv.weight" in shapes.shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes.shapes,
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes.shapes,
    )
    return told, dict(norm_num_groups=32, act_fn="silu", scaling_factor=0.18215, sample_size=512)


def _text(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens, layer = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.{}"
    width = shapes.inputs(tokens)
    if width % _CLIP_HEAD_DIM:
        raise CheckpointError(
            f"{shapes.where}: hidden_size={width} does not tell the number of attention heads, which have "
            f"{_CLIP_HEAD_DIM} channels each in CLIP; put a config.json beside a model of other heads"
        )
    told = dict(
        vocab_size=shapes.outputs(tokens),
        hidden_size=width,
        intermediate_size=shapes.outputs(f"{layer.format(0)}.mlp.fc1.weight"),
        num_hidden_layers=shapes.count(f"{layer}.mlp.fc1.weight"),
        max_position_embeddings=shapes.outputs("text_model.embeddings.position_embedding.weight"),
    )
    assumed = dict(num_attention_heads=width // _CLIP_HEAD_DIM, hidden_act="gelu", layer_norm_eps=1e-5)
    return told, assumed


_INFERENCES = {
    mlx_unet3d.UNet3DConditionModel: _unet,
    mlx_unet3d.AutoencoderKL: _vae,
    mlx_unet3d.CLIPTextModel: _text,
}
