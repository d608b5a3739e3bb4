"""FreeNoise (arXiv:2310.15169), for clips longer than a motion module knows, and prompts that change on the
way."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..diffusers_names import answers_diffusers
from ..layers.free_noise import FreeNoise
from ..noise import Generator
from ..scalars import as_count, as_python
from .sampling import BatchNoise
from .text import TextPrompts, TextStates

NOISE_TYPES = ("shuffle_context", "repeat_context", "random")

Prompts = str | Sequence[str] | Mapping[int, str]
"""Prompts of videos; a mapping, of one video, from frames to prompts."""

Interpolate = Callable[[int, int, mx.array, mx.array], mx.array]
"""interpolate(first, last, start, end): text states (last - first + 1, L, D) of the frames `first` to `last`,
from those of both ends, (1, L, D)."""


class FreeNoiseMethods(TextPrompts):
    """A pipeline of a `UNetMotionModel` with the switches of FreeNoise, which are part of its state and of
    its UNet's, as FreeU is, and whose prompts may change from frame to frame."""

    _text_axes = (3, 4)
    _noise_type = "random"
    _interpolate: Interpolate | None = None

    def enable_free_noise(
        self,
        context_length: int | None = 16,
        context_stride: int = 4,
        weighting_scheme: str = "pyramid",
        noise_type: str = "shuffle_context",
        prompt_interpolation_callback: Interpolate | None = None,
    ) -> None:
        """Let motion modules attend within windows, so that a clip may have any number of frames.

        Args:
            context_length, context_stride, weighting_scheme: see `UNetMotionModel.enable_free_noise`.
            noise_type: of frames behind the first window: "shuffle_context", that of frames before, in
                another order; "repeat_context", that of the first window again (diffusers draws new one, as
                for "random"); "random", new noise.
            prompt_interpolation_callback: see `Interpolate`; None for a linear way from prompt to prompt.

        Other than in diffusers, frames that the windows leave over at the end are averaged properly, see
        `FreeNoise.average`, and several prompts, seeds and `prompt_embeds` work as without FreeNoise.
        Raises ValueError for values out of range; nothing is changed then.
        """
        self._need("unet")
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"noise_type={noise_type!r} must be one of {', '.join(map(repr, NOISE_TYPES))}")
        self.unet.enable_free_noise(context_length, context_stride, weighting_scheme)
        self._noise_type, self._interpolate = noise_type, prompt_interpolation_callback

    def disable_free_noise(self) -> None:
        """Let motion modules attend among all frames again, and start from noise without repetitions."""
        self._need("unet")
        self.unet.disable_free_noise()
        self._noise_type, self._interpolate = "random", None

    @property
    def free_noise_enabled(self) -> bool:
        """True between `enable_free_noise` and `disable_free_noise`."""
        self._need("unet")
        return self.unet.free_noise is not None

    def _long_noise(
        self, shape: tuple[int, ...], latents: mx.array | None, noise: BatchNoise
    ) -> mx.array | None:
        """Return the noise of a clip by FreeNoise, of latents of one window too; without it, `latents`."""
        windows, frames = self.unet.free_noise, shape[2]
        if windows is None or self._noise_type == "random":
            return latents
        if latents is None:
            latents = noise(shape)
        elif latents.shape != (*shape[:2], windows.context_length, *shape[3:]):
            return latents
        rows = [
            mx.take(row, mx.array(frame_order(source, frames, windows, self._noise_type)), axis=2)
            for row, source in zip(mx.split(latents, len(noise.sources)), noise.sources, strict=True)
        ]
        return mx.concatenate(rows)

    @answers_diffusers
    def encode_prompt(
        self,
        prompt: Prompts | None,
        negative_prompt: Prompts | None = None,
        *,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
    ) -> TextStates:
        """Return the text states; see `TextPrompts.encode_prompt`.

        A mapping {0: "rain", 16: "snow"} of frames to prompts makes states (1, F, L, D), a text a frame:
        those of the given frames, a linear way between, and the last one from there to the end. `num_frames`
        is F, default as in a call.
        """
        if not any(isinstance(text, Mapping) for text in (prompt, negative_prompt)):
            return super().encode_prompt(
                prompt,
                negative_prompt,
                guidance_scale=guidance_scale,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                clip_skip=clip_skip,
                lora_scale=lora_scale,
            )
        if prompt_embeds is not None or negative_prompt_embeds is not None:
            raise ValueError(
                "prompt_embeds and negative_prompt_embeds cannot stand beside prompts of frames; give "
                "prompt_embeds (B, F, L, D) of all frames"
            )
        frames = as_count("num_frames", self.num_frames(num_frames))
        positive = self._text_of_frames("prompt", prompt, frames, clip_skip, lora_scale)
        if not self.is_guided(guidance_scale):
            return TextStates(positive)
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negative = self._text_of_frames("negative_prompt", negative_prompt, frames, None, lora_scale)
        return TextStates(positive, negative)

    def _text_of_frames(
        self,
        name: str,
        prompts: Prompts | None,
        frames: int,
        clip_skip: int | None,
        lora_scale: float | None,
    ) -> mx.array:
        """-> (1, F, L, D)."""
        keys = checked_keys(name, prompts, frames)
        states = self._states(name, list(keys.values()), None, clip_skip, lora_scale)
        places = [*keys, frames - 1]
        interpolate = linear if self._interpolate is None else self._interpolate
        parts = []
        for i, (first, last) in enumerate(pairwise(places)):
            start, end = (states[k : k + 1] for k in (i, min(i + 1, len(keys) - 1)))
            made = start if first == last else interpolate(first, last, start, end)
            wanted = (last - first + 1, *states.shape[1:])
            if made.shape != wanted:
                raise ValueError(
                    f"prompt_interpolation_callback({first}, {last}, ...) returned states "
                    f"{tuple(made.shape)}; they must be {wanted}, of both ends and all frames between"
                )
            parts.append(made if i == len(keys) - 1 else made[:-1])  # the next part begins with the last
        text = mx.concatenate(parts)[None]
        mx.eval(text)
        return text


def checked_keys(name: str, prompts: Prompts | None, frames: int) -> dict[int, str]:
    """Return the prompts by their frames, in order; ValueError unless there is one for frame 0 and none
    behind the last, TypeError for anything but a string or a mapping of integers to strings."""
    given = {0: prompts} if isinstance(prompts, str) else prompts
    keys = {as_python(frame): text for frame, text in given.items()} if isinstance(given, Mapping) else {}
    frames_are = all(isinstance(frame, int) and not isinstance(frame, bool) for frame in keys)
    if not keys or not frames_are or not all(isinstance(text, str) for text in keys.values()):
        raise TypeError(
            f"{name}={prompts!r} must be a string or a mapping of frames to strings, such as "
            '{0: "rain", 16: "snow"}'
        )
    if min(keys) != 0:
        raise ValueError(f"{name} begins at frame {min(keys)}; give a prompt for frame 0 as well")
    if max(keys) >= frames:
        raise ValueError(
            f"{name} has frame {max(keys)}, but num_frames={frames}; frames count from 0 to {frames - 1}"
        )
    return dict(sorted(keys.items()))


def check_text_of_frames(text: mx.array, frames: int) -> None:
    """Raise ValueError for states (B, F, L, D) of another number of frames."""
    shape = text.shape
    if len(shape) == 4 and shape[1] != frames:
        raise ValueError(
            f"the text states are those of {shape[1]} frames, {tuple(shape)}, but num_frames={frames}; call "
            "encode_prompt with the same num_frames"
        )


def linear(first: int, last: int, start: mx.array, end: mx.array) -> mx.array:
    """Interpolate linearly; see `Interpolate`."""
    share = mx.array(np.linspace(0, 1, last - first + 1, dtype=np.float32))[:, None, None]
    return ((1 - share) * start + share * end).astype(start.dtype)


def frame_order(source: Generator, frames: int, windows: FreeNoise, noise_type: str) -> np.ndarray:
    """Return which frame of noise each frame of a clip takes, all of them in the first window."""
    length, stride = windows.context_length, windows.context_stride
    if noise_type == "repeat_context":
        return np.arange(frames) % length
    order = np.arange(frames)
    for start in range(length, frames, stride):
        before = order[start - length : start - length + stride]
        order[start : start + stride] = before[source.permutation(stride)][: frames - start]
    return order
