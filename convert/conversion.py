"""Execute a plan: convert one tensor at a time, into a folder that is written completely or not at all."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_unet3d.atomic import check_place, claim, whole_folder, write_text
from mlx_unet3d.checkpoints import (
    Deferred,
    TensorInfo,
    read_header,
    read_tensor,
    weight_files,
)
from mlx_unet3d.checkpoints.hub import Hub, takes_hub
from mlx_unet3d.checkpoints.storage import parse_size, write_component
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization
from tqdm import tqdm

from .card import model_card
from .forward import compare_forwards
from .kinds.pipeline import FEATURE_EXTRACTOR
from .loras import Loras
from .plan import CheckpointPlan, ComponentPlan, TensorPlan
from .planning import PREPROCESSOR_CONFIG, SCHEDULER_CONFIG, plan_checkpoint
from .upload import check_upload, upload

# About 6 to 10 dB below the ratio of normally distributed weights: a bound for damage, not for quality.
_LEAST_RATIO = {2: 2, 3: 8, 4: 12, 5: 18, 6: 24, 8: 24}

_SIGNS = ("model_index.json", "config.json")
"""Files that make a folder a checkpoint."""


@takes_hub
def convert(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: str | Path | None = None,
    motion_adapter: str | Path | None = None,
    loras: Loras = (),
    dtype: mx.Dtype | None = None,
    layout: str = "mlx",
    variant: str | None = None,
    quantization: Quantization | None = None,
    recipe: str = "mixed",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    verify: bool = False,
    upload_repo: str | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    hub: Hub,
) -> CheckpointPlan:
    """Convert a checkpoint; memory use is a few tensors, not the model.

    Args:
        source, tokenizer, motion_adapter, loras, dtype, layout, variant, quantization, recipe, hub: see
            `plan_checkpoint`.
        target: folder to make; it appears when everything is written and, with `verify`, verified.
        max_shard_size: bytes, or text such as "5GB", above which weights are divided over files.
        force: replace the checkpoint or empty folder at `target`, which otherwise must not exist.
        verify: read everything back and compare it with the source, bit for bit after the cast, or by
            signal-to-noise ratio for quantized weights; then compare a small forward, see `compare_forwards`,
            with one network at a time in memory.
        upload_repo: "owner/name" on the hub to which the finished result is sent. A missing repository is
            created as private; one with files is refused or, with `force`, replaced, before anything is
            converted. `target` stays even if the upload fails.
        progress: show progress bars.
        say: called with lines about the progress.

    Raises:
        FileExistsError: `target` exists or `upload_repo` has files, without `force`.
        PermissionError: as `find_folder`, or no login that may write to `upload_repo`.
        OSError: not enough space, or as `find_folder`; ConnectionError if only the upload failed.
        CheckpointError: the source cannot be converted, or the result differs from it.
    """
    target = Path(target).expanduser()
    check_target(target, source, force)
    shard_bytes = parse_size(max_shard_size)
    token = hub.token
    if upload_repo is not None:
        if upload_repo.lower() == str(source).lower():
            raise ValueError(f"{upload_repo} is the source; give another place to upload to")
        check_upload(upload_repo, force=force, token=token)
    plan = plan_checkpoint(
        source,
        tokenizer=tokenizer,
        motion_adapter=motion_adapter,
        loras=loras,
        dtype=dtype,
        layout=layout,
        variant=variant,
        quantization=quantization,
        recipe=recipe,
        hub=hub,
    )
    for line in summary(plan):
        say(line)
    check_apart(target, plan)
    check_space(target, plan.nbytes)
    check_place(target.resolve())
    with claim(target.resolve()), whole_folder(target) as partial:
        check_target(target, source, force)  # again: another conversion may have made it since
        for component in plan.components:
            write(component, partial / component.name, layout, shard_bytes, progress)
            if verify:
                say(f"{component.title}: {compare(component, partial / component.name, progress)}")
                say(f"{component.title}: {compare_forwards(component, partial / component.name)}")
        if plan.index is not None:
            write_rest(plan, partial)
        write_text(partial / "README.md", model_card(plan, layout))
    say(f"written to {target}")
    if upload_repo is not None:
        say(f"uploaded to {upload(target, upload_repo, force=force, token=token)}")
    return plan


def check_target(target: Path, source: str | Path, force: bool) -> None:
    """Raise an error unless `target` may be written: absent or replaceable, and apart from the source."""
    if target.exists() and not force:
        raise FileExistsError(f"{target} is there; give another --mlx-path, or --force to replace it")
    if target.is_file():
        raise NotADirectoryError(f"{target} is a file; a converted checkpoint is a folder")
    if target.exists() and any(target.iterdir()) and not any((target / name).exists() for name in _SIGNS):
        raise FileExistsError(
            f"{target} holds no checkpoint ({' or '.join(_SIGNS)}), so it is not replaced, not even by "
            "--force; give another --mlx-path"
        )
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.absolute().parent} is missing; make that folder first")
    local = Path(source).expanduser()
    if local.exists():
        ours, theirs = target.resolve(), local.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise ValueError(f"{target} and the source {source} lie one in the other; give another place")


def check_apart(target: Path, plan: CheckpointPlan) -> None:
    """Raise ValueError where a weight file of the source, after following links, is in `target`."""
    for file in (file for component in plan.components for file in component.files):
        if target.resolve() in file.resolve().parents:
            raise ValueError(
                f"{target} holds {file.resolve()}, which {plan.source} links to; give another place"
            )


def check_space(target: Path, nbytes: int) -> None:
    """Raise OSError where the disk has no room for `nbytes`."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < nbytes:
        raise OSError(
            f"{target.absolute().parent} has {free / 1e9:.1f} GB left and the result takes "
            f"{nbytes / 1e9:.1f} GB; make room, or choose --dtype float16"
        )


def summary(plan: CheckpointPlan) -> Iterator[str]:
    """Return lines about each network: the files read and why, the result, and the assumptions."""
    for component in plan.components:
        dtypes = sorted({str(tensor.dtype).removeprefix("mlx.core.") for tensor in component.tensors})
        names = ", ".join(path.name for path in component.files)
        dropped = f", {len(component.dropped)} not needed" if component.dropped else ""
        bits = Counter(own.bits for own in component.quantization.values())
        quantized = "".join(f", {count} in {n} bits" for n, count in sorted(bits.items()))
        yield (
            f"{component.title}: {component.cls.__name__} from {names} ({component.reason}); "
            f"{len(component.tensors)} tensors{dropped}{quantized}, {'/'.join(dtypes)}, "
            f"{component.nbytes / 1e9:.2f} GB"
        )
        if component.assumption:
            yield f"{component.title}: {component.assumption}"
    yield from plan.notes


def write(component: ComponentPlan, folder: Path, layout: str, shard_bytes: int, progress: bool) -> None:
    """Write one network.

    Raises CheckpointError where numbers overflow to infinity in float16.
    """
    total = component.nbytes
    with tqdm(desc=component.title, total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        tensors = {
            name: _counted(result, bar)
            for tensor in component.tensors
            for name, result in tensor.results().items()
        } | component.constants
        files = write_component(
            folder,
            component.config,
            tensors,
            stem=component.cls.weights_stem,
            variant=None,
            metadata={"format": "mlx" if layout == "mlx" else "pt"},
            max_shard_bytes=shard_bytes,
            overwrite=True,
        )
    found = _infinite(component, files)
    if found:
        names = ", ".join(found if len(found) < 5 else [*found[:4], "..."])
        raise CheckpointError(
            f"{component.title}: numbers above 65504, the largest of float16, became infinite in {names}; "
            "choose --dtype bfloat16 or float32"
        )


def _infinite(component: ComponentPlan, files: list[Path]) -> list[str]:
    """Return the tensors with numbers that are finite in the source and infinite in float16."""
    keys = {
        name: tensor.key for tensor in component.tensors if tensor.may_overflow for name in tensor.results()
    }
    found = []
    for path in files:
        for name, info in read_header(path).tensors.items():
            if name not in keys or info.dtype != "F16" or not info.nbytes:
                continue
            bits = np.memmap(path, np.int16, "r", info.begin, (info.nbytes // 2,))
            # The largest bits of either sign, except those of NaNs.
            if bits.max() == 0x7C00 or bits.view(np.uint16).max() == 0xFC00:
                found.append(keys[name])
    return list(dict.fromkeys(found))


def _counted(tensor: Deferred, bar: tqdm) -> Deferred:
    def make() -> mx.array:
        bar.update(tensor.nbytes)
        return tensor.make()

    return Deferred(tensor.shape, tensor.dtype, make)


def compare(component: ComponentPlan, folder: Path, progress: bool) -> str:
    """Read a written network back, compare each tensor with the source, and return the finding.

    Raises CheckpointError at the first tensor that differs, or whose quantization error is too large.
    """
    written = {}
    for path in weight_files(folder, component.cls.weights_stem):
        written |= {name: (path, info) for name, info in read_header(path).tensors.items()}
    expected = {name for tensor in component.tensors for name in tensor.results()}
    if set(written) != expected | component.constants.keys():
        raise CheckpointError(f"{folder} does not hold the tensors that were written; is the disk failing?")
    ratios: dict[str, float] = {}
    for tensor in tqdm(component.tensors, desc="verify", unit="tensor", disable=not progress):
        if tensor.quantization is not None:
            ratios[tensor.name] = _signal_to_noise(tensor, written)
            continue
        result = read_tensor(*written[tensor.name])
        if tensor.changes:
            if not mx.array_equal(result, tensor.make(), equal_nan=True):
                raise CheckpointError(f"{tensor.name} came out different from {tensor.key} and its LoRA")
            continue
        original = read_tensor(tensor.path, tensor.info)
        if mx.issubdtype(original.dtype, mx.floating):
            original = original.astype(tensor.dtype)
        if not mx.array_equal(tensor.restored(result), original, equal_nan=True):
            raise CheckpointError(f"{tensor.name} came out different from {tensor.key} in {tensor.path}")
    count = len(component.tensors) - len(ratios)
    changed = sum(bool(tensor.changes) for tensor in component.tensors)
    if not ratios:
        return f"{count} tensors read back, all equal to the source{' and its LoRA' if changed else ''}"
    worst = min(ratios, key=ratios.__getitem__)
    return (
        f"{count} tensors read back, equal to the source, and {len(ratios)} quantized ones, at least "
        f"{ratios[worst]:.1f} dB above their rounding ({worst})"
    )


def _signal_to_noise(tensor: TensorPlan, written: Mapping[str, tuple[Path, TensorInfo]]) -> float:
    """Return the signal-to-noise ratio of a quantized weight, in decibels."""
    quantization = tensor.quantization
    parts = {name.rpartition(".")[2]: read_tensor(*written[name]) for name in tensor.results()}
    original = tensor.make().astype(mx.float32)
    error = quantization.dequantize(parts, tensor.shape, mx.float32) - original
    signal, noise = mx.square(original).mean().item(), mx.square(error).mean().item()
    ratio = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    least = _LEAST_RATIO[quantization.bits]
    if not ratio >= least:
        raise CheckpointError(
            f"{tensor.name} quantized to {quantization.bits} bits is {ratio:.1f} dB above its rounding "
            f"error, below {least} dB; choose more bits or smaller groups"
        )
    return ratio


def write_rest(plan: CheckpointPlan, folder: Path) -> None:
    """The index, the tokenizers and the configs of what has no weights."""
    index = {key: value for key, value in plan.index.items() if key != "_name_or_path"}
    for name, tokenizer in plan.tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    configs = {
        "scheduler": (SCHEDULER_CONFIG, plan.scheduler),
        FEATURE_EXTRACTOR: (PREPROCESSOR_CONFIG, plan.feature_extractor),
    }
    configs = {name: (file, config) for name, (file, config) in configs.items() if config is not None}
    for name, (file, config) in configs.items():
        (folder / name).mkdir()
        # As it is: what it leaves open stays open.
        write_text(folder / name / file, _json(config))
    kept = {*plan.tokenizers, *configs, *(component.name for component in plan.components)}
    index = {k: v for k, v in index.items() if k.startswith("_") or k in kept or not isinstance(v, list)}
    write_text(folder / "model_index.json", _json(index))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
