"""The work of MLX's Metal backend on the networks, predicted from their graphs: tables in Markdown.

    python benchmarks/metal_routes.py
    python benchmarks/metal_routes.py --model svd-xt --chip M5
    python benchmarks/metal_routes.py --model demo --height 128 --width 128 --frames 16 --chip "M2 Max" M1

Without a size: the three reference workloads, or that of the model of that name. Nothing is computed and no
Mac is needed; what is printed was predicted from MLX's dispatch rules and public figures of the chips, and
none of it was measured on one.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx_unet3d
import mlx.core as mx
from mlx_unet3d import AutoencoderKL
from mlx_unet3d.chips import CHIPS, GIB, Chip, find_chip
from mlx_unet3d.models.video_unet import VideoUNet

sys.path.insert(0, str(Path(__file__).parent))
from metal import rules, workloads
from metal.predict import Prediction, kernel_seconds, kind_of_place
from metal.workloads import FAMILY, REFERENCE, Workload

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Beside a forward: the other networks and the system's share of the working set, and what MLX encodes ahead.
RESERVE = GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("full", "demo", *FAMILY), default="full")
    parser.add_argument("--height", type=int, help="pixels; give --width and --frames with it")
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--guidance", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the UNet (default: float16)")
    parser.add_argument("--vae-dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--chip", nargs="+", type=chip_of, default=list(CHIPS.values()), metavar="CHIP")
    args = parser.parse_args()

    size = (args.height, args.width, args.frames)
    if None in size and any(size):
        parser.error("--height, --width and --frames belong together")
    if None not in size and (min(size) < 1 or args.height % 8 or args.width % 8):
        parser.error(
            f"{args.width}x{args.height}x{args.frames}: sizes must be multiples of 8, frames at least 1"
        )
    unet, vae, reference = networks(args.model)
    chosen = reference if None in size else [Workload(*size)]
    versions = f"MLX {rules.VERSION}'s rules, mlx-unet3d {mlx_unet3d.__version__}"
    print(f"Predicted ({versions}), not measured.\n")
    for work in chosen:
        work = Workload(work.height, work.width, work.frames, args.guidance)
        step, once = workloads.predict_unet(unet, work, DTYPES[args.dtype], vae.spatial_factor)
        print(f"# {args.model} UNet, {work}, {args.dtype}: one step\n")
        describe(step, args.chip)
        print(f"Once for a prompt: {tera(once.flops)} TFLOP in {once.kernels} kernels.\n")
        decode, chunks = workloads.predict_decode(vae, work, DTYPES[args.vae_dtype])
        print(f"# {args.model} VAE, {work}, {args.vae_dtype}: one of {chunks} chunks\n")
        describe(decode, args.chip)


def networks(model: str) -> tuple[VideoUNet, AutoencoderKL, Sequence[Workload]]:
    """UNet, VAE, and the workloads where no size is given."""
    if model in FAMILY:
        make, work = FAMILY[model]
        vae = workloads.full_temporal_vae() if model.startswith("svd") else workloads.full_vae()
        return make(), vae, [work]
    if model == "demo":
        return *workloads.demo(), REFERENCE
    return workloads.full_unet(), workloads.full_vae(), REFERENCE


def chip_of(name: str) -> Chip:
    try:
        return find_chip(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def describe(p: Prediction, chips: list[Chip]) -> None:
    place, elements, size = p.done.largest
    rows = [
        ("convolutions", f"{tera(p.conv_flops)} TFLOP"),
        ("products of matrices", f"{tera(p.matmul_flops)} TFLOP"),
        ("attention", f"{tera(p.attention_flops)} TFLOP"),
        ("all", f"{tera(p.flops)} TFLOP"),
        ("bytes moved", f"{giga(p.bytes)} GB; {giga(p.bytes_fused)} GB if all were compiled"),
        ("kernels", f"{p.kernels}; {p.kernels_fused} if all were compiled"),
        ("copies of activations", f"{len(p.copies)}, {giga(sum(c.bytes for c in p.copies))} GB written"),
        ("activations in single precision", listed(p.leaks)),
        ("parameters changed at run time", listed(p.weight_work)),
        ("parameters", f"{giga(p.weights)} GB"),
        ("activations at the peak", f"{giga(p.peak)} GB, in {p.done.peak_place}"),
        ("largest buffer", f"{elements:,} elements, {giga(size)} GB, in {place}"),
    ]
    table(["", ""], rows)
    table(["convolution", "count", "TFLOP"], routes(p))
    table(["attention", "count", "queries", "keys", "head", "TFLOP"], attentions(p))
    table(["copied in", "why", "count", "GB written"], copies(p))
    table(["kernel", "count", "TFLOP issued", "GB", f"ms, {chips[0].name}"], kernels(p, chips[0]))
    header = ["chip", "fp16 TFLOP/s", "GB/s", "s", "s if all were compiled", "fits in"]
    table(header, [timing(p, chip) for chip in chips])


def routes(p: Prediction) -> list[tuple]:
    groups = grouped(p.done.convolutions, lambda c: c.route)
    return [(route, len(found), tera(sum(c.conv.flops for c in found))) for route, found in groups]


def attentions(p: Prediction) -> list[tuple]:
    groups = grouped(p.attentions, lambda a: (a.route, a.queries, a.keys, a.dim))
    return [
        (route, len(found), queries, keys, dim, tera(sum(a.flops for a in found)))
        for (route, queries, keys, dim), found in groups
    ]


def copies(p: Prediction) -> list[tuple]:
    groups = grouped(p.copies, lambda c: (kind_of_place(c.place) or "the network itself", c.why))
    return [(*key, len(found), giga(sum(c.bytes for c in found))) for key, found in groups]


def kernels(p: Prediction, chip: Chip) -> list[tuple]:
    half = p.dtype.size == 2
    groups = grouped(p.done.kernels, lambda k: k.kind)
    rows = []
    for kind, found in groups:
        ms = 1e3 * sum(kernel_seconds(k, chip, half) for k in found)
        flops, moved = sum(k.flops for k in found), sum(k.bytes for k in found)
        rows.append((kind, len(found), tera(flops), giga(moved), ms))
    rows.sort(key=lambda row: -row[-1])
    return [(*row[:-1], f"{row[-1]:.1f}") for row in rows]


def timing(p: Prediction, chip: Chip) -> tuple:
    needed = p.weights + p.peak + RESERVE
    sizes = [gib for gib, usable in chip.working_sets().items() if usable >= needed]
    fit = f"{sizes[0]} GB" if sizes else "none"
    times = (f"{p.seconds(chip, fused):.2f}" for fused in (False, True))
    return (chip.name, f"{chip.fp16_tflops:.1f}", f"{chip.gb_per_s:g}", *times, fit)


def grouped(items: Iterable, key: Callable) -> list[tuple]:
    """(key, items) in the order of their first appearance."""
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def listed(found: list[tuple]) -> str:
    if not found:
        return "none"
    place, what, shape = found[0]
    return f"{len(found)}, the first in {place}: {what} of {shape}"


def tera(flops: int) -> str:
    return f"{flops / 1e12:.3f}"


def giga(size: int) -> str:
    return f"{size / 1e9:.2f}"


def table(header: list[str], rows: list[tuple]) -> None:
    if rows:
        print("| " + " | ".join(header) + " |")
        print("|" + "---|" * len(header))
        for row in rows:
            print("| " + " | ".join(map(str, row)) + " |")
        print(flush=True)


if __name__ == "__main__":
    main()
