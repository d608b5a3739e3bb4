"""Video to video with AnimateDiff: diffusers' AnimateDiffVideoToVideoPipeline."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..image_processor import Pictures
from ..scalars import as_count
from ..schedulers import Scheduler
from .decoding import VideoOutput
from .denoising import Steps
from .frames import as_frames, resized
from .free_init import FreeInit, Run, denoise_again
from .free_noise import Prompts, check_text_of_frames
from .motion import MotionPipeline
from .sampling import BatchNoise, Delivery, Sampling, takes, text_lora_scale
from .text import checked_states
from .video_to_video import first_step

ENCODED_AT_ONCE = 16
"""Frames whose noise is drawn at once while a video is encoded, where a call says nothing else."""


class AnimateDiffVideoToVideoPipeline(MotionPipeline):
    """Videos from videos and prompts, with a Stable Diffusion model that moves.

    Of FreeNoise it takes the windows and prompts of frames; its noise is always new, as in diffusers. With
    FreeInit, as there, each iteration runs `strength` of as many steps as the one before ran: 50 steps with
    strength 0.8 are 40 without it, and 32, 25 and 20 in three iterations.
    """

    class_names = ("AnimateDiffVideoToVideoPipeline", "AnimateDiffPipeline", "StableDiffusionPipeline")
    default_guidance_scale = 7.5

    @takes(Sampling, Delivery)
    def __call__(
        self,
        video: Any = None,
        prompt: Prompts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        enforce_inference_steps: bool = False,
        guidance_scale: float | None = None,
        strength: float = 0.8,
        negative_prompt: Prompts | None = None,
        latents: mx.array | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        ip_adapter_image: Pictures | Sequence[Pictures] | None = None,
        ip_adapter_image_embeds: Sequence[mx.array] | None = None,
        clip_skip: int | None = None,
        decode_chunk_size: int | None = None,
        **options: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make videos.

        Args:
            video: frames (F, H, W, 3) or (B, F, H, W, 3), uint8 or floats in [0, 1]; a list of images or
                arrays (H, W, 3); a list of one such list or array a prompt. They are resized.
            height, width: of the result, in pixels, multiples of 8; default: what the UNet was trained on.
            enforce_inference_steps: run `num_inference_steps` steps whatever the strength, of a schedule
                with more; else only a share of them.
            strength: how much to change, above 0 and at most 1: the share of the schedule that is run.
            latents: (B, C, F, h, w) to start from in place of a video; noisy already, and with
                `enforce_inference_steps` clean.
            decode_chunk_size: frames to decode at a time, without effect on the result; the noise that
                encoding draws is drawn for as many (default: 16).

        The other arguments are those of `AnimateDiffPipeline`.

        Raises ValueError or TypeError for arguments out of range, NonFiniteError when numbers overflow.
        """
        # 1. Settings, all checked before the work begins
        options |= dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        settings, delivery = self._options(options)
        # 2. Prompt -> states (B, L, D), or with a text a frame (B, F, L, D)
        frames = None
        if any(isinstance(text, Mapping) for text in (prompt, negative_prompt)):
            frames = (as_frames(video) if latents is None else latents.transpose(0, 2, 1, 3, 4)).shape[1]
        states = self.encode_prompt(
            prompt,
            negative_prompt,
            num_frames=frames,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            lora_scale=text_lora_scale(settings),
        )
        # 3. Images -> embeddings (2, n, P) for each IP-Adapter
        images = self._image_embeds(ip_adapter_image, ip_adapter_image_embeds, guidance_scale)
        self._done_with("text_encoder", "image_encoder")
        # 4. Video -> latents -> noised, denoised step by step -> frames
        steps = self.steps(
            states,
            video,
            height=height,
            width=width,
            enforce_inference_steps=enforce_inference_steps,
            strength=strength,
            latents=latents,
            ip_adapter_image_embeds=images,
            num_videos_per_prompt=delivery.num_videos_per_prompt,
            encode_chunk_size=decode_chunk_size or ENCODED_AT_ONCE,
            **settings,
        )
        return self._deliver(steps, delivery, decode_chunk_size)

    @takes(Sampling)
    def steps(
        self,
        states: tuple[mx.array, mx.array | None],
        video: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        enforce_inference_steps: bool = False,
        strength: float = 0.8,
        latents: mx.array | None = None,
        ip_adapter_image_embeds: Sequence[mx.array] | None = None,
        num_videos_per_prompt: int = 1,
        encode_chunk_size: int = ENCODED_AT_ONCE,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone; see `AnimateDiffPipeline.steps`."""
        self._need("unet")
        sampling = self.sampling(**settings)
        states = checked_states(states, sampling)
        videos = states.prompt_embeds.shape[0]
        states = states.repeated(num_videos_per_prompt)
        batch = states.prompt_embeds.shape[0]
        images = self._image_states(ip_adapter_image_embeds, batch, sampling.is_guided)
        noise = sampling.noise(batch)
        # The schedule, and the place in it where the run begins
        count = sampling.num_inference_steps
        if enforce_inference_steps:
            if not 0 < strength <= 1:
                raise ValueError(f"strength={strength} must be above 0 and at most 1")
            sampling = replace(sampling, num_inference_steps=int(count / strength))
        scheduler = sampling.lay_out(self.scheduler)
        if enforce_inference_steps:
            first = max(len(scheduler.timesteps) - count, 0)
        else:
            first = first_step(strength, scheduler.num_inference_steps) * scheduler.order
        start = scheduler.timesteps[first : first + 1]
        iterations = [(scheduler, first)]
        if self.free_init is not None:
            left = count if enforce_inference_steps else count - first // scheduler.order
            iterations = self._iterations(self.free_init, sampling, left, strength)
        # Clean latents and noise -> noisy latents (B, C, F, h, w)
        h, w = self.latent_size(height, width)
        if latents is None:
            factor = self.vae_scale_factor
            pixels = resized(video, h * factor, w * factor)
            self.check_frames(pixels.shape[1], sampling.context_windows)
            if pixels.shape[0] != videos:
                raise ValueError(f"video has {pixels.shape[0]} clips for {videos} prompts; give one a prompt")
            clean = self._encode(pixels, noise, encode_chunk_size, num_videos_per_prompt)  # (B, F, C, h, w)
            latents = scheduler.add_noise(clean, noise(tuple(clean.shape)), start).transpose(0, 2, 1, 3, 4)
        else:
            latents = mx.array(latents).astype(mx.float32)
            self.check_frames(latents.shape[2] if latents.ndim > 2 else 1, sampling.context_windows)
            wanted = (batch, self.unet.config.in_channels, *latents.shape[2:3], h, w)
            if tuple(latents.shape) != wanted:
                raise ValueError(
                    f"latents has shape {tuple(latents.shape)}; with these settings it must be "
                    f"({batch}, {wanted[1]}, frames, {h}, {w})"
                )
            if enforce_inference_steps:
                latents = scheduler.add_noise(latents, noise(tuple(latents.shape)), start)
        check_text_of_frames(states.prompt_embeds, latents.shape[2])
        noisy = copy.copy(scheduler).scale_model_input(latents, scheduler.timesteps[first])
        mx.eval(latents, noisy)  # so that another thread can run the steps
        counts = [len(scheduler.timesteps) - first for scheduler, first in iterations]
        networks = {n: self._guidance(states, images, sampling, n) for n in set(counts)}
        runs = [
            Run(networks[n], scheduler, first + n, first)
            for n, (scheduler, first) in zip(counts, iterations, strict=True)
        ]
        return denoise_again(
            runs,
            latents,
            self.free_init,
            noise=noise,
            eta=sampling.eta,
            predictions=predictions,
            start=noisy,
        )

    def _iterations(
        self, free_init: FreeInit, sampling: Sampling, steps: int, strength: float
    ) -> list[tuple[Scheduler, int]]:
        """Return a schedule for each iteration of FreeInit, and the place where it begins; `steps` are those
        of the run without it."""
        if sampling.timesteps is not None or sampling.sigmas is not None:
            raise ValueError(
                "FreeInit divides num_inference_steps anew in each iteration of video to video; leave out "
                "timesteps and sigmas"
            )
        made, runs = [], [steps]
        for i in range(free_init.num_iters):
            count = free_init.steps(steps, i)
            scheduler = replace(sampling, num_inference_steps=count).lay_out(self.scheduler)
            if scheduler.order == 1:
                count = len(scheduler.timesteps)
            steps = int(count * strength)
            runs.append(steps)
            if not steps:
                raise ValueError(
                    f"num_inference_steps={sampling.num_inference_steps} leaves FreeInit's iteration "
                    f"{len(runs) - 1} no step: each runs strength={strength} of as many as the one before, "
                    f"{', '.join(map(str, runs))}; use more steps, strength=1, or a lower num_iters"
                )
            made.append((scheduler, (count - steps) * scheduler.order))
        return made

    def _encode(self, pixels: mx.array, noise: BatchNoise, chunk_size: int, copies: int) -> mx.array:
        """Clips (V, F, 3, H, W) in [-1, 1] -> a draw of their latents, each `copies` times, (B, F, C, h, w).

        Noise is drawn for some frames of a clip at a time, clip by clip, as in diffusers.
        """
        self._need("vae")
        as_count("decode_chunk_size", chunk_size)
        clips = []
        for i, clip in enumerate(pixels):
            source = noise.sources[i * copies if len(noise.sources) > 1 else 0]
            chunks = (clip[start : start + chunk_size] for start in range(0, len(clip), chunk_size))
            clips.append(mx.concatenate([self.vae.encode(chunk).sample(source) for chunk in chunks]))
        latents = self.vae.scale_latents(mx.stack(clips).astype(mx.float32))
        return mx.repeat(latents, copies, axis=0)
