"""Small video networks and their inputs, all drawn by name from NumPy: the same on every machine, and in
torch."""

import zlib

import numpy as np

CONFIGS = {
    "UNetMotionModel": dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=12,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
    ),
    "UNetSpatioTemporalConditionModel": dict(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=12,
        num_attention_heads=(2, 4),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        sample_size=8,
    ),
    "I2VGenXLUNet": dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
    ),
    "AutoencoderKLTemporalDecoder": dict(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=2,
        sample_size=16,
    ),
}


def normal(name: str, *shape: int) -> np.ndarray:
    """Normally distributed float32 of a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter (in torch's layout), none of them trivial."""
    noise = normal(name, *shape)
    if len(shape) > 1:
        return noise * np.float32(np.prod(shape[1:]) ** -0.5)
    scale = "norm" in name and name.endswith("weight")
    return 0.1 * noise + np.float32(scale + (0.4 if name.endswith("mix_factor") else 0))


def inputs(
    kind: str, batch: int = 2, frames: int = 3, height: int = 6, width: int = 5
) -> list[np.ndarray | float]:
    """The arguments of a forward, in the order of the network's call."""
    video = (frames, height, width)
    if kind == "UNetMotionModel":
        text = normal("text", batch, 4, 12).repeat(frames, axis=0)
        return [normal("sample", batch, 4, *video), 500.0, text]
    if kind == "UNetSpatioTemporalConditionModel":
        ids = np.array([[6, 127, 0.02]] * batch, np.float32)
        return [normal("sample", batch, frames, 8, height, width), 0.7, normal("image", batch, 1, 12), ids]
    if kind == "I2VGenXLUNet":
        fps = np.array([16, 8][:batch], np.float32)
        latents, image = normal("latents", batch, 4, *video), normal("image", batch, 12)
        return [normal("sample", batch, 4, *video), 500.0, fps, latents, image, normal("text", batch, 4, 12)]
    return [normal("z", batch * frames, 4, height, width), frames]
