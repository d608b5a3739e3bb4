"""What quantization does to a full-size UNet: bytes, peak memory, and the error of a forward, a row each.

    python benchmarks/quantization.py FOLDER --quantize none 8 6 4 4-32 4-32-uniform mxfp8 mxfp4 nvfp4

FOLDER holds a UNet of any family, or its pipeline, in single precision. Weights are cast to float16, then
quantized; the forward, on seeded noise of --shape (of the other families that of full_size_networks.py),
computes in float32, so that the error is that of the weights alone, against those of the folder. How well a
model still follows prompts is for benchmarks/evaluate.py to say.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parent))
from evaluate import quantization
from full_size_networks import NETWORKS, inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["none", "8", "4"], metavar="HOW")
    parser.add_argument("--shape", nargs=3, type=int, default=(4, 16, 16), metavar=("FRAMES", "H", "W"))
    args = parser.parse_args()
    subfolder = "unet" if (args.folder / "unet").is_dir() else None

    name = json.loads((args.folder / (subfolder or "") / "config.json").read_text())["_class_name"]

    def load(dtype: mx.Dtype) -> Any:
        return getattr(mlx_unet3d, name).from_pretrained(args.folder, subfolder=subfolder, dtype=dtype)

    unet = load(mx.float32)
    mx.random.seed(0)
    if name == "UNet3DConditionModel":
        given = {
            "sample": mx.random.normal((1, unet.config.in_channels, *args.shape)),
            "timestep": 500,
            "encoder_hidden_states": mx.random.normal((1, 77, unet.config.cross_attention_dim)),
        }
    else:
        family = next(family for family, (kind, *_) in NETWORKS.items() if kind == name)
        given = {k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in inputs(family).items()}

    def forward() -> np.ndarray:
        return np.array(unet(**given).sample, dtype=np.float64)

    mx.set_memory_limit(1)  # the live set, without what MLX works ahead
    expected = forward()
    print("| quantized | weights GB | bits a weight | peak GB over weights | SNR dB | s |")
    print("|---|---|---|---|---|---|", flush=True)
    parameters = unet.num_parameters()
    for how in args.quantize:
        del unet
        mx.clear_cache()
        unet = load(mx.float16)
        if how != "none":
            unet.quantize(**quantization(how))
            mx.eval(unet.parameters())
        nbytes = sum(array.nbytes for _, array in tree_flatten(unet.parameters()))
        unet.set_dtype(mx.float32)
        mx.eval(unet.parameters())
        mx.clear_cache()
        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        found = forward()
        seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - weights
        error = np.square(found - expected).mean()
        snr = f"{10 * np.log10(np.square(expected).mean() / error):.1f}" if error else "equal"
        cells = [how, f"{nbytes / 1e9:.2f}", f"{8 * nbytes / parameters:.2f}", f"{peak / 1e9:.2f}"]
        print("| " + " | ".join([*cells, snr, f"{seconds:.0f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
