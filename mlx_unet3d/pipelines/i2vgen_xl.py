"""Image and prompt to video: diffusers' I2VGenXLPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from ..image_processor import CLIPImageProcessor, vae_pixels_cropped
from ..models.autoencoder_kl import AutoencoderKL
from ..models.clip_text import CLIPTextModel
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.unet_i2vgen_xl import I2VGenXLUNet
from ..scalars import as_count, as_finite
from ..schedulers import Scheduler
from ..tokenizer import CLIPTokenizer
from .adapters import AdapterMethods
from .calls import VideoPipeline
from .components import Part
from .decoding import VideoOutput
from .denoising import Steps, denoise, start_latents
from .image import Images, ImageStates, as_images
from .sampling import BatchNoise, Delivery, Sampling, takes
from .text import TextPrompts, checked_states


class I2VGenXLPipeline(TextPrompts, AdapterMethods, VideoPipeline):
    """Videos from images and prompts, by I2VGen-XL (arXiv:2311.04145)."""

    parts: ClassVar[dict[str, Part]] = {
        "vae": Part((AutoencoderKL,), is_wide=True),
        "text_encoder": Part((CLIPTextModel,), may_be_none=True),
        "tokenizer": Part((CLIPTokenizer,), may_be_none=True),
        "image_encoder": Part((CLIPVisionModelWithProjection,)),
        "feature_extractor": Part((CLIPImageProcessor,)),
        "unet": Part((I2VGenXLUNet,)),
        "scheduler": Part((Scheduler,)),
    }
    class_names = ("I2VGenXLPipeline",)
    default_guidance_scale = 9.0
    negatives_skip = True

    def _check_parts(self) -> None:
        super()._check_parts()
        width, wanted = self.image_encoder.config.projection_dim, self.unet.config.cross_attention_dim
        if width != wanted:
            raise ValueError(
                f"the unet attends to images of {wanted} channels (cross_attention_dim), the image encoder "
                f"has {width}; these parts do not belong together"
            )

    def default_size(self) -> tuple[int, int]:
        """Return height and width in pixels where a call gives none."""
        return self.recommended.height or 704, self.recommended.width or 1280

    @takes(Sampling, Delivery)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Images | None = None,
        height: int | None = None,
        width: int | None = None,
        target_fps: int = 16,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        decode_chunk_size: int | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = 1,
        latents: mx.array | None = None,
        **options: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make videos.

        Args:
            prompt: one, or one a video; or `prompt_embeds` (B, L, D) instead.
            image: the first frame: a path, a Pillow image, an array (H, W, 3), or a list of these, one a
                prompt. Its middle is cut out in the aspect ratio of the video, as in diffusers, whose
                rounding can leave a black line at an edge.
            height, width: in pixels, multiples of 8; default: 704 and 1280.
            target_fps: frames a second that the motion is meant for.
            num_frames: F; default: 16.
            num_inference_steps: steps of the scheduler; default: 50.
            guidance_scale: strength of the prompt and the image; at most 1: one pass a step. Default: 9.
            negative_prompt: what to avoid; one, or one a prompt; or `negative_prompt_embeds`.
            decode_chunk_size: frames at a time, which do not influence each other; None for as many as the
                VAE takes well.
            clip_skip: layers of the text encoder to leave out at its end, for both prompts.
            latents: (B, C, F, h, w) to start from instead of noise, before `init_noise_sigma`.
            options: fields of `Sampling`, such as `seed`, and of `Delivery`. The first draw of the seed is
                for the latents of the image: diffusers draws it from torch's global generator, so that it
                makes the same video with `generator=torch.manual_seed(seed)`.

        Raises ValueError or TypeError for arguments out of range, NonFiniteError when numbers overflow.
        """
        # 1. Settings, all checked before the work begins
        options |= dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        settings, delivery = self._options(options)
        # 2. Prompt -> states (B, L, D), image -> embedding (B, 1, D) and pixels for the VAE
        states = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
        )
        image_states = self.encode_image(image, height=height, width=width)
        self._done_with("text_encoder", "image_encoder")
        # 3. Noise -> latents, step by step -> frames
        steps = self.steps(
            states,
            image_states,
            target_fps=target_fps,
            num_frames=num_frames,
            num_videos_per_prompt=delivery.num_videos_per_prompt,
            latents=latents,
            **settings,
        )
        return self._deliver(steps, delivery, decode_chunk_size, fps=target_fps)

    def encode_image(
        self, image: Images, *, height: int | None = None, width: int | None = None
    ) -> ImageStates:
        """Return the embeddings (B, 1, D) of images, and their pixels in the size of the video, for `steps`.

        Raises ValueError or TypeError for a size or an image that cannot be used.
        """
        self._need("image_encoder")
        height, width = (side * self.vae_scale_factor for side in self.latent_size(height, width))
        images = as_images(image)
        embeds = self.image_encoder(self.feature_extractor.box_cropped(images, width=width)).image_embeds
        states = ImageStates(embeds[:, None], vae_pixels_cropped(images, height, width))
        mx.eval(*states)
        return states

    @takes(Sampling)
    def steps(
        self,
        states: tuple[mx.array, mx.array | None],
        image_states: ImageStates,
        *,
        target_fps: int = 16,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        latents: mx.array | None = None,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone, on what `encode_prompt` and `encode_image` returned.

        See `TextToVideoPipeline.steps`.
        """
        # 1. Settings
        self._need("unet", "vae")
        sampling = self.sampling(**settings)
        num_frames = as_count("num_frames", self.num_frames(num_frames))
        target_fps = as_finite("target_fps", target_fps)
        states = checked_states(states, sampling).repeated(num_videos_per_prompt)
        image_states = image_states.repeated(num_videos_per_prompt)
        batch = states.prompt_embeds.shape[0]
        if image_states.pixels.shape[0] != batch:
            raise ValueError(
                f"there are {image_states.pixels.shape[0] // num_videos_per_prompt} images for "
                f"{batch // num_videos_per_prompt} prompts; give one a prompt"
            )
        noise = sampling.noise(batch)
        # 2. Image -> its latents, and the places of the other frames, before any other noise is drawn
        image_latents = self._image_latents(image_states.pixels, num_frames, num_videos_per_prompt, noise)
        # 3. Noise (B, C, F, h, w)
        scheduler = sampling.lay_out(self.scheduler)
        shape = (batch, self.unet.config.in_channels, num_frames, *image_latents.shape[3:])
        latents = start_latents(shape, latents, noise, scheduler)
        # 4. Inputs of the network; the negative ones see no embedding of the image, but its latents
        dtype = self.unet.dtype
        image_latents = image_latents.astype(dtype)

        def inputs(text: mx.array, embeds: mx.array) -> dict[str, Any]:
            context = self.unet.embed_context(text.astype(dtype), image_latents, embeds.astype(dtype))
            return dict(
                encoder_hidden_states=context.states,
                image_latents=image_latents,
                fps=mx.full((batch,), target_fps),
                cross_attention_kwargs=sampling.cross_attention_kwargs,
            )

        embeds = image_states.image_embeds
        positive, negative = inputs(states.prompt_embeds, embeds), None
        if sampling.is_guided:
            negative = inputs(states.negative_prompt_embeds, mx.zeros_like(embeds))
        predict = self._predict(
            sampling,
            positive,
            negative,
            len(scheduler.timesteps),
            frame_axes={"image_latents": 2},
        )
        mx.eval(latents)  # so that another thread can run the steps
        return denoise(
            predict,
            scheduler,
            latents,
            noise=noise,
            eta=sampling.eta,
            predictions=predictions,
            folded=True,
        )

    def _image_latents(self, pixels: mx.array, num_frames: int, copies: int, noise: BatchNoise) -> mx.array:
        """Pixels (B, 3, H, W) -> latents (B, C, F, h, w): those of the image, then places of frames."""
        if len(noise.sources) == 1:  # one draw for all videos of an image
            pixels = pixels[::copies]
        latents = self.vae.encode(pixels).sample(noise).astype(mx.float32)
        latents = self.vae.scale_latents(latents)
        if len(noise.sources) == 1:
            latents = mx.repeat(latents, copies, axis=0)
        batch, channels, height, width = latents.shape
        places = mx.arange(1, num_frames) / max(num_frames - 1, 1)
        rest = mx.broadcast_to(
            places.reshape(1, 1, -1, 1, 1), (batch, channels, num_frames - 1, height, width)
        )
        return mx.concatenate([latents[:, :, None], rest], axis=2)
