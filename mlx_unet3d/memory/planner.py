"""What a video needs, and the settings with which it fits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..chips import Chip
from ..layers.attention import Attention, TextContext
from ..layers.slicing import Slicing
from ..models.autoencoder_kl import AutoencoderKL
from ..models.feature_cache import FeatureCache
from .costs import BACKENDS, Backend
from .liveness import Memory, simulate
from .networks import Networks
from .roofline import Work, seconds, work
from .tracing import Graph

# Of a budget, what is left to itself: predictions are within a tenth of what is measured.
_MARGIN = 0.9
_TOKENS = 77


@dataclass(frozen=True)
class Settings:
    """Memory options of a pipeline, none of which changes the video beyond rounding.

    Attributes:
        sequential_guidance: two passes a step, for the negative prompt and the prompt.
        frames, pixels: what spatial and temporal layers take at a time; None for all.
    """

    sequential_guidance: bool = False
    frames: int | None = None
    pixels: int | None = None

    def __str__(self) -> str:
        parts = []
        if self.sequential_guidance:
            parts.append("guidance in two passes")
        if self.frames is not None:
            parts.append(f"spatial layers {self.frames} frame{'s' * (self.frames > 1)} at a time")
        if self.pixels is not None:
            parts.append(f"temporal layers {self.pixels} pixels at a time")
        return ", ".join(parts) or "defaults"

    def apply(self, pipe: Any) -> None:
        """Set them on a pipeline, on top of what is set there."""
        if self.sequential_guidance:
            pipe.enable_sequential_guidance()
        if self.frames is not None:
            pipe.unet.enable_frame_chunking(self.frames)
        if self.pixels is not None:
            pipe.unet.enable_pixel_chunking(self.pixels)


# From the cheapest in time to the dearest.
_LADDER = (
    Settings(),
    Settings(sequential_guidance=True),
    Settings(sequential_guidance=True, frames=4, pixels=1024),
    Settings(sequential_guidance=True, frames=1, pixels=256),
    Settings(sequential_guidance=True, frames=1, pixels=64),
)


@dataclass(frozen=True)
class Video:
    """What is to be made.

    Attributes:
        frames, height, width: of each video; height and width in pixels.
        batch: videos at once.
        guidance: whether the network sees a negative prompt too.
        encoded: whether it starts from a video, which the VAE encodes.
    """

    frames: int
    height: int
    width: int
    batch: int = 1
    guidance: bool = True
    encoded: bool = False

    def __str__(self) -> str:
        count = f"{self.batch} videos of " if self.batch > 1 else ""
        frames = f"{self.frames} frame{'s' * (self.frames > 1)}"
        return f"{count}{frames} of {self.width}x{self.height}"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: "prompt", "encode", "denoise" or "decode".
        weights: bytes of the networks that are in memory.
        peak: bytes at its worst moment, weights included.
        largest: bytes of its largest single buffer.
        at: the operation of the worst moment.
    """

    name: str
    weights: int
    peak: int
    largest: int
    at: str


@dataclass(frozen=True)
class Plan:
    """A prediction, see `plan`.

    Attributes:
        video: what was asked for.
        settings: the cheapest ones with which it fits; those that take least memory where none fits.
        stages: in order.
        budget: bytes that may be used; None for any.
        nearest: the largest video like this one that fits, where this one does not, and None where none does.
        step_seconds: of a denoising step at the peak rates of the chip; None without a chip.
    """

    video: Video
    settings: Settings
    stages: tuple[Stage, ...]
    budget: int | None = None
    nearest: Video | None = None
    step_seconds: float | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of all stages."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the peak is within nine tenths of the budget."""
        return self.budget is None or self.peak <= _MARGIN * self.budget


def plan(
    networks: Networks,
    *,
    num_frames: int = 16,
    height: int = 256,
    width: int = 256,
    batch: int = 1,
    guidance: bool = True,
    encoded: bool = False,
    cache_depth: int | None = None,
    dtype: mx.Dtype = mx.float16,
    vae_dtype: mx.Dtype = mx.float32,
    vae_tiling: bool = False,
    budget: int | None = None,
    backend: str | None = None,
    chip: Chip | None = None,
    settings: Settings | None = None,
    find_nearest: bool = True,
) -> Plan:
    """Predict the memory of a run of `mlx-unet3d generate`, and choose the settings with which it fits.

    All networks are in memory for the prompt, UNet and VAE while denoising, the VAE alone while decoding.
    Nothing is computed and no weight is read.

    Args:
        networks: `read_networks` of a checkpoint, or `Networks.of` a pipeline.
        num_frames, height, width: of the video; multiples of 8 pixels for the usual VAEs.
        batch: videos at once.
        guidance: whether `guidance_scale` is above 1.
        encoded: whether it starts from a video.
        cache_depth: of a `FeatureCache`, whose features stay from step to step; None for none.
        dtype, vae_dtype: of UNet and text encoder, and of the VAE.
        vae_tiling: whether the VAE takes large frames in tiles.
        budget: bytes that MLX may use; None for any.
        backend: "metal" or "cpu"; None for that of this machine.
        chip: for the time of a step.
        settings: those to predict for; None to choose.
        find_nearest: look for a smaller video where none of the settings makes this one fit.

    Raises ValueError for sizes below 1, for those that the VAE does not divide, and for a depth that the
    network does not have.
    """
    video = Video(num_frames, height, width, batch, guidance, encoded)
    _check(video, networks)
    if cache_depth is not None:
        networks.unet.skeleton().check_cache_depth(cache_depth)
    if backend is None:
        backend = "metal" if mx.default_device() == mx.gpu else "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    planner = Planner(networks, dtype, vae_dtype, budget, BACKENDS[backend], cache_depth, vae_tiling)
    found = planner.plan(video, settings)
    if chip is not None:
        found = replace(found, step_seconds=planner.step_seconds(video, chip))
    if not found.fits and find_nearest:
        found = replace(found, nearest=planner.nearest(video))
    return found


def step_work(networks: Networks, video: Video, dtype: mx.Dtype) -> Work:
    """What a denoising step has to do on a GPU: convolutions as direct sums, guidance in one pass."""
    planner = Planner(networks, dtype, dtype, None, BACKENDS["metal"])
    return work(planner.forward(video, Settings()))


def _check(video: Video, networks: Networks) -> None:
    for name in ("frames", "height", "width", "batch"):
        value = getattr(video, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    factor = networks.spatial_factor
    for name in ("height", "width"):
        value = getattr(video, name)
        if value % factor:
            raise ValueError(f"{name}={value} must be a multiple of {factor}, the factor of the VAE")


class Planner:
    """Predicts stages for the same networks, dtypes, budget, backend and depth of a cache; see `plan`."""

    def __init__(
        self,
        networks: Networks,
        dtype: mx.Dtype,
        vae_dtype: mx.Dtype,
        budget: int | None,
        backend: Backend,
        cache_depth: int | None = None,
        vae_tiling: bool = False,
    ):
        self.networks, self.dtype, self.vae_dtype = networks, dtype, vae_dtype
        self.budget, self.backend, self.cache_depth = budget, backend, cache_depth
        self.vae_tiling = vae_tiling
        self.unet_bytes = networks.unet.nbytes(dtype)
        self.vae_bytes = networks.vae.nbytes(vae_dtype)
        self.text_bytes = networks.text_encoder.nbytes(dtype)

    def plan(self, video: Video, settings: Settings | None) -> Plan:
        others = [self.prompt(video), *([self.encode(video)] if video.encoded else []), self.decode(video)]
        ladder = list(self.ladder(video)) if settings is None else [settings]
        if self.budget is not None and max(stage.peak for stage in others) > _MARGIN * self.budget:
            ladder = ladder[-1:]  # it does not fit anyhow
        for settings in ladder:
            stages = (*others[:-1], self.denoise(video, settings), others[-1])
            found = Plan(video, settings, stages, self.budget)
            if found.fits:
                break
        return found

    def ladder(self, video: Video) -> Iterator[Settings]:
        """The settings that make a difference for this video."""
        factor = self.networks.spatial_factor
        pixels = video.height // factor * (video.width // factor)
        seen = set()
        for settings in _LADDER:
            settings = replace(settings, sequential_guidance=settings.sequential_guidance and video.guidance)
            if settings.frames is not None and settings.frames >= video.frames:
                settings = replace(settings, frames=None)
            if settings.pixels is not None and settings.pixels >= pixels:
                settings = replace(settings, pixels=None)
            if settings not in seen:
                seen.add(settings)
                yield settings

    def nearest(self, video: Video) -> Video | None:
        """The largest video of fewer pixels that fits; of fewer frames where the smallest does not."""
        unit = 8 * self.networks.spatial_factor  # what networks of four levels halve without a rest
        most = max(video.height, video.width) // unit

        def smaller(scale: float) -> Video:
            height, width = (
                max(int(n * scale) // unit * unit, min(unit, n)) for n in (video.height, video.width)
            )
            return replace(video, height=height, width=width)

        sizes = dict.fromkeys(smaller(i / most) for i in range(1, most + 1))
        frames = (replace(smaller(0), frames=n) for n in range(1, video.frames))
        candidates = [
            *frames,
            *(size for size in sizes if size.height * size.width < video.height * video.width),
        ]
        low, high = 0, len(candidates)  # candidates below low fit, those from high do not
        while low < high:
            middle = (low + high) // 2
            if self.fits(candidates[middle]):
                low = middle + 1
            else:
                high = middle
        return candidates[low - 1] if low else None

    def fits(self, video: Video) -> bool:
        stages: list[Callable[[], Stage]] = [
            lambda: self.prompt(video),
            lambda: self.decode(video),
            lambda: self.denoise(video, list(self.ladder(video))[-1]),
        ]
        if video.encoded:
            stages.insert(0, lambda: self.encode(video))
        return all(stage().peak <= _MARGIN * self.budget for stage in stages)

    # Stages.

    def prompt(self, video: Video) -> Stage:
        network = self.networks.text_encoder
        ids = mx.zeros((video.batch, network.config.max_position_embeddings), mx.int32)
        layers = network.config.num_hidden_layers
        graph = network.trace(
            lambda model, ids: model.text_model(ids, layers), [ids], self.dtype, self.backend.gpu
        )
        weights = self.text_bytes + self.unet_bytes + self.vae_bytes
        return _stage("prompt", weights, simulate(graph, self.backend))

    def encode(self, video: Video) -> Stage:
        chunk, channels = self.frames_at_once(video), self.networks.vae.config.in_channels
        images = mx.zeros((chunk, channels, *self.tile(video)), self.vae_dtype)
        graph = self.networks.vae.trace(
            lambda model, x: model.encode(x, chunk_size=chunk).mean,
            [images],
            self.vae_dtype,
            self.backend.gpu,
        )
        pixels = video.batch * video.frames * channels * video.height * video.width * 4
        tiles = self.tiles(video, self.networks.spatial_factor, 2 * self.networks.vae.config.latent_channels)
        memory = simulate(graph, self.backend)
        return _stage("encode", self.unet_bytes + self.vae_bytes, memory, pixels + tiles)

    def denoise(self, video: Video, settings: Settings) -> Stage:
        graph = self.forward(video, settings)
        memory = simulate(graph, self.backend)
        kept = self.keys_values(video)
        if settings.sequential_guidance:  # the features of the other pass
            kept += sum(graph.nbytes(name) for name in graph.outputs[1:])
        latents = 4 * math.prod(self.latent_shape(video))  # in fp32
        passes = 2 if settings.sequential_guidance else 1
        # Latents, the input, and the outputs of passes that wait for the other.
        return _stage("denoise", self.unet_bytes + self.vae_bytes, memory, kept + (1 + passes) * latents)

    def decode(self, video: Video) -> Stage:
        chunk = self.frames_at_once(video)
        height, width = (n // self.networks.spatial_factor for n in self.tile(video))
        latents = mx.zeros((chunk, self.latent_shape(video)[1], height, width), self.vae_dtype)
        graph = self.networks.vae.trace(
            lambda model, z: model.decode(z, chunk_size=chunk), [latents], self.vae_dtype, self.backend.gpu
        )
        tiles = self.tiles(video, 1, self.networks.vae.config.out_channels)
        return _stage("decode", self.vae_bytes, simulate(graph, self.backend), tiles)

    # What they are made of.

    def latent_shape(self, video: Video) -> tuple[int, int, int, int, int]:
        factor = self.networks.spatial_factor
        channels = self.networks.unet.config.in_channels
        return video.batch, channels, video.frames, video.height // factor, video.width // factor

    def forward(self, video: Video, settings: Settings) -> Graph:
        rows = video.batch * (2 if video.guidance and not settings.sequential_guidance else 1)
        shape = (rows, *self.latent_shape(video)[1:])
        sample, timestep = mx.zeros(shape, self.dtype), mx.zeros((), mx.float32)
        dim = self.networks.unet.config.cross_attention_dim
        states = mx.zeros((rows, _TOKENS, dim), self.dtype)

        def run(unet: Any, sample: mx.array, timestep: mx.array, states: mx.array) -> list[mx.array]:
            cache = None if self.cache_depth is None else FeatureCache(2, self.cache_depth)
            unet.slicing = Slicing(settings.frames, settings.pixels)
            output = unet(sample, timestep, TextContext(states), feature_cache=cache).sample
            return [output] if cache is None else [output, cache.next()]

        return self.networks.unet.trace(run, [sample, timestep, states], self.dtype, self.backend.gpu)

    def keys_values(self, video: Video) -> int:
        """Bytes of the keys and values of the text, which stay from step to step."""
        attentions = (m for m in self.networks.unet.skeleton().modules() if isinstance(m, Attention))
        width = sum(2 * a.heads * a.dim_head for a in attentions if a.is_cross_attention)
        return video.batch * (1 + video.guidance) * _TOKENS * width * self.dtype.size

    def vae(self) -> AutoencoderKL:
        """The VAE without weights, as it is set."""
        vae = self.networks.vae.kind.from_config(self.networks.vae.config)
        vae.use_tiling = self.vae_tiling
        return vae

    def frames_at_once(self, video: Video) -> int:
        return min(self.vae().frames_per_chunk(video.height, video.width), video.batch * video.frames)

    def tile(self, video: Video) -> tuple[int, int]:
        """Height and width in pixels of what the VAE takes at once."""
        vae = self.vae()
        vae.check_frame(video.height, video.width)
        size = vae.tile_sample_min_size if self.vae_tiling else max(video.height, video.width)
        return min(video.height, size), min(video.width, size)

    def tiles(self, video: Video, factor: int, channels: int) -> int:
        """Bytes of the tiles that wait for others, of `channels` and of pixels of `factor` each way: the row,
        the one above, and what is finished."""
        height, width = self.tile(video)
        if (height, width) == (video.height, video.width):
            return 0
        columns = -(-video.width // (width * 3 // 4))  # a quarter overlaps
        pixels = video.height * video.width + 2 * columns * height * width
        return self.frames_at_once(video) * channels * pixels // factor**2 * self.vae_dtype.size

    def step_seconds(self, video: Video, chip: Chip) -> float:
        return seconds(self.forward(video, Settings()), chip, self.dtype)


def _stage(name: str, weights: int, memory: Memory, beside: int = 0) -> Stage:
    return Stage(name, weights, weights + memory.peak + beside, memory.largest, memory.at)
