"""One forward of the UNet here and in diffusers: the same weights and inputs, turn about in one process.

    python benchmarks/against_diffusers.py --model full --folder FOLDER --sizes 1x4x16x16 1x16x32x32

Prints a Markdown table: seconds of both sides and their ratio with its quartiles over the repeats, the
largest difference of the outputs relative to the largest output, and the peak memory of MLX over its weights.
Sizes are BxFxHxW (batch, frames, latent height and width). `full` (ModelScope's 1.41 B parameters) and
`small` have seeded weights, which are kept in FOLDER, 5.6 GB for `full`; both networks are in memory at once.
With CUDA on both sides `--device gpu --dtype float16` compares them there. Needs the [parity] extra.
"""

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx_unet3d
import mlx.core as mx
import numpy as np
import torch
from mlx_unet3d import UNet3DConditionModel, blas
from diffusers import UNet3DConditionModel as ReferenceUNet
from diffusers import __version__ as diffusers_version

CONFIGS = {
    "full": {"sample_size": 32},
    "small": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 32,
        "layers_per_block": 1,
    },
}
TOKENS, TIMESTEP, SEED = 77, 500, 7


@dataclass
class Row:
    """What was measured at one size; seconds and ratios one a repeat, bytes over the weights."""

    size: tuple[int, int, int, int]
    error: float
    peak: int
    theirs: list[float]
    ours: list[float]

    @property
    def ratios(self) -> list[float]:
        """Time of MLX over time of torch: below 1 is faster than diffusers."""
        return [o / t for o, t in zip(self.ours, self.theirs, strict=True)]

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.ratios, (0.25, 0.5, 0.75))
        cells = (
            "x".join(map(str, self.size)),
            f"{np.median(self.theirs):.3g}",
            f"{np.median(self.ours):.3g}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{self.error:.1e}",
            f"{self.peak / 1e6:.0f}",
        )
        return "| " + " | ".join(cells) + " |"


HEADER = "| B x F x H x W | diffusers s | MLX s | ratio | quartiles | max rel. error | MLX peak MB |"


def write_seeded(folder: Path, config: dict) -> None:
    """diffusers' network with seeded weights; its temporal convolutions, which start as the identity, are
    given weights too."""
    torch.manual_seed(0)
    unet = ReferenceUNet(**config)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".conv4.3.weight" in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    unet.save_pretrained(folder)


def locate(model: str, folder: Path) -> Path:
    """The folder of a network in diffusers' layout, made where it is a seeded one."""
    if model not in (*CONFIGS, "demo"):
        return Path(model)
    folder = folder / model
    if (folder / "config.json").is_file():
        return folder
    if model == "demo":
        demo = Path(mlx_unet3d.__file__).parent / "demo"
        unet = UNet3DConditionModel.from_pretrained(demo, subfolder="unet")
        unet.save_pretrained(folder, layout="diffusers")
    else:
        write_seeded(folder, CONFIGS[model])
        gc.collect()
    return folder


def seconds(forward: Callable[[], object]) -> float:
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


def compare(
    theirs: ReferenceUNet, ours: UNet3DConditionModel, size: tuple[int, int, int, int], repeats: int
) -> Row:
    """Measure one size; the first forward of each warms up, and is where error and peak come from."""
    batch, frames, height, width = size
    rng = np.random.default_rng(SEED)
    shapes = (
        (batch, theirs.config.in_channels, frames, height, width),
        (batch, TOKENS, theirs.config.cross_attention_dim),
    )
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    sample, text = (torch.from_numpy(x).to(theirs.device, theirs.dtype) for x in inputs)
    our_sample, our_text = (mx.array(x).astype(ours.dtype) for x in inputs)

    def reference() -> torch.Tensor:
        with torch.no_grad():
            prediction = theirs(sample, TIMESTEP, text).sample
        if prediction.is_cuda:
            torch.cuda.synchronize()
        return prediction

    def forward() -> mx.array:
        prediction = ours(our_sample, TIMESTEP, our_text).sample
        mx.eval(prediction)
        return prediction

    expected = reference().float().cpu().numpy()
    peak, prediction = peak_over_weights(forward)
    error = np.abs(np.array(prediction.astype(mx.float32)) - expected).max() / np.abs(expected).max()
    times = [(seconds(reference), seconds(forward)) for _ in range(repeats)]
    return Row(size, float(error), peak, *map(list, zip(*times, strict=True)))


def peak_over_weights(forward: Callable[[], mx.array]) -> tuple[int, mx.array]:
    """Bytes that a forward needs beside what is there before, with no operation begun ahead of its turn."""
    mx.synchronize()
    mx.clear_cache()
    limit = mx.set_memory_limit(1)
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        prediction = forward()
        return mx.get_peak_memory() - before, prediction
    finally:
        mx.set_memory_limit(limit)


def machine(theirs: ReferenceUNet) -> str:
    """One line: processor, cores in use, memory, system, versions."""
    if theirs.device.type == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        chip = f"{processor()}, {torch.get_num_threads()} threads"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = f"mlx {mx.__version__} (BLAS {blas.loaded}), torch {torch.__version__}"
    system = f"{platform.platform(terse=True)}, diffusers {diffusers_version}"
    return f"{chip}, {memory:.0f} GB, {system}, {versions}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def size(text: str) -> tuple[int, int, int, int]:
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not BxFxHxW, such as 1x16x32x32")
    return tuple(map(int, parts))


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo", help="full, small, demo, or a folder in diffusers' layout")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "against_diffusers",
        help="where the seeded networks are kept",
    )
    parser.add_argument("--sizes", nargs="+", type=size, default=[(1, 4, 16, 16)], metavar="BxFxHxW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args(arguments)

    if args.device == "gpu" and not (torch.cuda.is_available() and mx.is_available(mx.gpu)):
        sys.exit("--device gpu needs CUDA in torch and a GPU in MLX; use --device cpu")
    device = mx.default_device()
    mx.set_default_device(mx.Device(getattr(mx, args.device)))
    try:
        source = locate(args.model, args.folder)
        theirs = ReferenceUNet.from_pretrained(source, torch_dtype=getattr(torch, args.dtype)).eval()
        theirs.to("cuda" if args.device == "gpu" else "cpu")
        ours = UNet3DConditionModel.from_pretrained(source, dtype=getattr(mx, args.dtype))
        mx.eval(ours.parameters())
        print(f"{args.model}, {ours.num_parameters():,} parameters, {args.dtype}; {machine(theirs)}\n")
        print(HEADER)
        print("|---" * 7 + "|", flush=True)
        rows = []
        for dimensions in args.sizes:
            rows.append(compare(theirs, ours, dimensions, args.repeats))
            print(rows[-1], flush=True)
        return rows
    finally:
        mx.set_default_device(device)


if __name__ == "__main__":
    main()
