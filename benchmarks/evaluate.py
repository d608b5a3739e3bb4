"""Whether the clips of a model of examples/demo_model show what their prompts ask for: a table in Markdown.

    python benchmarks/evaluate.py --reference fp32.npz
    python benchmarks/evaluate.py --dtype float16 --quantize 8 4-32 4-32-uniform mxfp4 --reference fp32.npz

Prompts are combinations of attributes that training never saw; the judge reads the attributes back from the
pixels. `--reference` writes the clips of the first run to a file, and later runs print the PSNR against them.
Several values of --scheduler, --steps, --guidance, --dtype and --quantize make a row each.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_unet3d.schedulers import scheduler_from_config
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo_model"))
import judge
import world

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo", help="pipeline folder (default: demo)")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scheduler", nargs="+", default=["dpm++"])
    parser.add_argument("--steps", nargs="+", type=int, default=[25])
    parser.add_argument("--guidance", nargs="+", type=float, default=[None])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of all networks")
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=["none"],
        metavar="HOW",
        help="of the UNet: none, or bits or mode, then group size and recipe, such as 8, 4-32-uniform, mxfp4",
    )
    parser.add_argument("--freeu", nargs=4, type=float, metavar=("S1", "S2", "B1", "B2"))
    parser.add_argument(
        "--saving",
        nargs="+",
        default=["none"],
        metavar="HOW",
        help="none, cache-INTERVAL-DEPTH such as cache-3-1, or guidance-FROM-TO such as guidance-0-0.5",
    )
    parser.add_argument("--slices", help="attention slices: auto, max or a number")
    parser.add_argument("--batch", type=int, default=10, help="clips at a time")
    parser.add_argument("--reference", type=Path, help="clips to compare with; made if missing")
    parser.add_argument("--save", type=Path, help="folder for the clips, named by prompt and verdict")
    args = parser.parse_args()

    prompts = world.held_out_prompts(args.prompts)
    names = list(world.ATTRIBUTES)
    header = ["scheduler", "steps", "guidance", "dtype", "quantized", "UNet MB", "saving", *names]
    header += ["all", "steadiness", "s a clip", "PSNR"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header), flush=True)
    for dtype, how in itertools.product(args.dtype, args.quantize):
        pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(
            args.model, dtype=DTYPES[dtype], vae_dtype=DTYPES[dtype]
        )
        if how != "none":
            pipe.unet.quantize(**quantization(how))
        megabytes = sum(array.nbytes for _, array in tree_flatten(pipe.unet.parameters())) / 1e6
        if args.freeu:
            pipe.unet.enable_freeu(*args.freeu)
        if args.slices:
            pipe.unet.set_attention_slice(int(args.slices) if args.slices.isdigit() else args.slices)
        config = pipe.scheduler.config
        for scheduler, steps, guidance, save in itertools.product(
            args.scheduler, args.steps, args.guidance, args.saving
        ):
            pipe.scheduler = scheduler_from_config(config, scheduler)
            start = time.perf_counter()
            settings = dict(num_inference_steps=steps, guidance_scale=guidance, **saving(save))
            clips = generate(pipe, prompts, settings, args.first_seed, args.batch)
            seconds = (time.perf_counter() - start) / len(prompts)
            rates, steadiness = score(prompts, clips, args.save)
            cells = [
                scheduler,
                steps,
                f"{pipe.guidance_scale(guidance):g}",
                dtype,
                how,
                f"{megabytes:.1f}",
                save,
            ]
            cells += [f"{100 * rates[name]:.0f} %" for name in [*names, "all"]]
            cells += [f"{steadiness:.3f}", f"{seconds:.2f}", compare(clips, args.reference)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def quantization(how: str) -> dict[str, Any]:
    """The keywords of `model.quantize` for a text such as "4-32-uniform" or "mxfp4"."""
    first, *rest = how.split("-")
    keywords: dict[str, Any] = {"bits": int(first)} if first.isdigit() else {"mode": first}
    for part in rest:
        keywords |= {"group_size": int(part)} if part.isdigit() else {"recipe": part}
    return keywords


def saving(how: str) -> dict[str, Any]:
    """The arguments of a pipeline for a text such as "cache-3-1" or "guidance-0-0.5"."""
    kind, *numbers = how.split("-")
    if kind == "cache":
        return dict(cache_interval=int(numbers[0]), cache_depth=int(numbers[1]))
    return dict(guidance_interval=(float(numbers[0]), float(numbers[1]))) if kind == "guidance" else {}


def generate(pipe, prompts: list[str], settings: dict[str, Any], seed: int, batch: int) -> np.ndarray:
    """Clips uint8 (P, F, H, W, 3); prompt i has the seed `seed` + i whatever the batch."""
    clips = []
    for start in tqdm(range(0, len(prompts), batch), leave=False):
        some = prompts[start : start + batch]
        seeds = [seed + start + i for i in range(len(some))]
        size = dict(num_frames=world.FRAMES, height=world.SIZE, width=world.SIZE)
        frames = pipe(some, seed=seeds, **size, **settings).frames
        clips.append(mlx_unet3d.media.to_uint8(frames))
    return np.concatenate(clips)


def score(prompts: list[str], clips: np.ndarray, folder: Path | None) -> tuple[dict[str, float], float]:
    """Attribute -> share of clips that show it, "all" for all at once; and the mean steadiness."""
    right: dict[str, list[bool]] = {}
    steadiness = []
    for i, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        verdict = judge.judge(clip)
        agreed = verdict.agrees(world.attributes_of(prompt))
        for name, ok in (agreed | {"all": all(agreed.values())}).items():
            right.setdefault(name, []).append(ok)
        steadiness.append(verdict.steadiness)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            wrong = "".join(f", {name} {getattr(verdict, name)}" for name, ok in agreed.items() if not ok)
            mlx_unet3d.media.write_video(folder / f"{i:03d} {prompt}{wrong}.webp", clip)
    return {name: float(np.mean(values)) for name, values in right.items()}, float(np.mean(steadiness))


def compare(clips: np.ndarray, reference: Path | None) -> str:
    """PSNR against the clips in the file, in dB; writes them where there is none."""
    if reference is None:
        return ""
    if not reference.exists():
        np.savez_compressed(reference, clips=clips)
        return "reference"
    expected = np.load(reference)["clips"]
    if expected.shape != clips.shape:
        raise SystemExit(f"{reference} holds clips {expected.shape}, these are {clips.shape}")
    error = np.square(clips.astype(np.float64) - expected).mean()
    return "equal" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"


if __name__ == "__main__":
    main()
