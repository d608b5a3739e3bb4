"""Image to video: diffusers' StableVideoDiffusionPipeline (SVD, SVD-XT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..image_processor import CLIPImageProcessor, vae_pixels
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.unet_spatio_temporal import UNetSpatioTemporalConditionModel
from ..scalars import as_count, as_finite
from ..schedulers import Scheduler
from .calls import VideoPipeline
from .components import Part, first_given
from .decoding import VideoOutput
from .denoising import Steps, denoise, start_latents
from .image import Images, ImageStates, as_images
from .sampling import BatchNoise, Delivery, Sampling, takes


class StableVideoDiffusionPipeline(VideoPipeline):
    """Videos from images, by Stable Video Diffusion (arXiv:2311.15127)."""

    parts: ClassVar[dict[str, Part]] = {
        "vae": Part((AutoencoderKLTemporalDecoder,), is_wide=True),
        "image_encoder": Part((CLIPVisionModelWithProjection,)),
        "unet": Part((UNetSpatioTemporalConditionModel,)),
        "scheduler": Part((Scheduler,)),
        "feature_extractor": Part((CLIPImageProcessor,)),
    }
    class_names = ("StableVideoDiffusionPipeline",)
    default_guidance_scale = 3.0
    default_num_inference_steps = 25
    frames_axis = 1

    def _check_parts(self) -> None:
        unet, latent_channels = self.unet.config, self.vae.config.latent_channels
        if unet.in_channels != 2 * latent_channels or unet.out_channels != latent_channels:
            raise ValueError(
                f"the unet takes {unet.in_channels} and returns {unet.out_channels} channels; with a vae of "
                f"{latent_channels} it must take {2 * latent_channels} and return {latent_channels}"
            )
        ids = unet.projection_class_embeddings_input_dim // unet.addition_time_embed_dim
        if ids != 3:
            raise ValueError(
                f"the unet takes {ids} time ids (projection_class_embeddings_input_dim over "
                "addition_time_embed_dim); Stable Video Diffusion gives 3: fps, motion bucket, noise"
            )

    def num_frames(self, value: int | None = None) -> int:
        """Return `value`, or where it is None what the checkpoint recommends, or the UNet's config."""
        return first_given(value, self.recommended.num_frames, self.unet.config.num_frames)

    def default_size(self) -> tuple[int, int]:
        """Return height and width in pixels where a call gives none."""
        return self.recommended.height or 576, self.recommended.width or 1024

    @takes(Sampling, Delivery)
    def __call__(
        self,
        image: Images,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float | None = None,
        fps: int = 7,
        motion_bucket_id: int = 127,
        noise_aug_strength: float = 0.02,
        decode_chunk_size: int | None = None,
        *,
        latents: mx.array | None = None,
        **options: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make videos.

        Args:
            image: the first frame: a path, a Pillow image, an array (H, W, 3), or a list of these, one a
                video. It is resized to the video, without regard to its aspect ratio, as in diffusers.
            height, width: in pixels, multiples of 8; default: 576 and 1024.
            num_frames: F; default: 14 for SVD, 25 for SVD-XT, as their configs say.
            num_inference_steps: steps of the scheduler; default: 25.
            sigmas: (n + 1,) noise levels in place of these, the last one 0.
            min_guidance_scale, max_guidance_scale: strength of the image in the first and in the last frame;
                in between it rises evenly. A maximum of at most 1: one pass a step. Default: 1 and 3.
            fps: frames a second that the motion is meant for.
            motion_bucket_id: more means more motion, 1 to 255.
            noise_aug_strength: noise on the image; more means more motion, and less likeness.
            decode_chunk_size: frames that the VAE decodes together, which influence each other; None for all,
                as far as MLX can index them. Less takes less memory.
            latents: (B, F, C, h, w) to start from instead of noise, before `init_noise_sigma`.
            options: fields of `Sampling`, such as `seed`, and of `Delivery`; `guidance_scale` is
                another name of `max_guidance_scale`. With `output_type="latent"`, (B, F, C, h, w).

        Raises ValueError or TypeError for arguments out of range, NonFiniteError when numbers overflow.
        """
        # 1. Settings, all checked before the work begins
        scale = first_given(max_guidance_scale, options.pop("guidance_scale", None), self.guidance_scale())
        options |= dict(num_inference_steps=num_inference_steps, sigmas=sigmas, guidance_scale=scale)
        settings, delivery = self._options(options)
        # 2. Image -> embedding (B, 1, D), and pixels for the VAE
        states = self.encode_image(image, height=height, width=width)
        self._done_with("image_encoder")
        # 3. Noise -> latents, step by step -> frames
        steps = self.steps(
            states,
            num_frames=num_frames,
            min_guidance_scale=min_guidance_scale,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength,
            num_videos_per_prompt=delivery.num_videos_per_prompt,
            latents=latents,
            **settings,
        )
        return self._deliver(steps, delivery, decode_chunk_size, fps=fps)

    def encode_image(
        self, image: Images, *, height: int | None = None, width: int | None = None
    ) -> ImageStates:
        """Return the embeddings (B, 1, D) of images, and their pixels in the size of the video, for `steps`.

        Raises ValueError or TypeError for a size or an image that cannot be used.
        """
        self._need("image_encoder")
        height, width = (side * self.vae_scale_factor for side in self.latent_size(height, width))
        images = as_images(image)
        side = self.image_encoder.config.image_size
        pixels = self.feature_extractor.antialiased(images, height=side, width=side)
        embeds = self.image_encoder(pixels).image_embeds[:, None]
        states = ImageStates(embeds, vae_pixels(images, height, width, factor=self.vae_scale_factor))
        mx.eval(*states)
        return states

    @takes(Sampling)
    def steps(
        self,
        states: ImageStates,
        *,
        num_frames: int | None = None,
        min_guidance_scale: float = 1.0,
        fps: int = 7,
        motion_bucket_id: int = 127,
        noise_aug_strength: float = 0.02,
        num_videos_per_prompt: int = 1,
        latents: mx.array | None = None,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone, on what `encode_image` returned.

        See `TextToVideoPipeline.steps`.
        """
        # 1. Settings
        self._need("unet", "vae")
        sampling = self.sampling(**settings)
        num_frames = as_count("num_frames", self.num_frames(num_frames))
        lowest = as_finite("min_guidance_scale", min_guidance_scale)
        if lowest > max(sampling.guidance_scale, 1):
            raise ValueError(
                f"min_guidance_scale={lowest:g} must be at most max_guidance_scale="
                f"{sampling.guidance_scale:g}"
            )
        motion = [as_finite("fps", fps) - 1, as_finite("motion_bucket_id", motion_bucket_id)]
        motion.append(as_finite("noise_aug_strength", noise_aug_strength))
        batch = states.image_embeds.shape[0] * num_videos_per_prompt
        noise = sampling.noise(batch)
        # 2. Image -> its latents, before any other noise is drawn
        image_latents = self._image_latents(states.pixels, motion[-1], num_videos_per_prompt, noise)
        # 3. Noise (B, F, C, h, w)
        scheduler = sampling.lay_out(self.scheduler)
        _, channels, *size = image_latents.shape
        latents = start_latents((batch, num_frames, channels, *size), latents, noise, scheduler)
        # 4. Inputs of the network; the negative ones are zeros for the image, and the same numbers
        dtype = self.unet.dtype
        embeds = mx.repeat(states.image_embeds, num_videos_per_prompt, axis=0).astype(dtype)
        image_latents = mx.broadcast_to(image_latents[:, None].astype(dtype), latents.shape)
        ids = mx.broadcast_to(mx.array(motion).astype(dtype), (batch, 3))
        shared = dict(added_time_ids=ids, cross_attention_kwargs=sampling.cross_attention_kwargs)
        positive, negative = (
            dict(encoder_hidden_states=embeds * share, image_latents=image_latents * share, **shared)
            for share in (1, 0)
        )
        # 5. Guidance that rises over the frames
        scale = np.linspace(lowest, sampling.guidance_scale, num_frames, dtype=np.float32)
        scale = mx.array(scale).reshape(1, num_frames, 1, 1, 1)
        mx.eval(latents, scale)  # so that another thread can run the steps
        predict = self._predict(
            sampling,
            positive,
            negative,
            len(scheduler.timesteps),
            scale=scale,
            frame_axes={"image_latents": 1},
        )
        return denoise(predict, scheduler, latents, noise=noise, eta=sampling.eta, predictions=predictions)

    def _network(
        self, sample: mx.array, timestep: float, *, image_latents: mx.array, **inputs: Any
    ) -> mx.array:
        """(B, F, C, h, w) -> the same: the latents of the image stand beside those of every frame."""
        return self.unet(mx.concatenate([sample, image_latents], axis=2), timestep, **inputs).sample

    def _image_latents(self, pixels: mx.array, strength: float, copies: int, noise: BatchNoise) -> mx.array:
        """Pixels (B, 3, H, W) -> latents (B * copies, C, h, w), the mode and unscaled, as SVD was trained."""
        each_its_own = len(noise.sources) > 1
        if each_its_own:
            pixels = mx.repeat(pixels, copies, axis=0)
        noisy = pixels + strength * noise(tuple(pixels.shape))
        latents = self.vae.encode(noisy).mode().astype(mx.float32)
        return latents if each_its_own else mx.repeat(latents, copies, axis=0)
