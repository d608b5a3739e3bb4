"""Text to video with AnimateDiff on SDXL: diffusers' AnimateDiffSDXLPipeline."""

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from ..image_processor import Pictures
from ..models.clip_text import CLIPTextModelWithProjection
from ..scalars import as_count
from ..tokenizer import CLIPTokenizer
from .components import Part
from .decoding import VideoOutput
from .denoising import Steps
from .motion import MotionPipeline
from .sampling import Delivery, Sampling, takes, text_lora_scale
from .text_pooled import PooledTextPrompts, checked_pooled

Size = tuple[int, int]
"""Height and width, or top and left, in pixels."""


class AnimateDiffSDXLPipeline(PooledTextPrompts, MotionPipeline):
    """Videos from prompts, and from images as prompts, with an SDXL model that moves."""

    parts: ClassVar[dict[str, Part]] = {
        **MotionPipeline.parts,
        "text_encoder_2": Part((CLIPTextModelWithProjection,), may_be_none=True),
        "tokenizer_2": Part((CLIPTokenizer,), may_be_none=True),
    }
    class_names = ("AnimateDiffSDXLPipeline", "StableDiffusionXLPipeline")
    default_guidance_scale = 5.0
    embedded_scale_offset = -1.0

    def _check_parts(self) -> None:
        super()._check_parts()
        if self.text_encoder_2 is None:
            return
        config, pooled = self.unet.config, self.text_encoder_2.config.projection_dim
        wanted = None
        if config.addition_embed_type is not None:
            wanted = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        if wanted != pooled:
            raise ValueError(
                f"the unet takes pooled text of {wanted} channels and six time ids, the second text encoder "
                f"makes {pooled}; these parts do not belong together"
            )

    @takes(Sampling, Delivery)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        denoising_end: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        latents: mx.array | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        pooled_prompt_embeds: mx.array | None = None,
        negative_pooled_prompt_embeds: mx.array | None = None,
        ip_adapter_image: Pictures | Sequence[Pictures] | None = None,
        ip_adapter_image_embeds: Sequence[mx.array] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        clip_skip: int | None = None,
        decode_chunk_size: int | None = None,
        **options: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make videos.

        Args:
            prompt, prompt_2: for the two text encoders; one, or one a video. The second reads `prompt` where
                `prompt_2` is None. Or `prompt_embeds` (B, L, D) and `pooled_prompt_embeds` (B, P) instead.
            height, width: in pixels, multiples of 8; default: what the UNet was trained on, 1024.
            guidance_scale: default: what the checkpoint recommends, or 5.
            negative_prompt, negative_prompt_2: what to avoid; or the negative embeddings. Without, see
                `encode_prompt`.
            denoising_end: the share of the noise to remove, above 0; default: all.
            original_size, crops_coords_top_left, target_size: the size before a crop, its place and the size
                after, (height, width), of the images that the video should look like; default: uncropped ones
                of its own size.
            negative_original_size, negative_crops_coords_top_left, negative_target_size: of those that it
                should not look like; the same as above unless both sizes are given.

        The other arguments are those of `AnimateDiffPipeline`.

        Raises ValueError or TypeError for arguments out of range, NonFiniteError when numbers overflow.
        """
        # 1. Settings, all checked before the work begins
        options |= dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        settings, delivery = self._options(options)
        # 2. Prompts -> states (B, L, D) and pooled states (B, P)
        states = self.encode_prompt(
            prompt,
            prompt_2,
            negative_prompt,
            negative_prompt_2,
            guidance_scale=guidance_scale,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            clip_skip=clip_skip,
            lora_scale=text_lora_scale(settings),
        )
        states = states.repeated(delivery.num_videos_per_prompt)
        # 3. Images -> embeddings (2, n, P) for each IP-Adapter
        images = self._image_embeds(ip_adapter_image, ip_adapter_image_embeds, guidance_scale)
        self._done_with("text_encoder", "text_encoder_2", "image_encoder")
        # 4. Noise -> latents, step by step -> frames
        steps = self.steps(
            states,
            num_frames=num_frames,
            height=height,
            width=width,
            denoising_end=denoising_end,
            latents=latents,
            ip_adapter_image_embeds=images,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
            **settings,
        )
        return self._deliver(steps, delivery, decode_chunk_size)

    @takes(Sampling)
    def steps(
        self,
        states: tuple[mx.array, mx.array | None, mx.array, mx.array | None],
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        denoising_end: float | None = None,
        latents: mx.array | None = None,
        ip_adapter_image_embeds: Sequence[mx.array] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone, on what `encode_prompt` and `encode_ip_adapter_image` returned for
        the same `guidance_scale`; see `TextToVideoPipeline.steps`."""
        self._need("unet")
        sampling = self.sampling(**settings)
        text, pooled = checked_pooled(states, sampling)
        own = tuple(side * self.vae_scale_factor for side in self.latent_size(height, width))
        ids = time_ids(
            original_size=original_size or own,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size or own,
        )
        negative_ids = ids
        if negative_original_size is not None and negative_target_size is not None:
            negative_ids = time_ids(
                negative_original_size=negative_original_size,
                negative_crops_coords_top_left=negative_crops_coords_top_left,
                negative_target_size=negative_target_size,
            )
        conditions = [
            {} if x is None else {"text_embeds": x, "time_ids": mx.repeat(of, x.shape[0], axis=0)}
            for x, of in zip(pooled, (ids, negative_ids), strict=True)
        ]
        return self._from_noise(
            text,
            sampling,
            num_frames=num_frames,
            height=height,
            width=width,
            latents=latents,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            predictions=predictions,
            conditions=conditions,
            denoising_end=denoising_end,
        )


def time_ids(**sizes: Size) -> mx.array:
    """Return sizes and places in their order as the time ids of SDXL, (1, 6).

    Raises ValueError for anything but two numbers each.
    """
    for name, size in sizes.items():
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise ValueError(f"{name}={size!r} must be two numbers of pixels, the vertical one first")
        for number in size:
            as_count(name, number, least=0)
    return mx.array([[float(number) for size in sizes.values() for number in size]])
