"""How well a text-to-video folder keeps to prompts of the demo world, by the judge.

    python examples/demo_model/evaluate.py --model runs/demo/checkpoint --prompts 100

The prompts name combinations that training never showed.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import mlx_unet3d  # first, so that the fast BLAS is there before NumPy's

# isort: split
import mlx.core as mx
import numpy as np
import world
from judge import Verdict, judge
from PIL import Image

from mlx_unet3d.schedulers import scheduler_from_config


def evaluate(
    pipe: mlx_unet3d.TextToVideoPipeline, prompts: list[str], seeds: int, batch: int, **options: float
) -> tuple[list[tuple[str, int, Verdict, np.ndarray]], float]:
    """All prompts with all seeds: (prompt, seed, verdict, clip (F, H, W, 3)) each, and seconds a clip."""
    jobs = [(prompt, seed) for seed in range(seeds) for prompt in prompts]
    results, start = [], time.perf_counter()
    for at in range(0, len(jobs), batch):
        chunk = jobs[at : at + batch]
        names, numbers = [prompt for prompt, _ in chunk], [1000 * seed + at for _, seed in chunk]
        numbers = [number + i for i, number in enumerate(numbers)]
        clips = pipe(
            names, seed=numbers, num_frames=world.FRAMES, height=world.SIZE, width=world.SIZE, **options
        ).frames
        results += [(*job, judge(clip), clip) for job, clip in zip(chunk, clips, strict=True)]
    return results, (time.perf_counter() - start) / len(jobs)


def report(results: list[tuple[str, int, Verdict, np.ndarray]]) -> dict[str, float]:
    """Share of right verdicts by attribute, of clips with all of them right, and the mean steadiness."""
    right, asked, every = Counter(), Counter(), 0
    for prompt, _, verdict, _ in results:
        agrees = verdict.agrees(world.attributes_of(prompt))
        right.update(name for name, good in agrees.items() if good)
        asked.update(agrees.keys())
        every += all(agrees.values())
    shares = {name: right[name] / asked[name] for name in world.ATTRIBUTES if asked[name]}
    steadiness = float(np.mean([verdict.steadiness for _, _, verdict, _ in results]))
    return shares | {"all right": every / len(results), "steadiness": steadiness}


def contact_sheet(clips: list[np.ndarray], path: Path) -> None:
    """Clips as rows of frames in one PNG."""
    rows = [np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0))) for f in clip], axis=1) for clip in clips]
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    """Parse the command line, make the clips, print a table row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a diffusers text-to-video pipeline")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=1, help="clips of each prompt")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--scheduler", help="class name; that of the folder if left out")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--sheet", type=Path, help="PNG for the first clips")
    parser.add_argument("--wrong", action="store_true", help="list the prompts that were missed")
    args = parser.parse_args()
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained(args.model, dtype=getattr(mx, args.dtype))
    if args.scheduler:
        pipe.scheduler = scheduler_from_config({**pipe.scheduler.config, "_class_name": args.scheduler})
    results, seconds = evaluate(
        pipe,
        world.held_out_prompts(args.prompts),
        args.seeds,
        args.batch,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
    )
    shares = report(results)
    if args.wrong:
        for prompt, seed, verdict, _ in results:
            missed = [name for name, good in verdict.agrees(world.attributes_of(prompt)).items() if not good]
            if missed:
                print(f"{prompt} (seed {seed}): {', '.join(f'{m} {getattr(verdict, m)}' for m in missed)}")
    if args.sheet:
        contact_sheet([clip for *_, clip in results[:16]], args.sheet)
    name = type(pipe.scheduler).__name__
    print("| scheduler | steps | guidance | dtype | clips |", " | ".join(shares), "| s a clip |")
    print("|---|" + "---|" * (len(shares) + 5))
    figures = " | ".join(f"{share:.1%}" for share in shares.values())
    setting = f"{name} | {args.steps} | {args.guidance:g} | {args.dtype} | {len(results)}"
    print(f"| {setting} | {figures} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
