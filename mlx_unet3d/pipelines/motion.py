"""Shared by the pipelines of AnimateDiff: their components, how these are read, and their guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from ..checkpoints import find_folder, read_component_config, read_json
from ..errors import CheckpointError
from ..models.autoencoder_kl import AutoencoderKL
from ..models.clip_text import CLIPTextModel
from ..models.motion_adapter import MotionAdapter
from ..models.unet_motion import UNetMotionModel
from ..schedulers import Scheduler
from ..tokenizer import CLIPTokenizer
from .adapters import AdapterMethods
from .calls import VideoPipeline
from .components import Part, is_listed
from .free_init import FreeInitMethods
from .free_noise import FreeNoiseMethods
from .guidance import Guidance, Predict
from .image_prompts import IMAGE_PARTS, ImagePrompts, ImageStates
from .sampling import Sampling
from .windows import in_windows

Pair = tuple[Any, Any]
"""For the positive rows, and for the negative ones or None."""


class MotionPipeline(FreeNoiseMethods, FreeInitMethods, ImagePrompts, AdapterMethods, VideoPipeline):
    """Base of the pipelines with a `UNetMotionModel`.

    Args:
        unet, vae, text_encoder, tokenizer, scheduler: the components; `from_pretrained` reads all. A run lays
            out its own copy of the scheduler.
        feature_extractor, image_encoder: for images as prompts, see `load_ip_adapter`.
        recommended: what the checkpoint says of its use.

    Raises ValueError where the components do not fit together.
    """

    parts: ClassVar[dict[str, Part]] = {
        "unet": Part((UNetMotionModel,)),
        "vae": Part((AutoencoderKL,), is_wide=True),
        "text_encoder": Part((CLIPTextModel,)),
        "tokenizer": Part((CLIPTokenizer,)),
        "scheduler": Part((Scheduler,)),
        **IMAGE_PARTS,
    }

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        motion_adapter: str | Path | MotionAdapter | None = None,
        **options: Any,
    ) -> Any:
        """Read a pipeline folder or hub id: one of AnimateDiff, or one of Stable Diffusion and a motion
        adapter.

        Args:
            motion_adapter: folder, hub id or lone file of one, or a loaded one. It makes a Stable Diffusion
                UNet move, and takes the place of the motion modules of a UNet that has some.
            options: arguments of `VideoPipeline.from_pretrained`, such as `dtype`.

        Raises CheckpointError for a folder of Stable Diffusion without a motion adapter, ValueError for a
        motion adapter of another base model, and as `VideoPipeline.from_pretrained`.
        """

        def read(path_or_id: str | Path, **how: Any) -> UNetMotionModel:
            return _read_unet(path_or_id, motion_adapter, **how)

        return super().from_pretrained(path_or_id, readers={"unet": read}, **options)

    @property
    def motion_adapter(self) -> MotionAdapter:
        """The motion modules of the UNet, whose arrays it shares."""
        self._need("unet")
        return self.unet.motion_adapter()

    def _guidance(
        self,
        text: tuple[mx.array, mx.array | None],
        images: ImageStates,
        sampling: Sampling,
        steps: int,
        conditions: Sequence[Mapping[str, mx.array]] = ({}, {}),
    ) -> Predict:
        """The network for a run, with text states (B, L, D) or (B, F, L, D), images and other conditions as
        inputs."""

        def network(sample: mx.array, timestep: float, **inputs: Any) -> mx.array:
            return self.unet(sample, timestep, **inputs).sample

        positive, negative = (
            None
            if states is None
            else {
                "encoder_hidden_states": states.astype(self.unet.dtype),
                "cross_attention_kwargs": sampling.cross_attention_kwargs,
                "added_cond_kwargs": {**more, **({} if its is None else {"image_embeds": its})},
            }
            for states, its, more in zip(text, images, conditions, strict=True)
        )
        predict = Guidance(
            network,
            sampling,
            positive,
            negative,
            steps=steps,
            dtype=self.unet.dtype,
            sequential=self.sequential_guidance,
        )
        return in_windows(predict, sampling)


def _read_unet(
    path_or_id: str | Path,
    motion_adapter: str | Path | MotionAdapter | None,
    *,
    subfolder: str,
    dtype: mx.Dtype | None,
    variant: str | None,
    **hub: Any,
) -> UNetMotionModel:
    """Read the UNet of a folder; one of Stable Diffusion with a motion adapter, given or the folder's."""
    how: dict[str, Any] = dict(subfolder=subfolder, dtype=dtype, variant=variant, **hub)
    config = read_component_config(path_or_id, "config.json", subfolder=subfolder, **hub)
    if config.get("_class_name") != "UNet2DConditionModel":
        unet = UNetMotionModel.from_pretrained(path_or_id, **how)
        if motion_adapter is not None:
            where = {name: value for name, value in hub.items() if name != "revision"}
            if not isinstance(motion_adapter, MotionAdapter):
                motion_adapter = MotionAdapter.from_pretrained(motion_adapter, **where)
            unet.load_motion_modules(motion_adapter)
        return unet
    if motion_adapter is None:
        index = read_json(find_folder(path_or_id, files=("model_index.json",), **hub) / "model_index.json")
        if not is_listed(index, "motion_adapter", Part((MotionAdapter,), is_optional=True)):
            raise CheckpointError(
                f"{path_or_id} holds Stable Diffusion, whose UNet makes images; give the motion modules of "
                "AnimateDiff as well: motion_adapter=, a folder, file or hub id"
            )
        motion_adapter = MotionAdapter.from_pretrained(path_or_id, subfolder="motion_adapter", **hub)
    return UNetMotionModel.from_unet2d(path_or_id, motion_adapter, **how)
