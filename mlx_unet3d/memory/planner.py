"""Predict the memory that a video takes, and choose the settings with which it fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..chips import Chip
from ..layers.attention import Attention
from ..layers.chunking import Chunks
from ..layers.free_noise import FreeNoise
from ..models.autoencoder_kl import AutoencoderKL
from ..models.autoencoder_kl_temporal import AutoencoderKLTemporalDecoder
from ..models.feature_cache import FeatureCache
from ..scalars import as_count
from .costs import BACKENDS, Backend
from .forwards import Inputs, Latents, unet_inputs
from .liveness import Memory, simulate
from .long_clips import LongClip
from .networks import Network, Networks
from .plans import MARGIN, Plan, Settings, Stage, Video
from .roofline import Work, seconds, work
from .tracing import Graph

if TYPE_CHECKING:
    from ..pipelines.windows import ContextWindows

# From the cheapest in time to the dearest.
_LADDER = (
    Settings(),
    Settings(sequential_guidance=True),
    Settings(sequential_guidance=True, frames=4, pixels=1024),
    Settings(sequential_guidance=True, frames=1, pixels=256),
    Settings(sequential_guidance=True, frames=1, pixels=64),
)


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
    decode_chunk_size: int | None = None,
    free_noise: FreeNoise | None = None,
    context_windows: ContextWindows | None = None,
    text_of_frames: bool = False,
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
        guidance: True for a `guidance_scale` above 1; without effect where the UNet takes it as an embedding.
        encoded: True for a run that starts from a video.
        cache_depth: of a `FeatureCache`, whose features stay from step to step; None for none.
        dtype, vae_dtype: of UNet and text encoder, and of the VAE.
        vae_tiling: True where the VAE takes large frames in tiles.
        decode_chunk_size: frames that a temporal decoder takes as a clip; None for all, or as many as MLX can
            index.
        free_noise: windows of FreeNoise, `unet.free_noise`, for a `UNetMotionModel` alone; None for none.
        context_windows: those of the run, in which the network sees a long clip; None for none.
        text_of_frames: True for a text a frame, for a `UNetMotionModel` alone.
        budget: bytes that MLX may use; None for any.
        backend: "metal" or "cpu"; None for that of this machine.
        chip: for the time of a step.
        settings: those to predict for; None to choose.
        find_nearest: look for a smaller video where none of the settings makes this one fit.

    Raises ValueError for sizes below 1, for those that the VAE does not divide, and for what the network does
    not have: a depth, more positions of frames, FreeNoise, texts of frames.
    """
    video = Video(num_frames, height, width, batch, guidance and not networks.embeds_guidance, encoded)
    _check(video, networks)
    if decode_chunk_size is not None:
        as_count("decode_chunk_size", decode_chunk_size)
    if context_windows is not None and num_frames <= context_windows.length:
        context_windows = None  # one for all frames
    clip = LongClip(free_noise, context_windows, text_of_frames)
    clip.check(networks.unet.kind)
    if cache_depth is not None:
        networks.unet.skeleton().check_cache_depth(cache_depth)
    if backend is None:
        backend = "metal" if mx.default_device() == mx.gpu else "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    planner = Planner(
        networks,
        dtype,
        vae_dtype,
        budget,
        BACKENDS[backend],
        cache_depth,
        vae_tiling,
        decode_chunk_size,
    )
    planner.clip = clip
    found = planner.plan(video, settings)
    if chip is not None:
        found = replace(found, step_seconds=planner.step_seconds(video, chip))
    if not found.fits and find_nearest:
        found = replace(found, nearest=planner.nearest(video))
    return found


def step_work(networks: Networks, video: Video, dtype: mx.Dtype) -> Work:
    """Count the work of a denoising step on a GPU: convolutions as direct sums, guidance in one pass."""
    planner = Planner(networks, dtype, dtype, None, BACKENDS["metal"])
    return work(planner.forward(video, Settings()))


def _check(video: Video, networks: Networks) -> None:
    for name in ("frames", "height", "width", "batch"):
        as_count(name, getattr(video, name))
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
        decode_chunk_size: int | None = None,
    ):
        self.networks, self.dtype, self.vae_dtype = networks, dtype, vae_dtype
        self.budget, self.backend, self.cache_depth = budget, backend, cache_depth
        self.vae_tiling, self.decode_chunk_size = vae_tiling, decode_chunk_size
        self.unet_bytes = networks.unet.nbytes(dtype)
        self.vae_bytes = networks.vae.nbytes(vae_dtype)
        encoders = (*networks.text_encoders, networks.image_encoder)
        self.encoder_bytes = sum(network.nbytes(dtype) for network in encoders if network is not None)
        self.clip = LongClip()

    def plan(self, video: Video, settings: Settings | None) -> Plan:
        others = [*(stage() for stage in self.before(video)), self.decode(video)]
        ladder = list(self.ladder(video)) if settings is None else [settings]
        if self.budget is not None and max(stage.peak for stage in others) > MARGIN * self.budget:
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
            if settings.frames is not None and settings.frames >= self.clip.seen(video).frames:
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
            *self.before(video),
            lambda: self.decode(video),
            lambda: self.denoise(video, list(self.ladder(video))[-1]),
        ]
        return all(stage().peak <= MARGIN * self.budget for stage in stages)

    # Stages.

    def before(self, video: Video) -> list[Callable[[], Stage]]:
        """The stages before denoising."""
        stages: list[Callable[[], Stage]] = []
        if self.networks.text_encoders:
            stages.append(lambda: self.prompt(video))
        if self.networks.image_encoder is not None:
            stages.append(lambda: self.image(video))
        if video.encoded or self.networks.family.from_image:
            stages.append(lambda: self.encode(video))
        return stages

    def prompt(self, video: Video) -> Stage:
        """Predict the text encoder that takes most."""

        def memory(network: Network) -> Memory:
            ids = mx.zeros((video.batch, network.config.max_position_embeddings), mx.int32)
            graph = network.trace(
                lambda model, ids: model.text_model(ids),
                [ids],
                self.dtype,
                self.backend.gpu,
            )
            return simulate(graph, self.backend)

        weights = self.encoder_bytes + self.unet_bytes + self.vae_bytes
        most = max(map(memory, self.networks.text_encoders), key=lambda found: found.peak)
        return _stage("prompt", weights, most)

    def image(self, video: Video) -> Stage:
        """Predict the embedding of the image."""
        network = self.networks.image_encoder
        config = network.config
        pixels = mx.zeros(
            (video.batch, config.num_channels, config.image_size, config.image_size), self.dtype
        )
        graph = network.trace(
            lambda model, pixels: model(pixels).image_embeds, [pixels], self.dtype, self.backend.gpu
        )
        weights = self.encoder_bytes + self.unet_bytes + self.vae_bytes
        return _stage("image", weights, simulate(graph, self.backend), pixels.nbytes)

    def encode(self, video: Video) -> Stage:
        """Predict the encoding of the video that the run starts from, or of its image."""
        if not video.encoded:
            video = replace(video, frames=1)
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
        seen = self.clip.seen(video)
        graph = self.forward(seen, settings)
        memory = simulate(graph, self.backend)
        kept = self.context(video)
        if settings.sequential_guidance:  # the features of the other pass
            kept += sum(graph.nbytes(name) for name in graph.outputs[1:])
        clip, latents = (4 * math.prod(self.latent_shape(v)) for v in (video, seen))  # in fp32
        if seen != video:
            kept += 2 * clip  # latents, and the average of the windows
        passes = 2 if settings.sequential_guidance else 1
        # Latents, the input, and the outputs of passes that wait for the other.
        return _stage("denoise", self.unet_bytes + self.vae_bytes, memory, kept + (1 + passes) * latents)

    def decode(self, video: Video) -> Stage:
        chunk = self.frames_at_once(video)
        temporal = issubclass(self.networks.vae.kind, AutoencoderKLTemporalDecoder)
        if temporal:
            clip = min(self.decode_chunk_size or video.frames, video.frames)
            chunk = min(clip, self.vae().check_frame(video.height, video.width))
        height, width = (n // self.networks.spatial_factor for n in self.tile(video))
        latents = mx.zeros((chunk, self.latent_shape(video)[1], height, width), self.vae_dtype)
        graph = self.networks.vae.trace(
            lambda model, z: model.decode(z, chunk) if temporal else model.decode(z, chunk_size=chunk),
            [latents],
            self.vae_dtype,
            self.backend.gpu,
        )
        tiles = self.tiles(video, 1, self.networks.vae.config.out_channels)
        if temporal:  # the frames of other chunks
            others = video.batch * video.frames - chunk
            channels = self.networks.vae.config.out_channels
            tiles = others * channels * video.height * video.width * self.vae_dtype.size
        return _stage("decode", self.vae_bytes, simulate(graph, self.backend), tiles)

    # Parts of the stages.

    def latent_shape(self, video: Video) -> tuple[int, int, int, int, int]:
        factor = self.networks.spatial_factor
        channels = self.networks.vae.config.latent_channels
        return video.batch, channels, video.frames, video.height // factor, video.width // factor

    def forward(self, video: Video, settings: Settings) -> Graph:
        rows = video.batch * (2 if video.guidance and not settings.sequential_guidance else 1)
        names, arrays = zip(*tree_flatten(self.inputs(video, rows)), strict=True)

        def run(unet: Any, *arrays: mx.array) -> list[mx.array]:
            given = tree_unflatten(list(zip(names, arrays, strict=True)))
            given["encoder_hidden_states"] = self.clip.context(given["encoder_hidden_states"])
            cache = None if self.cache_depth is None else FeatureCache(2, self.cache_depth)
            unet.chunks = Chunks(settings.frames, settings.pixels)
            if self.clip.free_noise is not None:
                unet.free_noise = self.clip.free_noise
            output = unet(**given, feature_cache=cache).sample
            return [output] if cache is None else [output, cache.next()]

        return self.networks.unet.trace(run, arrays, self.dtype, self.backend.gpu)

    def inputs(self, video: Video, rows: int) -> Inputs:
        """The arguments of a forward of so many rows."""
        unet, (_, _, frames, height, width) = self.networks.unet, self.latent_shape(video)
        inputs = unet_inputs(unet.kind, unet.config, Latents(rows, frames, height, width), self.dtype)
        if self.networks.embeds_guidance:
            inputs["timestep_cond"] = mx.zeros((rows, unet.config.time_cond_proj_dim), mx.float32)
        return self.clip.of_frames(inputs, frames)

    def context(self, video: Video) -> int:
        """Bytes of the context that stay from step to step: keys and values, or states of texts of frames,
        and those of a window."""
        rows = video.batch * (1 + video.guidance)
        if self.clip.projects_anew:
            parts = (self.inputs(v, rows)["encoder_hidden_states"] for v in (video, self.clip.seen(video)))
            return sum(part.nbytes for part in parts)
        rows, tokens, _ = self.inputs(video, rows)["encoder_hidden_states"].shape
        attentions = (m for m in self.networks.unet.skeleton().modules() if isinstance(m, Attention))
        width = sum(2 * a.heads * a.dim_head for a in attentions if a.is_cross_attention)
        return rows * tokens * width * self.dtype.size

    def vae(self) -> AutoencoderKL:
        """The VAE without weights, as it is set."""
        vae = self.networks.vae.kind.from_config(self.networks.vae.config)
        vae.use_tiling = self.vae_tiling
        return vae

    def frames_at_once(self, video: Video) -> int:
        return min(self.vae().frames_per_chunk(video.height, video.width), video.batch * video.frames)

    def tile(self, video: Video) -> tuple[int, int]:
        """Height and width in pixels of the part of a frame that the VAE takes at once."""
        vae = self.vae()
        vae.check_frame(video.height, video.width)
        size = vae.tile_sample_min_size if self.vae_tiling else max(video.height, video.width)
        return min(video.height, size), min(video.width, size)

    def tiles(self, video: Video, factor: int, channels: int) -> int:
        """Bytes of the tiles that wait for others, of `channels` and of pixels of `factor` each way: the row,
        the one above, and the finished ones."""
        height, width = self.tile(video)
        if (height, width) == (video.height, video.width):
            return 0
        columns = -(-video.width // (width * 3 // 4))  # a quarter overlaps
        pixels = video.height * video.width + 2 * columns * height * width
        return self.frames_at_once(video) * channels * pixels // factor**2 * self.vae_dtype.size

    def step_seconds(self, video: Video, chip: Chip) -> float:
        forward = self.forward(self.clip.seen(video), Settings())
        return self.clip.forwards(video) * seconds(forward, chip, self.dtype)


def _stage(name: str, weights: int, memory: Memory, beside: int = 0) -> Stage:
    return Stage(name, weights, weights + memory.peak + beside, memory.largest, memory.at)
