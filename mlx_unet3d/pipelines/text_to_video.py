"""Text to video with a 3D UNet: diffusers' TextToVideoSDPipeline."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..scalars import as_count
from .base import BatchNoise, VideoOutput, VideoPipeline
from .denoising import DenoisingStep, denoise
from .text import stacked


class TextToVideoPipeline(VideoPipeline):
    """Videos from prompts, by classifier-free guided diffusion (ModelScope text-to-video, ZeroScope)."""

    default_guidance_scale = 9.0

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        latents: mx.array | None = None,
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
        """Make videos.

        Args:
            prompt: one, or one a video; or `prompt_embeds` (B, L, D) instead.
            height, width: in pixels, multiples of 8; default: what the UNet was trained on.
            num_frames: F >= 1; default: what the checkpoint recommends, or 16. The network has no limit;
                quality falls away from the trained number.
            num_inference_steps: steps of the scheduler; default: as above, or 50.
            guidance_scale: strength of the prompt; at most 1: one pass a step, without negative prompt.
                Default: as above, or 9.
            negative_prompt: what to avoid; one, or one a prompt; or `negative_prompt_embeds`.
            eta: noise of DDIM and TCD, 0 to 1; only with their schedulers.
            seed: of the noise; with a list, each video is what its seed alone would make.
            latents: (B, C, F, h, w) to start from instead of noise, before `init_noise_sigma`.
            output_type: "np", "pil", "mlx" or "latent", see `VideoOutput`.
            return_dict: False for a tuple.
            callback: called as callback(step, timestep, latents), every `callback_steps` steps.
            cross_attention_kwargs: keywords for the attention processors, such as the LoRA `scale`.
            clip_skip: layers of the text encoder to leave out at its end.
            rng: "torch" draws the numbers of torch's CPU generator, so that a seed gives the same video
                as in diffusers; "mlx" those of MLX.
            guidance_interval: guidance only in this part of the steps, from 0, the first, to 1; one pass in
                the others. Less work and another result (arXiv:2404.07724).
            cache_interval: all layers only every so many steps, in between the last `cache_depth` layers on
                what they made; 1 for all always. Less work and another result, see `FeatureCache`.
            progress: show progress bars.

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
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            seed=seed,
            latents=latents,
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
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        latents: mx.array | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        rng: str = "torch",
        predictions: Sequence[mx.array] = (),
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_interval: int = 1,
        cache_depth: int = 1,
    ) -> Iterator[DenoisingStep]:
        """The denoising loop alone, on what `encode_prompt` returned for the same `guidance_scale`.

        Arguments as for the call. Checks them at once; each step runs when its record is asked for, so
        a loop over it can show progress, preview `denoised`, or stop. Several runs may be under way at a
        time, in several threads too; a thread of yours should end with `mx.clear_streams()`, as MLX may
        otherwise abort the process at its exit. To go on with a run that stopped,
        pass the `prediction` of each of its records and the same arguments: the network then runs for the
        remaining steps only, and the result is that of an uninterrupted run.
        """
        num_inference_steps = self.num_inference_steps(num_inference_steps)
        guidance_scale = self.guidance_scale(guidance_scale)
        self._need("unet")
        self._check_call(num_inference_steps, guidance_scale, eta)
        self._check_savings(guidance_scale, guidance_interval, cache_interval, cache_depth)
        num_frames = self.num_frames(num_frames)
        as_count("num_frames", num_frames)
        text_states = stacked(states, guidance_scale)
        batch = states[0].shape[0]
        shape = (batch, self.unet.config.in_channels, num_frames, *self.latent_size(height, width))
        noise = BatchNoise(seed, rng, batch)
        if latents is None:
            latents = noise(shape)
        elif tuple(latents.shape) != shape:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; with these settings it must be {shape}"
            )
        scheduler = self.scheduler.laid_out(num_inference_steps)
        latents = mx.array(latents) * scheduler.init_noise_sigma
        mx.eval(latents, text_states)  # so that another thread can run the steps
        return denoise(
            self.unet,
            scheduler,
            latents,
            text_states,
            guidance_scale=guidance_scale,
            eta=eta,
            noise=noise,
            cross_attention_kwargs=cross_attention_kwargs,
            predictions=predictions,
            guidance_interval=guidance_interval,
            cache_interval=cache_interval,
            cache_depth=cache_depth,
            sequential_guidance=self.sequential_guidance,
        )

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Size of the latents for a size in pixels, or for the default; ValueError where there is none."""
        self._need("unet")
        size, factor = self.unet.config.sample_size, self.vae_scale_factor
        if size is None and (height is None or width is None):
            raise ValueError("height and width: the unet's config has no sample_size, so give both")
        default = size if isinstance(size, tuple) else (size, size)
        latent = []
        for name, value, trained in zip(("height", "width"), (height, width), default, strict=True):
            if value is None:
                latent.append(trained)
                continue
            as_count(name, value)
            if value % factor:
                down, up = value // factor * factor, -(-value // factor) * factor
                nearest = f"{down} or {up}" if down else f"{up}"
                raise ValueError(f"{name}={value} must be a multiple of {factor}; use {nearest}")
            latent.append(value // factor)
        return tuple(latent)
