"""Video to video with a 3D UNet: diffusers' VideoToVideoSDPipeline, ZeroScope XL's second pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .base import BatchNoise, VideoOutput, VideoPipeline
from .denoising import DenoisingStep, denoise, fold_frames, unfold_frames
from .text import stacked


class VideoToVideoPipeline(VideoPipeline):
    """Videos from videos and prompts: noise is added to the input and removed again."""

    default_guidance_scale = 15.0

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        video: Any = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback: Callable[[int, float, mx.array], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        rng: str = "torch",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_interval: int = 1,
        cache_depth: int = 1,
        progress: bool = False,
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
        num_inference_steps = self.num_inference_steps(num_inference_steps)
        guidance_scale = self.guidance_scale(guidance_scale)
        self._check_call(num_inference_steps, guidance_scale, eta, output_type, callback_steps)
        states = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
        )
        self._done_with("text_encoder")
        steps = self.steps(
            states,
            video,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            seed=seed,
            cross_attention_kwargs=cross_attention_kwargs,
            rng=rng,
            guidance_interval=guidance_interval,
            cache_interval=cache_interval,
            cache_depth=cache_depth,
        )
        return self._finish(steps, output_type, return_dict, callback, callback_steps, progress)

    def steps(
        self,
        states: tuple[mx.array, mx.array | None],
        video: Any,
        *,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        rng: str = "torch",
        predictions: Sequence[mx.array] = (),
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_interval: int = 1,
        cache_depth: int = 1,
    ) -> Iterator[DenoisingStep]:
        """The denoising loop alone; see `TextToVideoPipeline.steps`."""
        num_inference_steps = self.num_inference_steps(num_inference_steps)
        guidance_scale = self.guidance_scale(guidance_scale)
        self._need("unet")
        self._check_call(num_inference_steps, guidance_scale, eta)
        self._check_savings(guidance_scale, guidance_interval, cache_interval, cache_depth)
        text_states = stacked(states, guidance_scale)
        batch = states[0].shape[0]
        noise = BatchNoise(seed, rng, batch)
        scheduler = self.scheduler.laid_out(num_inference_steps)
        run = min(int(num_inference_steps * strength), num_inference_steps) if 0 < strength <= 1 else 0
        if run < 1:
            raise ValueError(
                f"strength={strength} with num_inference_steps={num_inference_steps} leaves no step to run; "
                f"use a strength from {1 / num_inference_steps:.3g} to 1"
            )
        first = (num_inference_steps - run) * scheduler.order

        clean = self._encode_video(video, batch, noise)  # (N, C, h, w)
        scheduler.set_begin_index(first)
        start = scheduler.timesteps[first : first + 1]
        latents = scheduler.add_noise(clean, noise(tuple(clean.shape)), start)
        latents = unfold_frames(latents, batch)
        mx.eval(latents, text_states)  # so that another thread can run the steps
        return denoise(
            self.unet,
            scheduler,
            latents,
            text_states,
            guidance_scale=guidance_scale,
            first_step=first,
            eta=eta,
            noise=noise,
            cross_attention_kwargs=cross_attention_kwargs,
            predictions=predictions,
            guidance_interval=guidance_interval,
            cache_interval=cache_interval,
            cache_depth=cache_depth,
            sequential_guidance=self.sequential_guidance,
        )

    def _encode_video(self, video: Any, batch: int, noise: BatchNoise) -> mx.array:
        """-> latents (B*F, C, h, w)."""
        channels = self.vae.config.latent_channels
        if isinstance(video, mx.array):
            if video.ndim != 5 or video.shape[:2] != (batch, channels):
                raise ValueError(
                    f"video has shape {tuple(video.shape)}; an mx.array must hold latents "
                    f"({batch}, {channels}, frames, height, width)"
                )
            return fold_frames(video).astype(mx.float32)
        pixels = as_pixels(video)
        factor = self.vae_scale_factor
        if pixels.shape[0] != batch or min(pixels.shape[2:4]) < factor:
            raise ValueError(
                f"video has shape {pixels.shape}; it must be ({batch}, frames, height, width, 3), one a "
                f"prompt, with height and width of at least {factor}"
            )
        # (B, F, H, W, 3) in [0, 1] -> (B*F, 3, H, W) in [-1, 1]
        images = mx.array(pixels.reshape(-1, *pixels.shape[2:])).transpose(0, 3, 1, 2) * 2 - 1
        latents = self.vae.encode(images).sample(noise)
        return self.vae.scale_latents(latents.astype(mx.float32))


def as_pixels(video: Any) -> np.ndarray:
    """Frames in any accepted form -> float32 (B, F, H, W, 3) in [0, 1]; TypeError or ValueError else."""
    if video is None:
        raise ValueError("video is None; give frames (F, H, W, 3), a list of images, or latents")
    if isinstance(video, list | tuple):
        if not video:
            raise ValueError("video is an empty list; it must have at least one frame")
        parts = [as_array(part) for part in video]
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"the frames of video differ in shape: {sorted(shapes)}")
        # Arrays of five axes are batches already.
        video = np.concatenate(parts) if parts[0].ndim == 5 else np.stack(parts)
    if not isinstance(video, np.ndarray):
        raise TypeError(
            f"video is a {type(video).__name__}; give a NumPy array, a list of images or an mx.array"
        )
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video has shape {video.shape}; it must be (frames, height, width, 3)")
    if video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    if not np.issubdtype(video.dtype, np.floating):
        raise TypeError(f"video is {video.dtype}; it must be uint8, or floats in [0, 1]")
    if not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(
            f"video has values from {video.min():.3g} to {video.max():.3g}; floats must lie in [0, 1]"
        )
    return video.astype(np.float32)


def as_array(part: Any) -> np.ndarray:
    """A frame (H, W, 3) of an image, frames (F, H, W, 3) of a list of them; an array as it is."""
    if isinstance(part, Image.Image):
        return np.asarray(part.convert("RGB"))
    if isinstance(part, list | tuple) and part:
        frames = [as_array(frame) for frame in part]
        shapes = {frame.shape for frame in frames}
        if len(shapes) > 1:
            raise ValueError(f"the frames of video differ in shape: {sorted(shapes)}")
        return np.stack(frames)
    if not isinstance(part, np.ndarray):
        raise TypeError(f"video has a {type(part).__name__} in it; give images or NumPy arrays")
    return part
