"""The families of pipelines, told by their UNet: their networks, the stages before denoising, their sizes."""

from dataclasses import dataclass
from typing import Any

from ..models.pretrained import PretrainedModel
from ..models.unet_3d_condition import UNet3DConditionModel
from ..models.unet_i2vgen_xl import I2VGenXLUNet
from ..models.unet_motion import UNetMotionModel
from ..models.unet_spatio_temporal import UNetSpatioTemporalConditionModel


@dataclass(frozen=True)
class Family:
    """Facts that the pipelines with one class of UNet have in common.

    Attributes:
        encoders: networks beside UNet and VAE that a folder must have.
        optional: and those that it may have.
        from_image: whether the VAE encodes an image before denoising.
        size: default height and width in pixels; None for the `sample_size` of the UNet.
    """

    encoders: tuple[str, ...] = ("text_encoder",)
    optional: tuple[str, ...] = ()
    from_image: bool = False
    size: tuple[int, int] | None = None

    def default_frames(self, config: Any) -> int:
        """The frames of the UNet's config, or 16."""
        return config.get("num_frames") or 16


FAMILIES: dict[type[PretrainedModel], Family] = {
    UNet3DConditionModel: Family(),
    UNetMotionModel: Family(optional=("text_encoder_2",)),
    UNetSpatioTemporalConditionModel: Family(("image_encoder",), from_image=True, size=(576, 1024)),
    I2VGenXLUNet: Family(("text_encoder", "image_encoder"), from_image=True, size=(704, 1280)),
}
