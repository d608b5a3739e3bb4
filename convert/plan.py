"""The plan of a conversion: of each tensor, network and checkpoint."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d.checkpoints import Deferred, TensorInfo, read_tensor, to_diffusers, to_mlx
from mlx_unet3d.checkpoints.headers import AHEAD
from mlx_unet3d.checkpoints.hub import Hub
from mlx_unet3d.layers.quantized import Quantization
from mlx_unet3d.models.pretrained import PretrainedModel


@dataclass(frozen=True)
class TensorPlan:
    """The plan of one tensor of the source.

    Attributes:
        key: its name in the source; `name[0:4]` for a part of a tensor.
        name: the parameter that it becomes.
        path, info: its file and its entry in the header.
        layout: how its axes are permuted, see `mlx_unet3d.checkpoints.layouts`.
        shape, dtype: of the result, before it is quantized.
        source_layout, target_layout: "mlx" or "diffusers".
        quantization: how it is quantized; None for no quantization.
        changes: make what LoRAs add to it, in float32 and MLX's layout.
    """

    key: str
    name: str
    path: Path
    info: TensorInfo
    layout: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    source_layout: str
    target_layout: str
    quantization: Quantization | None = None
    changes: tuple[Callable[[], mx.array], ...] = ()

    @property
    def permutation(self) -> str:
        """The permutation of its axes, in the letters of `mlx_unet3d.checkpoints.layouts`; empty for none."""
        if self.source_layout == self.target_layout or self.layout in ("identity", "linear"):
            return ""
        diffusers, mlx = {
            "conv2d": ("OIhw", "OhwI"),
            "conv2d_1x1": ("OI11", "OI"),
            "conv3d_temporal": ("OIhw1", "OhwI"),
        }[self.layout]
        return f"{diffusers} to {mlx}" if self.target_layout == "mlx" else f"{mlx} to {diffusers}"

    @property
    def may_overflow(self) -> bool:
        """True if finite numbers may become infinite: those of a wider dtype in float16, and sums."""
        return self.dtype == mx.float16 and (self.info.dtype != "F16" or bool(self.changes))

    @property
    def working_bytes(self) -> int:
        """Bytes in memory while it is converted: as read, as cast, and with its axes permuted."""
        result = math.prod(self.shape) * self.dtype.size
        return self.info.nbytes + 2 * result

    def make(self) -> mx.array:
        """Read the tensor and return the result before it is quantized."""
        array = read_tensor(self.path, self.info)
        if mx.issubdtype(array.dtype, mx.floating) and not self.changes:
            array = array.astype(self.dtype)
        if self.source_layout == "diffusers":
            array = to_mlx(self.layout, array)
        if self.changes:
            array = sum((make() for make in self.changes), array.astype(mx.float32)).astype(self.dtype)
        return to_diffusers(self.layout, array) if self.target_layout == "diffusers" else array

    def results(self) -> dict[str, Deferred]:
        """Return the tensors to write, in the order of their names; they are computed when they are
        written."""
        if self.quantization is None:
            return {self.name: Deferred(self.shape, self.dtype, self.make)}
        module = self.name.removesuffix("weight")
        parts = self.quantization.quantize(mx.zeros(self.shape, self.dtype))  # lazy: shapes and dtypes only
        made: dict[str, mx.array] = {}

        def make(part: str) -> mx.array:
            if part not in made:  # all parts at once; each is dropped when it is used
                made.update(self.quantization.quantize(self.make()))
                mx.async_eval(list(made.values()))
            return made.pop(part)

        return {
            module + part: Deferred(tuple(array.shape), array.dtype, partial(make, part))
            for part, array in sorted(parts.items())
        }

    def restored(self, result: mx.array) -> mx.array:
        """Return a result in the shape of the source, for comparison."""
        if self.target_layout == "diffusers":
            result = to_mlx(self.layout, result)
        if self.source_layout == "diffusers":
            result = to_diffusers(self.layout, result)
        return result.reshape(self.info.shape)


@dataclass(frozen=True)
class ComponentPlan:
    """The plan of one network.

    Attributes:
        name: "unet", "vae", "text_encoder"; empty where the source is a single network.
        cls: its class.
        config: the keys of the `config.json` to write.
        files: the files to read.
        reason: why these files.
        tensors: the plan of each tensor.
        dropped: tensors of the source that the network does not need, by documented rules.
        assumed: config keys that neither a `config.json` nor the shapes define.
        constants: arrays to write that the source lacks, made by a formula.
        folder: where the reference class can load the source; None if it cannot.
    """

    name: str
    cls: type[PretrainedModel]
    config: dict[str, Any]
    files: list[Path]
    reason: str
    tensors: list[TensorPlan]
    dropped: list[str]
    assumed: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, mx.array] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def title(self) -> str:
        """The name of the network in messages."""
        return self.name or self.cls.__name__

    @property
    def assumption(self) -> str:
        """The assumed config keys in words; empty for none."""
        if not self.assumed:
            return ""
        values = ", ".join(f"{key}={value!r}" for key, value in self.assumed.items())
        return f"config from the shapes; not in the file and taken as published models have it: {values}"

    @property
    def nbytes(self) -> int:
        """Bytes of the results."""
        own = sum(result.nbytes for tensor in self.tensors for result in tensor.results().values())
        return own + sum(array.nbytes for array in self.constants.values())

    @property
    def quantization(self) -> dict[str, Quantization]:
        """The quantization of its layers, by path."""
        named = {tensor.name: tensor.quantization for tensor in self.tensors}
        return {name.removesuffix(".weight"): own for name, own in named.items() if own is not None}


@dataclass(frozen=True)
class CheckpointPlan:
    """The plan of a checkpoint.

    Attributes:
        source: file, folder or hub id as given.
        folder: where its files are; the file itself if one was given.
        index: the `model_index.json` to write; None for a single network.
        components: its networks.
        hub: how the hub is reached; of a hub id, always the same commit.
        tokenizers: those to write, by their names in the pipeline; none for a single network.
        scheduler, feature_extractor: the configs to write, as the source has them; None for a single network,
            or a pipeline without.
        notes: what else is to be said.
    """

    source: str
    folder: Path
    index: dict[str, Any] | None
    components: list[ComponentPlan]
    hub: Hub = field(default_factory=Hub)
    tokenizers: dict[str, mlx_unet3d.CLIPTokenizer] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    feature_extractor: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights to write."""
        return sum(component.nbytes for component in self.components)

    @property
    def working_bytes(self) -> int:
        """Approximate bytes of weights in memory: a tensor, and some that wait to be written, with their
        sources, such as single precision for half."""
        largest = max(tensor.working_bytes for component in self.components for tensor in component.tensors)
        return largest + 3 * AHEAD

    @property
    def verifying_bytes(self) -> int:
        """Bytes of weights in memory while forwards are compared: the largest network."""
        sizes = (
            sum(math.prod(tensor.shape) * tensor.dtype.size for tensor in component.tensors)
            for component in self.components
        )
        return max(self.working_bytes, *sizes)
