"""Video to video with a 3D UNet: diffusers' VideoToVideoSDPipeline, ZeroScope XL's second pass."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .decoding import VideoOutput
from .denoising import Steps, denoise, fold_frames, unfold_frames
from .frames import as_pixels
from .sampling import BatchNoise, Delivery, Sampling, takes, text_lora_scale
from .text import checked_states
from .text_to_video import UNet3DPipeline


class VideoToVideoPipeline(UNet3DPipeline):
    """Videos from videos and prompts: noise is added to the input and removed again."""

    default_guidance_scale = 15.0

    @takes(Sampling, Delivery)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        video: Any = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = None,
        **options: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make videos of the size of the input.

        Args:
            prompt: one, or one a video; or `prompt_embeds` (B, L, D) instead.
            video: frames (F, H, W, 3) or (B, F, H, W, 3), uint8 or floats in [0, 1], as NumPy array; a list
                of images or arrays (H, W, 3); a list of one such list or array a prompt; or latents
                (B, C, F, h, w) as mx.array. H and W of at least 8; the video is made without the rows and
                columns that multiples of 8 leave over at the right and below, as in diffusers.
            strength: how much to change, above 0 and at most 1: that share of the steps is run.

        The other arguments are those of `TextToVideoPipeline`; `guidance_scale` is 15 where neither the
        call nor the checkpoint says more.

        Raises ValueError or TypeError for arguments out of range, NonFiniteError when numbers overflow.
        """
        # 1. Settings, all checked before the work begins
        options |= dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        settings, delivery = self._options(options)
        # 2. Prompt -> states (B, L, D)
        states = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            lora_scale=text_lora_scale(settings),
        )
        self._done_with("text_encoder")
        # 3. Video -> latents -> noised, denoised step by step -> frames
        copies = delivery.num_videos_per_prompt
        steps = self.steps(states, video, strength=strength, num_videos_per_prompt=copies, **settings)
        return self._deliver(steps, delivery)

    @takes(Sampling)
    def steps(
        self,
        states: tuple[mx.array, mx.array | None],
        video: Any,
        *,
        strength: float = 0.6,
        num_videos_per_prompt: int = 1,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone; see `TextToVideoPipeline.steps`."""
        self._need("unet")
        sampling = self.sampling(**settings)
        states = checked_states(states, sampling)
        videos = states.prompt_embeds.shape[0]
        states = states.repeated(num_videos_per_prompt)
        batch = states.prompt_embeds.shape[0]
        scheduler, noise = sampling.lay_out(self.scheduler), sampling.noise(batch)
        first = first_step(strength, scheduler.num_inference_steps) * scheduler.order

        clean = fold_frames(self._encode_video(video, videos, num_videos_per_prompt, noise))
        scheduler.set_begin_index(first)
        start = scheduler.timesteps[first : first + 1]
        latents = scheduler.add_noise(clean, noise(tuple(clean.shape)), start)
        latents = unfold_frames(latents, batch)
        mx.eval(latents)  # so that another thread can run the steps
        return denoise(
            self._guidance(states, sampling, len(scheduler.timesteps) - first),
            scheduler,
            latents,
            noise=noise,
            eta=sampling.eta,
            predictions=predictions,
            first_step=first,
            folded=True,
        )

    def _encode_video(self, video: Any, batch: int, copies: int, noise: BatchNoise) -> mx.array:
        """-> latents (B * copies, C, F, h, w)."""
        self._need("vae")
        channels = self.vae.config.latent_channels
        if isinstance(video, mx.array):
            if video.ndim != 5 or video.shape[:2] != (batch, channels):
                raise ValueError(
                    f"video has shape {tuple(video.shape)}; an mx.array must hold latents "
                    f"({batch}, {channels}, frames, height, width)"
                )
            return mx.repeat(video.astype(mx.float32), copies, axis=0)
        pixels = as_pixels(video)
        factor = self.vae_scale_factor
        if pixels.shape[0] != batch or min(pixels.shape[2:4]) < factor:
            raise ValueError(
                f"video has shape {pixels.shape}; it must be ({batch}, frames, height, width, 3), one a "
                f"prompt, with height and width of at least {factor}"
            )
        each_its_own = len(noise.sources) > 1
        if each_its_own:
            pixels = np.repeat(pixels, copies, axis=0)
        # (B, F, H, W, 3) in [0, 1] -> (B*F, 3, H, W) in [-1, 1]
        images = mx.array(pixels.reshape(-1, *pixels.shape[2:])).transpose(0, 3, 1, 2) * 2 - 1
        latents = self.vae.encode(images).sample(noise)
        latents = unfold_frames(self.vae.scale_latents(latents.astype(mx.float32)), pixels.shape[0])
        return latents if each_its_own else mx.repeat(latents, copies, axis=0)


def first_step(strength: float, num_inference_steps: int) -> int:
    """Return the step at which a run of so many begins; ValueError for a strength that leaves none to run."""
    run = min(int(num_inference_steps * strength), num_inference_steps) if 0 < strength <= 1 else 0
    if run < 1:
        raise ValueError(
            f"strength={strength} with num_inference_steps={num_inference_steps} leaves no step to run; "
            f"use a strength from {1 / num_inference_steps:.3g} to 1"
        )
    return num_inference_steps - run
