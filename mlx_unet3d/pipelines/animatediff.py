"""Text to video with AnimateDiff: diffusers' AnimateDiffPipeline; Guo et al., arXiv:2307.04725."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..image_processor import Pictures
from .decoding import VideoOutput
from .denoising import Steps
from .free_noise import Prompts
from .motion import MotionPipeline
from .sampling import Delivery, Sampling, takes, text_lora_scale
from .text import checked_states


class AnimateDiffPipeline(MotionPipeline):
    """Videos from prompts, and from images as prompts, with a Stable Diffusion model that moves."""

    class_names = ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "StableDiffusionPipeline")
    default_guidance_scale = 7.5

    @takes(Sampling, Delivery)
    def __call__(
        self,
        prompt: Prompts | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompts | None = None,
        *,
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
            prompt: one, or one a video; or, for one video, a mapping of frames to prompts, see
                `encode_prompt`; or `prompt_embeds`, (B, L, D) or (B, F, L, D), instead.
            num_frames: F, from 1 to the positions of the motion modules, 32 or 24, and with
                `enable_free_noise` or `context_windows` more; default: what the checkpoint recommends, or 16.
            height, width: in pixels, multiples of 8; default: what the UNet was trained on, 512.
            num_inference_steps: steps of the scheduler; default: what the checkpoint recommends, or 50.
            guidance_scale: strength of the prompt; at most 1: one pass a step, without negative prompt.
                Default: as above, or 7.5.
            negative_prompt: what to avoid; one, one a prompt, or a mapping; or `negative_prompt_embeds`.
            latents: (B, C, F, h, w) to start from instead of noise, before `init_noise_sigma`; with FreeNoise
                also of the frames of one window.
            ip_adapter_image, ip_adapter_image_embeds: images for the IP-Adapters, or what
                `encode_ip_adapter_image` made of them.
            clip_skip: layers of the text encoder to leave out at its end, for the positive prompt.
            decode_chunk_size: frames to decode at a time, without effect on the result; default: as many as
                the VAE takes well.
            options: fields of `Sampling`, such as `seed`, and of `Delivery`, such as `output_type`.

        Raises ValueError or TypeError for arguments out of range, NonFiniteError when numbers overflow.
        """
        # 1. Settings, all checked before the work begins
        options |= dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        settings, delivery = self._options(options)
        # 2. Prompt -> states (B, L, D), or with a text a frame (B, F, L, D)
        states = self.encode_prompt(
            prompt,
            negative_prompt,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            lora_scale=text_lora_scale(settings),
        )
        states = states.repeated(delivery.num_videos_per_prompt)
        # 3. Images -> embeddings (2, n, P) for each IP-Adapter
        images = self._image_embeds(ip_adapter_image, ip_adapter_image_embeds, guidance_scale)
        self._done_with("text_encoder", "image_encoder")
        # 4. Noise -> latents, step by step -> frames
        size = dict(height=height, width=width, num_frames=num_frames)
        steps = self.steps(states, **size, latents=latents, ip_adapter_image_embeds=images, **settings)
        return self._deliver(steps, delivery, decode_chunk_size)

    @takes(Sampling)
    def steps(
        self,
        states: tuple[mx.array, mx.array | None],
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: mx.array | None = None,
        ip_adapter_image_embeds: Sequence[mx.array] | None = None,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone, on what `encode_prompt` and `encode_ip_adapter_image` returned for
        the same `guidance_scale`; see `TextToVideoPipeline.steps`."""
        self._need("unet")
        sampling = self.sampling(**settings)
        states = checked_states(states, sampling)
        return self._from_noise(
            states,
            sampling,
            num_frames=num_frames,
            height=height,
            width=width,
            latents=latents,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            predictions=predictions,
        )
