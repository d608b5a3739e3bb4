"""The full-size video networks against diffusers': one forward of equal seeded weights, its error, time and
peak.

Needs torch and diffusers, about 12 GB of memory and 7 GB of disk. One network is in memory at a time:
diffusers' process writes its weights, inputs and output, then ours reads them.

    python benchmarks/full_size_networks.py [--networks motion svd i2vgenxl] [--folder DIR]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FRAMES, SIZE = 4, 16

# Class, config where it is not diffusers' default, and the inputs (name: shape, or value).
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "motion": (
        "UNetMotionModel",
        dict(cross_attention_dim=768),
        dict(sample=(1, 4, FRAMES, SIZE, SIZE), timestep=500.0, encoder_hidden_states=(FRAMES, 77, 768)),
    ),
    "svd": (
        "UNetSpatioTemporalConditionModel",
        {},
        dict(
            sample=(1, FRAMES, 8, SIZE, SIZE),
            timestep=0.7,
            encoder_hidden_states=(1, 1, 1024),
            added_time_ids=[[6.0, 127.0, 0.02]],
        ),
    ),
    "i2vgenxl": (
        "I2VGenXLUNet",
        {},
        dict(
            sample=(1, 4, FRAMES, SIZE, SIZE),
            timestep=500.0,
            fps=[16.0],
            image_latents=(1, 4, FRAMES, SIZE, SIZE),
            image_embeddings=(1, 1024),
            encoder_hidden_states=(1, 77, 1024),
        ),
    ),
}


def inputs(name: str) -> dict[str, Any]:
    """Arrays drawn from one seed, and numbers."""
    rng = np.random.default_rng(0)
    return {
        key: rng.normal(size=value).astype(np.float32)
        if isinstance(value, tuple)
        else np.array(value, np.float32)
        if isinstance(value, list)
        else value
        for key, value in NETWORKS[name][2].items()
    }


def gigabytes() -> float:
    """The most that this process has held."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def seeded(model: Any) -> Any:
    """Leave no zeros in a fresh torch network: its zeros, ones and halves become numbers that count."""
    import torch

    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def reference(name: str, folder: Path) -> dict[str, float]:
    """diffusers' forward; writes weights and output."""
    import diffusers
    import torch

    cls, config, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = seeded(getattr(diffusers, cls)(**config))
    made = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in inputs(name).items()}
    with torch.no_grad():
        start = time.perf_counter()
        output = model(**made).sample
        seconds = time.perf_counter() - start
    peak = gigabytes()
    np.save(folder / "output.npy", output.numpy())
    model.save_pretrained(folder)
    return {"seconds": seconds, "peak": peak, "parameters": sum(p.numel() for p in model.parameters())}


def ours(name: str, folder: Path) -> dict[str, float]:
    """Our forward on these weights, and its error against the largest value."""
    import mlx_unet3d
    import mlx.core as mx

    start = time.perf_counter()
    model = getattr(mlx_unet3d, NETWORKS[name][0]).from_pretrained(folder)
    loaded = time.perf_counter() - start
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    made = {k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in inputs(name).items()}
    start = time.perf_counter()
    output = model(**made).sample
    mx.eval(output)
    seconds = time.perf_counter() - start
    expected = np.load(folder / "output.npy")
    return {
        "seconds": seconds,
        "load": loaded,
        "peak": gigabytes(),
        "over_weights": (mx.get_peak_memory() - weights) / 1e9,
        "error": float(np.abs(np.array(output) - expected).max() / np.abs(expected).max()),
        "parameters": model.num_parameters(),
    }


def in_process(script: str, *arguments: str) -> dict[str, float]:
    """The figures that a script prints as JSON in its last line, run in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, help="for the weights; a temporary one by default")
    parser.add_argument("--run", choices=("reference", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        run = reference if args.run == "reference" else ours
        print(json.dumps(run(args.networks[0], args.folder)))
        return
    print(
        "| network | parameters | error | MLX s | diffusers s | MLX GB (over weights) | diffusers GB | load "
        "s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.networks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            place = ("--networks", name, "--folder", folder)
            theirs, mine = (in_process(__file__, "--run", which, *place) for which in ("reference", "ours"))
        assert mine["parameters"] == theirs["parameters"]
        print(
            f"| {NETWORKS[name][0]} | {mine['parameters']:,} | {mine['error']:.1e} | {mine['seconds']:.1f} "
            f"| {theirs['seconds']:.1f} | {mine['peak']:.2f} ({mine['over_weights']:.2f}) | "
            f"{theirs['peak']:.2f} | {mine['load']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
