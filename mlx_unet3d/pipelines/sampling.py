"""Settings of a run, each written once: of the denoising loop, and of what a call gives back."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..diffusers_names import ADVICE
from ..models.video_unet import VideoUNet
from ..noise import Generator, noise_source
from ..scalars import as_count
from ..schedulers import Scheduler
from .windows import ContextWindows

OUTPUT_TYPES = ("np", "pil", "mlx", "latent")

Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class Sampling:
    """Settings of the denoising loop; every call of a pipeline takes them as keywords.

    Attributes:
        num_inference_steps: steps of the scheduler; None for what the checkpoint recommends, or the
            pipeline's default.
        guidance_scale: strength of the prompt; at most 1: one pass a step, without the negative prompt. None
            as above. A UNet that takes it as an embedding runs once a step at any scale.
        timesteps: (n,) a schedule of one's own in place of `num_inference_steps`, noisiest first.
        sigmas: (n + 1,) noise levels in place of it, falling; the last is where the last step ends.
        eta: noise of DDIM and TCD, 0 to 1; only with their schedulers.
        seed: of the noise; with a list, each video is what its seed alone would make.
        rng: "torch" draws the numbers of torch's CPU generator, so that a seed gives the same video as in
            diffusers; "mlx" those of MLX.
        generator: another name of `seed`; not a torch generator.
        cross_attention_kwargs: keywords for the attention processors; `scale` scales all LoRA, in a call that
            of the text encoders too.
        guidance_rescale: how far to bring a guided prediction back to the deviation that it has without the
            negative prompt, from 0 to 1; against overexposure (arXiv:2305.08891).
        guidance_interval: guidance only in this part of the steps, from 0, the first, to 1; one pass in the
            others. Less work and another result (arXiv:2404.07724).
        cache_interval: run all layers only every so many steps, in between the last `cache_depth` layers on
            what they made; 1 for all always. Less work and another result, see `FeatureCache`.
        cache_depth: layers that always run.
        context_windows: frames that the network sees at a time; None for all. For long clips: memory of a
            window, another result.

    Raises TypeError for a generator of torch, ValueError for values out of range.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    eta: float = 0.0
    seed: int | Sequence[int] = 0
    rng: str = "torch"
    generator: InitVar[int | Sequence[int] | None] = None
    cross_attention_kwargs: dict[str, Any] | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = 1
    cache_depth: int = 1
    context_windows: ContextWindows | None = None

    def __post_init__(self, generator: int | Sequence[int] | None) -> None:
        if generator is not None:
            for one in generator if isinstance(generator, list | tuple) else [generator]:
                try:
                    operator.index(one)
                except TypeError as error:
                    drawn = getattr(one, "initial_seed", None)
                    given = "a number or one a video" if drawn is None else f"seed={drawn()}"
                    raise TypeError(
                        f"generator is a {type(one).__name__}; give seed=, {given}: a seed "
                        "draws the noise of torch.Generator('cpu').manual_seed(seed)"
                    ) from error
            object.__setattr__(self, "seed", generator)

    @property
    def is_guided(self) -> bool:
        """True if the network sees a negative input too."""
        return self.guidance_scale > 1

    def check(self, scheduler: Scheduler, unet: VideoUNet | None) -> Sampling:
        """Return these settings; ValueError where scheduler or network rule them out, or each other."""
        if self.timesteps is None and self.sigmas is None:
            as_count("num_inference_steps", self.num_inference_steps)
        if not np.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number")
        for name in ("eta", "guidance_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.eta and not scheduler.uses_eta:
            raise ValueError(
                f"eta={self.eta} means nothing to {type(scheduler).__name__}; use DDIMScheduler or "
                "TCDScheduler, or leave it 0"
            )
        as_count("cache_interval", self.cache_interval)
        if unet is not None:  # which may be released once steps are done
            unet.check_cache_depth(self.cache_depth)
        self._check_interval()
        if not isinstance(self.context_windows, ContextWindows | None):
            raise TypeError(
                f"context_windows is a {type(self.context_windows).__name__}; give ContextWindows(length=16)"
            )
        if self.context_windows is not None and self.cache_interval > 1:
            raise ValueError(
                f"cache_interval={self.cache_interval} keeps features of the same frames from step to step, "
                "which context_windows move; use one or the other"
            )
        if self.cache_depth != 1 and self.cache_interval == 1:
            raise ValueError(
                f"cache_depth={self.cache_depth} counts the layers that run in every step, but with "
                "cache_interval=1 all do; use a cache_interval above 1"
            )
        return self

    def _check_interval(self) -> None:
        interval = self.guidance_interval
        try:
            first, last = interval
            is_rising = bool(0 <= first < last <= 1)
        except (TypeError, ValueError):  # of one number, of more, or of something else
            is_rising = False
        if not is_rising:
            raise ValueError(f"guidance_interval={interval!r} must be two numbers, rising, from 0 to 1")
        if tuple(interval) != (0, 1) and not self.is_guided:
            raise ValueError(
                f"guidance_interval={interval!r} is a part of the run to guide, but "
                f"guidance_scale={self.guidance_scale:g} guides none of it; use a scale above 1"
            )

    def lay_out(self, scheduler: Scheduler) -> Scheduler:
        """Return a copy of the scheduler for one run, with the schedule of these settings."""
        if self.timesteps is None and self.sigmas is None:
            return scheduler.laid_out(self.num_inference_steps)
        return scheduler.laid_out(timesteps=self.timesteps, sigmas=self.sigmas)

    def noise(self, batch: int) -> BatchNoise:
        """Return the noise of a run of so many videos."""
        return BatchNoise(self.seed, self.rng, batch)


@dataclass(frozen=True)
class Delivery:
    """How a call of a pipeline reports and what it returns; taken as keywords.

    Attributes:
        output_type: "np", "pil", "mlx" or "latent", see `VideoOutput`.
        return_dict: False for a tuple.
        num_videos_per_prompt: videos of each prompt or image, one after the other, each from its own noise.
        callback: called as callback(step, timestep, latents), every `callback_steps` steps.
        callback_on_step_end: called as callback(pipe, step, timestep, {"latents": latents}) after each step;
            returns a dict, whose "latents" take the place of the run's.
        callback_on_step_end_tensor_inputs: names in that dict; "latents" is the only one.
        progress: show progress bars; None for those that watch: in a terminal or a notebook.
    """

    output_type: str = "np"
    return_dict: bool = True
    num_videos_per_prompt: int = 1
    callback: Callable[[int, float, mx.array], None] | None = None
    callback_steps: int = 1
    callback_on_step_end: Callable[[Any, int, float, dict[str, mx.array]], dict[str, mx.array]] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    progress: bool | None = None

    def __post_init__(self) -> None:
        as_count("callback_steps", self.callback_steps)
        as_count("num_videos_per_prompt", self.num_videos_per_prompt)
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")
        others = [name for name in self.callback_on_step_end_tensor_inputs if name != "latents"]
        if others:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {others[0]!r}; a callback is given 'latents' alone"
            )


def text_lora_scale(settings: Mapping[str, Any]) -> float | None:
    """Return the scale that settings of a run give LoRA, which text encoders take too; None for none."""
    return (settings.get("cross_attention_kwargs") or {}).get("scale")


class EmbeddedSampling(Sampling):
    """Settings of a run whose UNet takes the guidance scale as an embedding, and runs once a step."""

    @property
    def is_guided(self) -> bool:
        """False: the network sees no negative input, whatever the scale."""
        return False

    def check(self, scheduler: Scheduler, unet: VideoUNet | None) -> Sampling:
        """See `Sampling.check`."""
        for name, neutral in (("guidance_rescale", (0,)), ("guidance_interval", ((0, 1), [0, 1]))):
            value = getattr(self, name)
            if value not in neutral:
                raise ValueError(
                    f"{name}={value!r} changes guidance by a negative prompt, and this UNet takes guidance "
                    f"as an embedding instead; leave {name} out"
                )
        return super().check(scheduler, unet)


class BatchNoise:
    """Noise for a batch: one source for all of it, or one a sample, each drawing its own rows."""

    def __init__(self, seed: int | Sequence[int], rng: str, batch: int):
        seeds = np.asarray(seed).tolist() if isinstance(seed, np.ndarray) else seed
        seeds = list(seeds) if isinstance(seeds, list | tuple) else [seeds]
        if len(seeds) not in (1, batch):
            raise ValueError(f"seed has {len(seeds)} entries for {batch} videos; give one, or one each")
        self.sources: list[Generator] = [noise_source(s, rng) for s in seeds]

    def __call__(self, shape: tuple[int, ...]) -> mx.array:
        rows = shape[0] // len(self.sources)
        return mx.concatenate([source((rows, *shape[1:])) for source in self.sources])


def takes(*kinds: type) -> Callable[[Call], Call]:
    """Show the fields of dataclasses as keyword parameters of a call whose last one is `**options`."""

    def decorate(call: Call) -> Call:
        signature = inspect.signature(call)
        own = {p.name: p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD}
        fields = [p for kind in kinds for p in inspect.signature(kind).parameters.values()]
        more = [p.replace(kind=p.KEYWORD_ONLY) for p in fields if p.name not in own]
        call.__signature__ = signature.replace(parameters=[*own.values(), *more])  # type: ignore[attr-defined]
        return call

    return decorate


def divide(options: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """Return the keywords of each dataclass; TypeError for one that none of them has."""
    names = [list(inspect.signature(kind).parameters) for kind in kinds]
    known = [name for its in names for name in its]
    for name in options:
        if name not in known:
            if name in ADVICE["__call__"]:
                raise TypeError(f"a call takes no {name} here: {ADVICE['__call__'][name]}")
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    return [{name: options[name] for name in its if name in options} for its in names]
