"""Holding a converted network against its source by what it computes: one small forward of each."""

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
import numpy as np
from mlx_unet3d.checkpoints import to_mlx
from mlx_unet3d.checkpoints.source import variant_of
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import PretrainedModel

from .plan import ComponentPlan

_LEAST_RATIO = {mx.float32: 90, mx.float16: 30, mx.bfloat16: 12}
"""Signal-to-noise ratio in dB that two programs' forwards of equal weights must have, by dtype: bounds for
mistakes, not for rounding."""


def compare_forwards(component: ComponentPlan, folder: Path) -> str:
    """Compare a small forward of the written network with one of the source's weights, and with diffusers'
    own where torch is installed and the source is a folder that diffusers reads; returns what was found.

    One network is in memory at a time. Raises CheckpointError where they differ more than their dtype
    explains; for quantized weights, where nothing of the output is left.
    """
    config = {key: value for key, value in component.config.items() if key != "quantization"}
    model = component.cls.from_config(config).eval()
    loaded = []
    for tensor in component.tensors:
        array = tensor.make()
        if tensor.target_layout == "diffusers":
            array = to_mlx(tensor.layout, array)
        mx.eval(array)
        loaded.append((tensor.name, array))
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
    except Exception as error:  # whatever another library raises for a checkpoint that it does not read
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


def _inputs(model_config: dict[str, Any], cls: type[PretrainedModel]) -> list[np.ndarray]:
    """Seeded inputs, as small as the network allows."""
    rng = np.random.default_rng(0)
    if cls is mlx_unet3d.CLIPTextModel:
        words = rng.integers(1, model_config["vocab_size"] - 2, 5)
        return [np.array([[*words, model_config["vocab_size"] - 1]])]
    if cls is mlx_unet3d.AutoencoderKL:
        return [rng.normal(size=(1, model_config["latent_channels"], 4, 4)).astype(np.float32)]
    size = 2 ** (len(model_config["block_out_channels"]) - 1)
    sample = rng.normal(size=(1, model_config["in_channels"], 2, size, size)).astype(np.float32)
    text = rng.normal(size=(1, 5, model_config["cross_attention_dim"] or 1)).astype(np.float32)
    return [sample, text]


def _forward(model: PretrainedModel) -> np.ndarray:
    arrays = _inputs(dict(model.config), type(model))
    if isinstance(model, mlx_unet3d.CLIPTextModel):
        result = model(mx.array(arrays[0]))
    elif isinstance(model, mlx_unet3d.AutoencoderKL):
        result = model.decode(mx.array(arrays[0]))
    else:
        sample, text = (mx.array(array).astype(model.dtype) for array in arrays)
        needs_text = model.config.cross_attention_dim is not None
        result = model(sample, 500, text if needs_text else None).sample
    return np.array(result.astype(mx.float32))


def _reference_forward(component: ComponentPlan) -> np.ndarray | None:
    """diffusers' (or transformers') forward of the source in float32; None where that cannot be had."""
    folder = component.files[0].parent
    readable = (folder / "config.json").is_file() and component.tensors[0].source_layout == "diffusers"
    if not readable or not all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers"))):
        return None
    import torch  # only here: most users have none of it

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        diffusers.utils.logging.set_verbosity_error()  # it says of pickles what looks like a failure
        is_text = component.cls is mlx_unet3d.CLIPTextModel
        library, options = (transformers, {}) if is_text else (diffusers, {"low_cpu_mem_usage": False})
        model, report = getattr(library, component.cls.__name__).from_pretrained(
            folder,
            variant=variant_of(component.files[0].name),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        if report["missing_keys"]:  # names or wrappers that it does not know: it would compute with noise
            raise ValueError(f"it misses {len(report['missing_keys'])} tensors")
        model.eval()
        arrays = [torch.from_numpy(array) for array in _inputs(component.config, component.cls)]
        if component.cls is mlx_unet3d.CLIPTextModel:
            result = model(arrays[0]).last_hidden_state
        elif component.cls is mlx_unet3d.AutoencoderKL:
            result = model.decode(arrays[0]).sample
        else:
            result = model(arrays[0], 500, arrays[1]).sample
    return result.numpy()
