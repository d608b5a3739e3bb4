"""Compare a converted network with its source by one small forward of each."""

import importlib
import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import to_mlx
from mlx_unet3d.checkpoints.weight_files import variant_of
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import PretrainedModel

from .kinds import kind_of
from .plan import ComponentPlan

_LEAST_RATIO = {mx.float32: 90, mx.float16: 30, mx.bfloat16: 12}
"""Least signal-to-noise ratio in dB between two programs' forwards with equal weights, by dtype: bounds for
mistakes, not for rounding."""


def compare_forwards(component: ComponentPlan, folder: Path) -> str:
    """Compare a small forward of the written network with one of the source's weights, and with diffusers'
    own if torch is installed and diffusers can read the source; return the findings.

    One network is in memory at a time. Raises CheckpointError where they differ by more than their dtype
    explains or, for quantized weights, where the output is lost in the error.
    """
    if kind_of(component.cls).inputs is None:
        return "no forward to compare, as it has none by itself"
    config = {key: value for key, value in component.config.items() if key != "quantization"}
    model = component.cls.from_config(config).eval()
    loaded = []
    for tensor in component.tensors:
        array = tensor.make()
        if tensor.target_layout == "diffusers":
            array = to_mlx(tensor.layout, array)
        mx.eval(array)
        loaded.append((tensor.name, array))
    made = {name for name, want in model.expected_tensors().items() if want.optional}
    there = {name for name, _ in loaded}
    loaded += [(k, a) for k, a in tree_flatten(model.parameters()) if k in made - there]
    loaded += [(k, a) for k, a in component.constants.items() if k not in made | there]
    model.load_weights(loaded)
    del loaded
    expected = _forward(model)
    dtype = model.dtype
    del model
    result = _forward(component.cls.from_pretrained(folder))
    if not component.quantization:
        if not np.array_equal(result, expected, equal_nan=True):
            raise CheckpointError(
                f"a forward of the converted {component.title} differs from one of the source"
            )
        found = "equal to the source's"
    else:
        ratio = _ratio(result, expected)
        if not ratio > 0:
            raise CheckpointError(
                f"a forward of the quantized {component.title} is {ratio:.1f} dB above its error: nothing "
                "is left of it; choose more bits or smaller groups"
            )
        found = f"{ratio:.1f} dB above what quantization changed"
    try:
        reference = _reference_forward(component)
    except Exception as error:  # any error of another library for a checkpoint that it cannot read
        reason = str(error).strip().split("\n")[0][:200]
        return f"a forward is {found}; diffusers does not read the source ({reason})"
    if reference is None:
        return f"a forward is {found}"
    ratio, least = _ratio(expected, reference), _LEAST_RATIO[dtype]
    if not ratio >= least:
        raise CheckpointError(
            f"a forward of the {component.title} is {ratio:.1f} dB above its difference from diffusers', "
            f"below {least} dB; please report this checkpoint"
        )
    return f"a forward is {found}, and {ratio:.1f} dB above its difference from diffusers'"


def _ratio(result: np.ndarray, truth: np.ndarray) -> float:
    error, signal = np.square(result - truth).mean(), np.square(truth).mean()
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 and np.isfinite(error) else -math.inf


def _forward(model: PretrainedModel) -> np.ndarray:
    """Run a network of this package in its dtype; timesteps and token ids keep theirs."""

    def convert(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        array = mx.array(value)
        return array.astype(model.dtype) if array.ndim > 2 and array.dtype == mx.float32 else array

    result = kind_of(type(model)).inputs(dict(model.config)).run(model, convert)
    return np.array(result.astype(mx.float32))


def _reference_forward(component: ComponentPlan) -> np.ndarray | None:
    """Run the source in diffusers or transformers in float32; None where that is not possible."""
    kind, folder = kind_of(component.cls), component.folder
    readable = folder is not None and component.tensors[0].source_layout == "diffusers"
    if not readable or not all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers"))):
        return None
    import torch  # only here: most users do not have it

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # its message about pickles looks like a failure
        library = importlib.import_module(kind.library)
        model, report = getattr(library, component.cls.__name__).from_pretrained(
            folder,
            variant=variant_of(component.files[0].name),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **({"low_cpu_mem_usage": False} if library is diffusers else {}),
        )
        if report["missing_keys"]:  # unknown names or wrappers: it would compute with random weights
            raise ValueError(f"it misses {len(report['missing_keys'])} tensors")
        model.eval()

        def convert(value: Any) -> Any:
            return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

        return kind.inputs(component.config).run(model, convert).numpy()
