"""Text to video with a 3D UNet: diffusers' TextToVideoSDPipeline."""

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from ..models.autoencoder_kl import AutoencoderKL
from ..models.clip_text import CLIPTextModel
from ..models.unet_3d_condition import UNet3DConditionModel
from ..scalars import as_count
from ..schedulers import Scheduler
from ..tokenizer import CLIPTokenizer
from .adapters import AdapterMethods
from .calls import VideoPipeline
from .components import Part
from .decoding import VideoOutput
from .denoising import Steps, denoise, start_latents
from .predict import Predict
from .sampling import Delivery, Sampling, takes, text_lora_scale
from .text import TextPrompts, TextStates, checked_states


class UNet3DPipeline(TextPrompts, AdapterMethods, VideoPipeline):
    """Base of the pipelines with a text encoder, a `UNet3DConditionModel`, a VAE and a scheduler.

    Args:
        unet, vae, text_encoder, tokenizer, scheduler: the components; `from_pretrained` reads all. A run lays
            out its own copy of the scheduler, and leaves this one as it is: `pipe.scheduler.timesteps` are
            those of training, and a run's own are in its records.
        recommended: what the checkpoint says of its use.

    Raises ValueError where the components do not fit together.
    """

    parts: ClassVar[dict[str, Part]] = {
        "unet": Part((UNet3DConditionModel,)),
        "vae": Part((AutoencoderKL,), is_wide=True),
        "text_encoder": Part((CLIPTextModel,), may_be_none=True),
        "tokenizer": Part((CLIPTokenizer,), may_be_none=True),
        "scheduler": Part((Scheduler,)),
    }
    embedded_scale_offset = 0.0  # T2V-Turbo's w is the scale
    class_names = ("TextToVideoSDPipeline", "TextToVideoMSPipeline", "VideoToVideoSDPipeline")

    def _guidance(self, states: TextStates, sampling: Sampling, steps: int) -> Predict:
        """The network with text states as inputs, for a run of so many steps."""

        positive, negative = (
            None
            if text is None
            else {
                "encoder_hidden_states": text.astype(self.unet.dtype),
                "cross_attention_kwargs": sampling.cross_attention_kwargs,
            }
            for text in states
        )
        return self._predict(sampling, positive, negative, steps)


class TextToVideoPipeline(UNet3DPipeline):
    """Videos from prompts, by classifier-free guided diffusion (ModelScope text-to-video, ZeroScope)."""

    default_guidance_scale = 9.0

    @takes(Sampling, Delivery)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = None,
        latents: mx.array | None = None,
        **options: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make videos.

        Args:
            prompt: one, or one a video; or `prompt_embeds` (B, L, D) instead.
            height, width: in pixels, multiples of 8; default: what the UNet was trained on.
            num_frames: F >= 1; default: what the checkpoint recommends, or 16. The network has no limit;
                quality falls away from the trained number.
            num_inference_steps: steps of the scheduler; default: as above, or 50.
            guidance_scale: strength of the prompt; at most 1: one pass a step, without negative prompt.
                Default: as above, or 9. A UNet with `time_cond_proj_dim`, such as T2V-Turbo's, takes it as an
                embedding: one pass a step, and no negative prompt.
            negative_prompt: what to avoid; one, or one a prompt; or `negative_prompt_embeds`.
            clip_skip: layers of the text encoder to leave out at its end.
            latents: (B, C, F, h, w) to start from instead of noise, before `init_noise_sigma`.
            options: fields of `Sampling`, such as `seed`, and of `Delivery`, such as `output_type`.

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
        states = states.repeated(delivery.num_videos_per_prompt)
        self._done_with("text_encoder")
        # 3. Noise -> latents, step by step -> frames
        size = dict(height=height, width=width, num_frames=num_frames)
        return self._deliver(self.steps(states, **size, latents=latents, **settings), delivery)

    @takes(Sampling)
    def steps(
        self,
        states: tuple[mx.array, mx.array | None],
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        latents: mx.array | None = None,
        predictions: Sequence[mx.array] = (),
        **settings: Any,
    ) -> Steps:
        """Return the denoising loop alone, on what `encode_prompt` returned for the same `guidance_scale`.

        Arguments as for the call. Checks them at once; each step runs when its record is asked for, so
        a loop over it can show progress, preview `denoised`, or stop. Several runs may be under way at a
        time, in several threads too; a thread of yours should end with `mx.clear_streams()`, as MLX may
        otherwise abort the process at its exit. To go on with a run that stopped,
        pass the `prediction` of each of its records and the same arguments: the network then runs for the
        remaining steps only, and the result is that of an uninterrupted run.
        """
        self._need("unet")
        sampling = self.sampling(**settings)
        num_frames = as_count("num_frames", self.num_frames(num_frames))
        states = checked_states(states, sampling)
        batch = states.prompt_embeds.shape[0]
        shape = (batch, self.unet.config.in_channels, num_frames, *self.latent_size(height, width))
        scheduler, noise = sampling.lay_out(self.scheduler), sampling.noise(batch)
        latents = start_latents(shape, latents, noise, scheduler)
        predict = self._guidance(states, sampling, len(scheduler.timesteps))
        mx.eval(latents)  # so that another thread can run the steps
        return denoise(
            predict,
            scheduler,
            latents,
            noise=noise,
            eta=sampling.eta,
            predictions=predictions,
            folded=not self.embeds_guidance,  # T2V-Turbo draws the noise of a clip at once
        )
