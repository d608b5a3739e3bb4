"""Shared by the calls of all pipelines: their settings, sizes, records and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..media.frames import DEFAULT_FPS
from ..scalars import as_count
from .components import first_given
from .decoding import VideoOutput, as_output, decode_latents
from .denoising import Steps
from .embedded_guidance import EmbeddedGuidance
from .guidance import Guidance, Inputs
from .predict import Predict
from .progress import is_shown, progress_bar
from .sampling import Delivery, EmbeddedSampling, Sampling, divide
from .switches import Switches
from .windows import in_windows


class VideoPipeline(EmbeddedGuidance, Switches):
    """Base of the pipelines: components, and what their calls have in common."""

    frames_axis = 2
    """Axis of the frames in latents."""

    def sampling(self, **settings: Any) -> Sampling:
        """Return the settings of a run: those given, for others what the checkpoint or pipeline says.

        Args:
            settings: fields of `Sampling`.

        Raises TypeError for unknown names, ValueError for values out of range.
        """
        (given,) = divide(settings, Sampling)
        found = (EmbeddedSampling if self.embeds_guidance else Sampling)(**given)
        return replace(
            found,
            num_inference_steps=self.num_inference_steps(found.num_inference_steps),
            guidance_scale=self.guidance_scale(found.guidance_scale),
        ).check(self.scheduler, self.unet)

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width of the latents for a size in pixels, None for the default.

        Raises ValueError where a side is no multiple of a latent's pixels, or there is no default.
        """
        self._need("unet")
        factor, latent = self.vae_scale_factor, []
        if self.default_size()[0] is None and (height is None or width is None):
            raise ValueError("height and width: the unet's config has no sample_size, so give both")
        sides = zip(("height", "width"), (height, width), self.default_size(), strict=True)
        for name, value, default in sides:
            value = default if value is None else value
            as_count(name, value)
            if value % factor:
                down, up = value // factor * factor, -(-value // factor) * factor
                nearest = f"{down} or {up}" if down else f"{up}"
                raise ValueError(f"{name}={value} must be a multiple of {factor}; use {nearest}")
            latent.append(value // factor)
        return tuple(latent)

    def decode(
        self, latents: mx.array, *, decode_chunk_size: int | None = None, progress: bool = False
    ) -> np.ndarray:
        """Decode latents of a run to frames (B, F, H, W, 3); see `decode_latents`."""
        self._need("vae")
        if self.frames_axis == 1:
            latents = latents.transpose(0, 2, 1, 3, 4)
        return decode_latents(
            self.vae,
            latents,
            decode_chunk_size=decode_chunk_size,
            progress=progress,
            bar=self.progress_bar_config,
        )

    def _predict(
        self,
        sampling: Sampling,
        positive: Inputs,
        negative: Inputs | None,
        steps: int,
        *,
        scale: mx.array | None = None,
        frame_axes: Mapping[str, int] | None = None,
    ) -> Predict:
        """Return the network with its guidance, in the context windows of the settings; see `Guidance`."""
        if self.embeds_guidance:
            rows = positive["encoder_hidden_states"].shape[0]
            embedding = self._guidance_embedding(sampling.guidance_scale, rows)
            positive = {**positive, "timestep_cond": embedding}
        predict = Guidance(
            self._network,
            sampling,
            positive,
            negative,
            steps=steps,
            dtype=self.unet.dtype,
            scale=scale,
            frame_axes=frame_axes,
            frames_axis=self.frames_axis,
            sequential=self.sequential_guidance,
        )
        return in_windows(predict, sampling.context_windows, self.frames_axis)

    def _network(self, sample: mx.array, timestep: float, **inputs: Any) -> mx.array:
        """The forward of the UNet, see `Network`."""
        return self.unet(sample, timestep, **inputs).sample

    def _options(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], Delivery]:
        """Divide the keywords of a call into those of `Sampling` and a `Delivery`; all are checked."""
        given, delivery = divide(options, Sampling, Delivery)
        self.sampling(**given)
        return given, Delivery(**delivery)

    def _deliver(
        self,
        steps: Steps,
        delivery: Delivery,
        decode_chunk_size: int | None = None,
        *,
        fps: float | None = None,
    ) -> VideoOutput | tuple[Any]:
        """Run the steps, decode, and return frames in the form asked for."""
        config = dict(self.progress_bar_config)
        is_off = config.pop("disable", None)
        given = delivery.progress if is_off is None else first_given(delivery.progress, not is_off)
        shown = is_shown(given)
        latents, record = None, next(steps, None)
        with progress_bar(shown, config, desc="denoise", unit="step") as bar:
            while record is not None:
                bar.total = record.total
                bar.update()
                latents = record.latents
                if delivery.callback is not None and record.step % delivery.callback_steps == 0:
                    delivery.callback(record.step, record.timestep, latents)
                replaced = None
                if delivery.callback_on_step_end is not None:
                    tensors = dict.fromkeys(delivery.callback_on_step_end_tensor_inputs, latents)
                    made = delivery.callback_on_step_end(self, record.step, record.timestep, tensors)
                    replaced = (made or {}).get("latents")
                    latents = latents if replaced is None else replaced
                try:
                    record = steps.send(replaced)
                except StopIteration:
                    record = None
        self._done_with("unet")
        if delivery.output_type == "latent":
            frames, fps = latents, None
        else:
            fps = first_given(fps, self.recommended.fps, DEFAULT_FPS)
            frames = self.decode(latents, decode_chunk_size=decode_chunk_size, progress=shown)
            frames = as_output(frames, delivery.output_type)
        return VideoOutput(frames, fps) if delivery.return_dict else (frames,)
