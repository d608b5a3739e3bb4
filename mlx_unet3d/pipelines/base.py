"""Base of the pipelines: components, prompts, decoding, output forms."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..atomic import write_text
from ..checkpoints import find_folder, read_component_config, read_json
from ..checkpoints.adapters import (
    TEXTUAL_INVERSION_NAMES,
    AdapterFile,
    learned_token,
    read_adapter,
)
from ..checkpoints.config import naming
from ..checkpoints.source import choose_variants, pinned_revision
from ..errors import CheckpointError, NonFiniteError
from ..models.adapters import chosen_weights, networks_of
from ..models.autoencoder_kl import AutoencoderKL
from ..models.clip_text import CLIPTextModel
from ..models.outputs import ModelOutput
from ..models.unet_3d_condition import UNet3DConditionModel
from ..noise import NoiseSource, noise_source
from ..scalars import as_count
from ..schedulers import Scheduler, scheduler_of_pipeline
from ..tokenizer import CLIPTokenizer
from .denoising import DenoisingStep, fold_frames
from .text import TextStates

Pipeline = TypeVar("Pipeline", bound="VideoPipeline")

OUTPUT_TYPES = ("np", "pil", "mlx", "latent")

# Pipelines over the same five components; which of ours to use is the caller's choice.
_PIPELINE_NAMES = (
    "TextToVideoSDPipeline",
    "TextToVideoMSPipeline",
    "VideoToVideoSDPipeline",
)
_COMPONENTS = {
    "unet": ("diffusers", "UNet3DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}


@dataclass(frozen=True)
class Recommended:
    """A checkpoint's recommendation for its use, in `model_index.json` under "_recommended".

    Attributes:
        num_frames, num_inference_steps, guidance_scale, height, width, fps: defaults of a call; None for
            diffusers' own.
        vocabulary: all words that it knows, lower case, where these are few; empty for a model of any text.
    """

    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    vocabulary: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Any) -> "Recommended":
        """Raises CheckpointError for anything but an object with these keys."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(known):
            raise CheckpointError(
                f"model_index.json: _recommended is {values!r}; it must be an object of {', '.join(known)}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The keys that say something."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}


@dataclass
class VideoOutput(ModelOutput):
    """`frames` by `output_type`: "np", float32 in [0, 1] (B, F, H, W, 3); "mlx", the same as mx.array;
    "pil", B lists of F images; "latent", (B, C, F, h, w) as mx.array."""

    frames: Any


class BatchNoise:
    """Noise for a batch: one source for all of it, or one a sample, each drawing its own rows."""

    def __init__(self, seed: int | Sequence[int], rng: str, batch: int):
        seeds = np.asarray(seed).tolist() if isinstance(seed, np.ndarray) else seed
        seeds = list(seeds) if isinstance(seeds, list | tuple) else [seeds]
        if len(seeds) not in (1, batch):
            raise ValueError(f"seed has {len(seeds)} entries for {batch} videos; give one, or one each")
        self.sources: list[NoiseSource] = [noise_source(s, rng) for s in seeds]

    def __call__(self, shape: tuple[int, ...]) -> mx.array:
        rows = shape[0] // len(self.sources)
        return mx.concatenate([source((rows, *shape[1:])) for source in self.sources])


class VideoPipeline:
    """A text encoder, a 3D UNet, a VAE and a scheduler, and what turns a prompt into frames.

    Args:
        unet, vae, text_encoder, tokenizer, scheduler: the components; `from_pretrained` reads all. A run lays
            out its own copy of the scheduler, and leaves this one as it is: `pipe.scheduler.timesteps` are
            those of training, and a run's own are in its records.
        recommended: what the checkpoint says of its use.

    Raises ValueError where the components do not fit together.
    """

    default_guidance_scale: ClassVar[float]

    def __init__(
        self,
        unet: UNet3DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: Scheduler,
        recommended: Recommended = Recommended(),
    ):
        self.recommended = recommended
        self.unet, self.vae = unet, vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.scheduler = scheduler
        self.sequential_guidance = False
        self._releases = False
        self._text_channels = text_encoder.config.hidden_size
        unet_config, latent_channels = unet.config, vae.config.latent_channels
        if not unet_config.in_channels == unet_config.out_channels == latent_channels:
            raise ValueError(
                f"the unet takes {unet_config.in_channels} and returns {unet_config.out_channels} channels, "
                f"the vae has {latent_channels}; these parts do not belong together"
            )
        width = self._text_channels
        if unet_config.cross_attention_dim != width:
            raise ValueError(
                f"the unet attends to text of {unet_config.cross_attention_dim} channels "
                f"(cross_attention_dim), the text encoder has {width}; these parts do not belong together"
            )
        self.vae_scale_factor = vae.spatial_factor
        checksums = [str(part.weights_checksum) for part in (unet, vae, text_encoder)]
        self.weights_checksum = hashlib.sha256("/".join(checksums).encode()).hexdigest()[:16]
        """Fingerprint of the files of the three networks; for records of what made a video."""

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        path_or_id: str | Path,
        *,
        dtype: mx.Dtype | None = None,
        vae_dtype: mx.Dtype | None = mx.float32,
        scheduler: Scheduler | str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Pipeline:
        """Read a diffusers pipeline folder, or one that `save_pretrained` wrote, or a hub id of one.

        "demo" is the small model that comes in this package.

        Args:
            dtype: of the UNet and the text encoder; None for that of their files, or on a CPU, where half
                precision saves no time, for float32.
            vae_dtype: of the VAE, which is prone to overflow in half precision; None as above.
            scheduler: to take for the checkpoint's own; or the name of one to make from the checkpoint's
                config, of a class or from `schedulers.SCHEDULERS`.
            variant: such as "fp16"; networks without it are read from their plain files, with a warning.
            revision, local_files_only, token, cache_dir: as in `huggingface_hub`, and diffusers.

        Raises FileNotFoundError, PermissionError, ConnectionError: see `find_folder`; CheckpointError.
        """
        where = dict(revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
        folder = find_folder(path_or_id, files=("model_index.json",), **where)
        where["revision"] = pinned_revision(path_or_id, folder, revision)
        index = read_json(folder / "model_index.json")
        name = index.get("_class_name")
        if name not in _PIPELINE_NAMES:
            raise CheckpointError(
                f"{path_or_id}: model_index.json describes a {name!r}; this pipeline reads "
                f"{', '.join(_PIPELINE_NAMES)}"
            )
        missing = [part for part in (*_COMPONENTS, "scheduler") if part not in index]
        if missing:
            raise CheckpointError(
                f"{path_or_id}: model_index.json has no {', '.join(missing)}; the pipeline needs it"
            )

        if dtype is None and mx.default_device() == mx.cpu:
            dtype = mx.float32

        kinds = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        stems = {name: kind.weights_stem for name, kind in kinds.items()}
        variants = choose_variants(path_or_id, stems, variant, **where)
        plain = [name for name, chosen in variants.items() if chosen != variant]
        if plain:
            warnings.warn(
                f"{path_or_id} has no files of the variant {variant!r} for {' and '.join(plain)}; taking the "
                "plain ones",
                stacklevel=2,
            )

        def load(subfolder: str, dtype: mx.Dtype | None) -> Any:
            return kinds[subfolder].from_pretrained(
                path_or_id, subfolder=subfolder, variant=variants[subfolder], dtype=dtype, **where
            )

        if not isinstance(scheduler, Scheduler):
            name = "scheduler_config.json"
            config = read_component_config(path_or_id, name, subfolder="scheduler", **where)
            with naming(folder / "scheduler" / name):
                scheduler = scheduler_of_pipeline(config, index["scheduler"], scheduler)
        return cls(
            scheduler=scheduler,
            tokenizer=CLIPTokenizer.from_pretrained(path_or_id, subfolder="tokenizer", **where),
            text_encoder=load("text_encoder", dtype),
            vae=load("vae", vae_dtype),
            unet=load("unet", dtype),
            recommended=Recommended.from_dict(index.get("_recommended", {})),
        )

    def save_pretrained(self, folder: str | Path, *, layout: str = "mlx") -> None:
        """Write all components and `model_index.json`, that last: a failed save cannot be loaded.

        `layout="diffusers"` makes a folder that diffusers' TextToVideoSDPipeline reads.
        """
        self._need("unet", "vae", "text_encoder")
        for network in (self.unet, self.text_encoder):
            network.refuse_adapters("saving")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").unlink(missing_ok=True)
        for name in ("unet", "vae", "text_encoder"):
            getattr(self, name).save_pretrained(folder / name, layout=layout)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")
        index: dict[str, Any] = {"_class_name": _PIPELINE_NAMES[0], "_diffusers_version": "0.42.1"}
        index |= {name: list(source) for name, source in _COMPONENTS.items()}
        index["scheduler"] = ["diffusers", type(self.scheduler).__name__]
        if self.recommended.to_dict():
            index["_recommended"] = self.recommended.to_dict()
        write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")

    # Defaults of a call.

    def num_frames(self, value: int | None = None) -> int:
        """`value`, or where it is None what the checkpoint recommends, or 16."""
        return _first_given(value, self.recommended.num_frames, 16)

    def num_inference_steps(self, value: int | None = None) -> int:
        """`value`, or where it is None what the checkpoint recommends, or 50."""
        return _first_given(value, self.recommended.num_inference_steps, 50)

    def guidance_scale(self, value: float | None = None) -> float:
        """`value`, or where it is None what the checkpoint recommends, or the pipeline's default."""
        return _first_given(value, self.recommended.guidance_scale, self.default_guidance_scale)

    # Prompts.

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        clip_skip: int | None = None,
    ) -> TextStates:
        """Return the text states (prompt_embeds, negative_prompt_embeds), as diffusers' pipelines do.

        Each is (B, L, D); the second is None for a `guidance_scale` of at most 1. `steps` takes the pair, a
        call its parts by their names. `clip_skip` counts layers to leave out at the end of the text encoder,
        for the positive prompt. A model of few words warns of others.
        """
        positive = self._states("prompt", prompt, prompt_embeds, clip_skip)
        if self.guidance_scale(guidance_scale) <= 1:
            return TextStates(positive)
        batch = positive.shape[0]
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * batch
        negative = self._states("negative_prompt", negative_prompt, negative_prompt_embeds, None)
        if negative.shape != positive.shape:
            raise ValueError(
                f"negative prompts give states {tuple(negative.shape)}, prompts {tuple(positive.shape)}; "
                "give one negative prompt, or one a prompt"
            )
        return TextStates(positive, negative)

    def _states(
        self,
        name: str,
        text: str | Sequence[str] | None,
        states: mx.array | None,
        clip_skip: int | None,
    ) -> mx.array:
        if (text is None) == (states is None):
            raise ValueError(f"give either {name} or {name}_embeds, and not both")
        if states is not None:
            states = mx.array(states) if isinstance(states, np.ndarray) else states
            width = self._text_channels
            if not isinstance(states, mx.array):
                raise TypeError(
                    f"{name}_embeds is a {type(states).__name__}; give an mx.array: of the pair that "
                    "encode_prompt returns, the first is prompt_embeds, the second negative_prompt_embeds"
                )
            if states.ndim != 3 or states.shape[2] != width:
                raise ValueError(
                    f"{name}_embeds has shape {tuple(states.shape)}; it must be (batch, tokens, {width})"
                )
            return states
        self._need("text_encoder")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"{name}={text!r} must be a string or a list of strings")
        self._warn_of_unknown_words(texts)
        ids = mx.array(self.tokenizer([self._expand(text) for text in texts]))
        states = self.text_encoder(ids, clip_skip=clip_skip)
        mx.eval(states)
        return states

    def _warn_of_unknown_words(self, texts: Sequence[str]) -> None:
        known = self.recommended.vocabulary
        for token in self.tokenizer.added_tokens:
            texts = [text.replace(token, " ") for text in texts]
        words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text.lower()))
        unknown = [word for word in words if word not in known]
        if known and unknown:
            warnings.warn(
                f"this model does not know {', '.join(map(repr, unknown))}; it knows {', '.join(known)}",
                stacklevel=4,
            )

    # Adapters.

    def load_textual_inversion(
        self,
        source: str | Path | Mapping[str, mx.array] | AdapterFile,
        token: str | None = None,
        *,
        weight_name: str | None = None,
        **hub: Any,
    ) -> list[str]:
        """Teach tokenizer and text encoder a learned token; returns its tokens, one a vector.

        A prompt with the token, such as "a <cat-toy> on a table", then means what was learned; one of several
        vectors is written out by itself.

        Args:
            source: a file of diffusers or the web UI, a folder or hub id that holds one, or arrays by key.
            token: what to call it; None for its own name.
            weight_name: the file's name in the folder, "learned_embeds.safetensors" or ".bin" by default.
            hub: `revision`, `subfolder`, `local_files_only`, `token`, `cache_dir`.

        Raises:
            ValueError: the token is known, or has to be named.
            CheckpointError: the file is no textual inversion, or one for another text encoder.
        """
        self._need("text_encoder")
        file = read_adapter(source, weight_name=weight_name, names=TEXTUAL_INVERSION_NAMES, **hub)
        name, embeddings = learned_token(file, token)
        width = self.text_encoder.config.hidden_size
        if embeddings.shape[1] != width:
            raise CheckpointError(
                f"{file.name}: {name!r} has {embeddings.shape[1]} channels, this text encoder {width}; it is "
                "for another model"
            )
        names = [name, *(f"{name}_{i}" for i in range(1, len(embeddings)))]
        self.text_encoder.set_token_embeddings(self.tokenizer.add_tokens(names), embeddings)
        return names

    def _expand(self, text: str) -> str:
        """The text with learned tokens of several vectors written out."""
        added = self.tokenizer.added_tokens
        for token in added:
            rest = []
            while f"{token}_{len(rest) + 1}" in added:
                rest.append(f"{token}_{len(rest) + 1}")
            if rest:
                text = text.replace(token, " ".join([token, *rest]))
        return text

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, mx.array] | AdapterFile,
        adapter_name: str = "default",
        *,
        weight: float = 1.0,
        weight_name: str | None = None,
        **hub: Any,
    ) -> dict[str, int]:
        """Load a LoRA for the UNet, the text encoder, or both; returns the number of layers of each.

        See `UNet3DConditionModel.load_lora_adapter` for the arguments and errors; single networks have the
        other methods for adapters too.
        """
        file = read_adapter(source, weight_name=weight_name, **hub)
        self._need("unet", "text_encoder")
        networks = {"unet": self.unet, "text_encoder": self.text_encoder}
        wanted = networks_of(file, networks)
        loaded: dict[str, int] = {}
        try:
            for name in wanted:
                loaded[name] = networks[name].load_lora_adapter(file, adapter_name, weight=weight)
        except (ValueError, CheckpointError):
            for name in loaded:
                networks[name].delete_adapters(adapter_name)
            raise
        return loaded

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use these adapters with these weights, and no other; see `UNet3DConditionModel.set_adapters`."""
        self._need("unet", "text_encoder")
        chosen = chosen_weights(adapter_names, weights)
        known = self.unet.list_adapters() | self.text_encoder.list_adapters()
        missing = [name for name in chosen if name not in known]
        if missing:
            raise ValueError(f"there is no adapter {missing[0]!r}; there are: {', '.join(known) or 'none'}")
        for network in (self.unet, self.text_encoder):
            own = network.list_adapters()
            if own:
                its = {name: weight for name, weight in chosen.items() if name in own}
                network.set_adapters(list(its), list(its.values()))

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Make adapters part of the weights; see `UNet3DConditionModel.fuse_lora`."""
        self._need("unet", "text_encoder")
        if not (self.unet.list_adapters() or self.text_encoder.list_adapters()):
            raise ValueError("there is no adapter to fuse; load one with load_lora_weights")
        for network in (self.unet, self.text_encoder):
            if network.list_adapters():
                network.fuse_lora(lora_scale)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`."""
        self._need("unet", "text_encoder")
        self.unet.unfuse_lora()
        self.text_encoder.unfuse_lora()

    def unload_lora_weights(self) -> None:
        """Remove all adapters; fused ones stay in the weights for good."""
        self._need("unet", "text_encoder")
        self.unet.unload_lora()
        self.text_encoder.unload_lora()

    # Frames.

    def decode(self, latents: mx.array, *, progress: bool = False) -> np.ndarray:
        """See `decode_latents`."""
        self._need("vae")
        return decode_latents(self.vae, latents, progress=progress)

    def _output(self, latents: mx.array, output_type: str, progress: bool) -> Any:
        if output_type == "latent":
            return latents
        frames = self.decode(latents, progress=progress)
        if output_type == "mlx":
            return mx.array(frames)
        if output_type == "pil":
            pixels = (frames * 255).round().astype(np.uint8)
            return [[Image.fromarray(image) for image in video] for video in pixels]
        return frames

    # Memory.

    def enable_sequential_guidance(self) -> None:
        """Run the network twice a step, for the negative prompt and for the prompt, not once for both: about
        half the memory, the same result up to rounding. Without guidance there is nothing to divide."""
        self.sequential_guidance = True

    def disable_sequential_guidance(self) -> None:
        """Run the network once a step."""
        self.sequential_guidance = False

    def enable_attention_slicing(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """See `UNet3DConditionModel.set_attention_slice`; it saves where attention is not fused."""
        self._need("unet")
        self.unet.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention at once."""
        self.enable_attention_slicing(None)

    def enable_vae_slicing(self) -> None:
        """Decode and encode frame by frame; see `AutoencoderKL.enable_slicing`."""
        self._need("vae")
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode and encode some frames at a time."""
        self._need("vae")
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode and encode large frames in tiles, which changes them; see `AutoencoderKL.enable_tiling`."""
        self._need("vae")
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode and encode whole frames."""
        self._need("vae")
        self.vae.disable_tiling()

    def enable_release(self) -> None:
        """Let go of each network when a call is done with it: the text encoder once prompts are encoded, the
        UNet before frames are decoded. The pipeline makes one more video, and must then be loaded again."""
        self._releases = True

    def release(self, name: str) -> None:
        """Let go of "text_encoder", "unet" or "vae", and of the memory it takes, if nobody else holds it.

        Later uses of it raise ValueError.
        """
        if name not in ("text_encoder", "unet", "vae"):
            raise ValueError(f"release({name!r}): the networks are 'text_encoder', 'unet' and 'vae'")
        setattr(self, name, None)
        mx.clear_cache()

    def _done_with(self, name: str) -> None:
        if self._releases:
            self.release(name)

    def _need(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(
                    f"the {name.replace('_', ' ')} of this pipeline was released; load the pipeline again, "
                    "without enable_release() if it is to be called more than once"
                )

    # Shared by the calls of the pipelines.

    def _check_call(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        eta: float,
        output_type: str = "np",
        callback_steps: int = 1,
    ) -> None:
        as_count("num_inference_steps", num_inference_steps)
        as_count("callback_steps", callback_steps)
        if not np.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale} must be a finite number")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie between 0 and 1")
        if eta and not self.scheduler.uses_eta:
            raise ValueError(
                f"eta={eta} means nothing to {type(self.scheduler).__name__}; use DDIMScheduler or "
                "TCDScheduler, or leave it 0"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")

    def _check_savings(
        self,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        cache_interval: int,
        cache_depth: int,
    ) -> None:
        as_count("cache_interval", cache_interval)
        self.unet.check_cache_depth(cache_depth)
        try:
            first, last = guidance_interval
            rising = bool(0 <= first < last <= 1)
        except (TypeError, ValueError):  # of one number, of more, or of something else
            rising = False
        if not rising:
            raise ValueError(
                f"guidance_interval={guidance_interval!r} must be two numbers, rising, from 0 to 1"
            )
        if tuple(guidance_interval) != (0, 1) and guidance_scale <= 1:
            raise ValueError(
                f"guidance_interval={guidance_interval!r} is a part of the run to guide, but "
                f"guidance_scale={guidance_scale:g} guides none of it; use a scale above 1"
            )
        if cache_depth != 1 and cache_interval == 1:
            raise ValueError(
                f"cache_depth={cache_depth} counts the layers that run in every step, but with "
                "cache_interval=1 all do; use a cache_interval above 1"
            )

    def _finish(
        self,
        steps: Iterator[DenoisingStep],
        output_type: str,
        return_dict: bool,
        callback: Callable[[int, float, mx.array], None] | None,
        callback_steps: int,
        progress: bool,
    ) -> "VideoOutput | tuple[Any]":
        latents = None
        with tqdm(desc="denoise", unit="step", disable=not progress) as bar:
            for record in steps:
                bar.total = record.total
                bar.update()
                latents = record.latents
                if callback is not None and record.step % callback_steps == 0:
                    callback(record.step, record.timestep, latents)
        self._done_with("unet")
        frames = self._output(latents, output_type, progress)
        return VideoOutput(frames) if return_dict else (frames,)


def decode_latents(vae: AutoencoderKL, latents: mx.array, *, progress: bool = False) -> np.ndarray:
    """Latents (B, C, F, h, w) -> frames (B, F, H, W, 3) in [0, 1], float32, some frames at a time.

    Raises NonFiniteError where the VAE overflows.
    """
    batch, channels = latents.shape[:2]
    if channels != vae.config.latent_channels:
        raise ValueError(f"latents have {channels} channels, the vae takes {vae.config.latent_channels}")
    folded = vae.unscale_latents(fold_frames(latents))
    n = folded.shape[0]
    height, width = (size * vae.spatial_factor for size in folded.shape[-2:])
    chunk = 1 if vae.use_slicing else vae.frames_per_chunk(height, width)
    chunks = []
    with tqdm(total=n, desc="decode", unit="frame", disable=not progress) as bar:
        for start in range(0, n, chunk):
            images = vae.decode(folded[start : start + chunk]).astype(mx.float32)
            # Before clipping, which would turn an infinity into plain black or white.
            if not math.isfinite(mx.abs(images).max().item()):
                raise NonFiniteError(
                    f"a frame from {start} on is not finite with the VAE in {vae.dtype}; decode in single "
                    "precision: --vae-dtype float32, or from_pretrained(..., vae_dtype=mx.float32)"
                )
            images = mx.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)  # (N, 3, H, W) -> (N, H, W, 3)
            chunks.append(np.array(images))
            bar.update(len(chunks[-1]))
    frames = np.concatenate(chunks)
    return frames.reshape(batch, n // batch, *frames.shape[1:])


def _first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)
