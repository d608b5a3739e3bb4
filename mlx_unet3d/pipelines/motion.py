"""Shared by the pipelines of AnimateDiff: their components, how these are read, and their guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from ..checkpoints import find_folder, read_component_config, read_json
from ..checkpoints.hub import Hub
from ..diffusers_names import answers_diffusers
from ..errors import CheckpointError
from ..models.autoencoder_kl import AutoencoderKL
from ..models.clip_text import CLIPTextModel
from ..models.motion_adapter import MotionAdapter
from ..models.unet_motion import UNetMotionModel
from ..scalars import as_count
from ..schedulers import Scheduler
from ..tokenizer import CLIPTokenizer
from .adapters import AdapterMethods
from .calls import VideoPipeline
from .components import Part, is_listed
from .denoising import Steps, start_latents
from .free_init import FreeInitMethods, Run, denoise_again
from .free_noise import FreeNoiseMethods, check_text_of_frames
from .image_prompts import IMAGE_PARTS, ImagePrompts, PromptImages
from .predict import Predict
from .sampling import Sampling
from .windows import ContextWindows


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
        "text_encoder": Part((CLIPTextModel,), may_be_none=True),
        "tokenizer": Part((CLIPTokenizer,), may_be_none=True),
        "scheduler": Part((Scheduler,)),
        **IMAGE_PARTS,
    }

    @classmethod
    @answers_diffusers
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

    def _from_noise(
        self,
        text: tuple[mx.array, mx.array | None],
        sampling: Sampling,
        *,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        latents: mx.array | None,
        ip_adapter_image_embeds: Sequence[mx.array] | None,
        predictions: Sequence[mx.array],
        conditions: Sequence[Mapping[str, mx.array]] = ({}, {}),
        denoising_end: float | None = None,
    ) -> Steps:
        """Return the denoising loop of a run that begins with noise."""
        num_frames = as_count("num_frames", self.num_frames(num_frames))
        self.check_frames(num_frames, sampling.context_windows)
        batch = text[0].shape[0]
        check_text_of_frames(text[0], num_frames)
        images = self._image_states(ip_adapter_image_embeds, batch, sampling.is_guided)
        shape = (batch, self.unet.config.in_channels, num_frames, *self.latent_size(height, width))
        noise, schedulers = sampling.noise(batch), self._schedulers(sampling)
        latents = start_latents(shape, self._long_noise(shape, latents, noise), noise, schedulers[0])
        mx.eval(latents)  # so that another thread can run the steps
        stops = [end_step(denoising_end, scheduler) for scheduler in schedulers]
        networks = {n: self._guidance(text, images, sampling, n, conditions) for n in set(stops)}
        runs = [Run(networks[n], scheduler, n) for n, scheduler in zip(stops, schedulers, strict=True)]
        return denoise_again(
            runs, latents, self.free_init, noise=noise, eta=sampling.eta, predictions=predictions
        )

    def check_frames(self, num_frames: int, context_windows: ContextWindows | None = None) -> None:
        """Raise ValueError for more frames than the network can see at a time; see `enable_free_noise` and
        `ContextWindows` for these."""
        self._need("unet")
        if context_windows is None or num_frames <= context_windows.length:
            self.unet.check_frames(num_frames)
        else:
            self.unet.check_frames(context_windows.length, "length of context_windows")

    @property
    def motion_adapter(self) -> MotionAdapter:
        """The motion modules of the UNet, whose arrays it shares."""
        self._need("unet")
        return self.unet.motion_adapter()

    def _guidance(
        self,
        text: tuple[mx.array, mx.array | None],
        images: PromptImages,
        sampling: Sampling,
        steps: int,
        conditions: Sequence[Mapping[str, mx.array]] = ({}, {}),
    ) -> Predict:
        """The network for a run, with text states (B, L, D) or (B, F, L, D), images and other conditions as
        inputs."""

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
        return self._predict(sampling, positive, negative, steps)


def end_step(denoising_end: float | None, scheduler: Scheduler) -> int:
    """Return the place in a schedule before which a run ends that denoises only a share of the noise.

    Raises ValueError for a share out of range, or one that leaves no step to run.
    """
    if denoising_end is None:
        return len(scheduler.timesteps)
    total = scheduler.config.num_train_timesteps
    last = round(total - denoising_end * total) if 0 < denoising_end <= 1 else math.inf
    stop = int((scheduler.timesteps >= last).sum())
    if not stop:
        raise ValueError(
            f"denoising_end={denoising_end} with {len(scheduler.timesteps)} steps leaves no step to run; use "
            "a share of the noise, up to 1"
        )
    return stop


def _read_unet(
    path_or_id: str | Path,
    motion_adapter: str | Path | MotionAdapter | None,
    *,
    subfolder: str,
    dtype: mx.Dtype | None,
    variant: str | None,
    hub: Hub,
) -> UNetMotionModel:
    """Read the UNet of a folder; one of Stable Diffusion with a motion adapter, given or the folder's."""
    how: dict[str, Any] = dict(subfolder=subfolder, dtype=dtype, variant=variant, hub=hub)
    config = read_component_config(path_or_id, "config.json", subfolder=subfolder, hub=hub)
    if config.get("_class_name") != "UNet2DConditionModel":
        unet = UNetMotionModel.from_pretrained(path_or_id, **how)
        if motion_adapter is not None:
            if not isinstance(motion_adapter, MotionAdapter):
                own = replace(hub, revision=None)  # the revision is that of the folder
                motion_adapter = MotionAdapter.from_pretrained(motion_adapter, hub=own)
            unet.load_motion_modules(motion_adapter)
        return unet
    if motion_adapter is None:
        index = read_json(find_folder(path_or_id, files=("model_index.json",), hub=hub) / "model_index.json")
        if not is_listed(index, "motion_adapter", Part((MotionAdapter,), is_optional=True)):
            raise CheckpointError(
                f"{path_or_id} holds Stable Diffusion, whose UNet makes images; give the motion modules of "
                "AnimateDiff as well: motion_adapter=, or --motion-adapter, a folder, file or hub id"
            )
        motion_adapter = MotionAdapter.from_pretrained(path_or_id, subfolder="motion_adapter", hub=hub)
    return UNetMotionModel.from_unet2d(path_or_id, motion_adapter, **how)
