"""Full-size pipelines against diffusers': two steps of equal seeded weights and noise, PSNR, time and peak.

Needs torch, diffusers and transformers, about 14 GB of memory and 10 GB of disk. diffusers' process writes
its weights and frames, then ours reads them.

    python benchmarks/full_size_pipelines.py [--pipelines svd animatediff] [--folder DIR]
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from full_size_networks import gigabytes, in_process, seeded

SIZE, STEPS = 256, 2
FRAMES = {"svd": 14, "animatediff": 16}


def picture() -> Any:
    """A smooth picture, as photographs are."""
    from PIL import Image

    rough = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def prompts() -> dict[str, np.ndarray]:
    """States as of two prompts: (1, 77, 768) each."""
    rng = np.random.default_rng(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: rng.normal(size=(1, 77, 768)).astype(np.float32) for name in names}


def call(name: str, pipe: Any, array: Any, **options: Any) -> np.ndarray:
    """Frames (F, H, W, 3) in [0, 1] of a pipeline of either library."""
    given = {key: array(value) for key, value in prompts().items()} if name == "animatediff" else {}
    if name == "svd":
        given |= {"image": picture(), "decode_chunk_size": FRAMES[name]}
    made = pipe(
        **given,
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES[name],
        num_inference_steps=STEPS,
        output_type="np",
        **options,
    )
    return np.asarray(made.frames)[0]


def diffusers_pipeline(name: str) -> Any:
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    vae = dict(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=SIZE,
    )
    if name == "svd":
        encoder = transformers.CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
            projection_dim=1024,
            hidden_act="gelu",
        )
        return diffusers.StableVideoDiffusionPipeline(
            seeded(diffusers.AutoencoderKLTemporalDecoder(**vae)),
            seeded(transformers.CLIPVisionModelWithProjection(encoder)),
            seeded(diffusers.UNetSpatioTemporalConditionModel(num_frames=14)),
            diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                use_karras_sigmas=True,
                sigma_min=0.002,
                sigma_max=700.0,
                timestep_type="continuous",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            transformers.CLIPImageProcessor(),
        )
    unet = seeded(diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64))
    adapter = seeded(diffusers.MotionAdapter(use_motion_mid_block=False))
    return diffusers.AnimateDiffPipeline(
        seeded(diffusers.AutoencoderKL(**vae, up_block_types=("UpDecoderBlock2D",) * 4)),
        None,  # the prompts are given as states
        None,
        unet,
        adapter,
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    )


def reference(name: str, folder: Path) -> dict[str, float]:
    """diffusers' frames; writes weights and frames."""
    import torch

    pipe = diffusers_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    start = time.perf_counter()
    frames = call(name, pipe, torch.from_numpy, generator=torch.manual_seed(0))
    seconds = time.perf_counter() - start
    np.save(folder / "frames.npy", frames)
    return {"seconds": seconds, "peak": gigabytes()}


def ours(name: str, folder: Path) -> dict[str, float]:
    """Our frames of these weights, and their PSNR."""
    import mlx_unet3d
    import mlx.core as mx

    cls = {"svd": "StableVideoDiffusionPipeline", "animatediff": "AnimateDiffPipeline"}[name]
    start = time.perf_counter()
    pipe = getattr(mlx_unet3d, cls).from_pretrained(folder, dtype=mx.float32)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    frames = call(name, pipe, mx.array, seed=0)
    seconds = time.perf_counter() - start
    expected = np.load(folder / "frames.npy")
    assert frames.shape == expected.shape, (frames.shape, expected.shape)
    error = float(np.square(frames.astype(np.float64) - expected).mean())
    return {
        "seconds": seconds,
        "load": loaded,
        "peak": gigabytes(),
        "psnr": -10 * math.log10(error) if error else math.inf,
        "deviation": float(expected.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", nargs="+", choices=FRAMES, default=list(FRAMES))
    parser.add_argument("--folder", type=Path, help="for the weights; a temporary one by default")
    parser.add_argument("--run", choices=("reference", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        run = reference if args.run == "reference" else ours
        print(json.dumps(run(args.pipelines[0], args.folder)))
        return
    print("| pipeline | PSNR dB (deviation) | MLX s | diffusers s | MLX GB | diffusers GB | load s |")
    print("|---|---|---|---|---|---|---|")
    for name in args.pipelines:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            place = ("--pipelines", name, "--folder", folder)
            theirs, mine = (in_process(__file__, "--run", which, *place) for which in ("reference", "ours"))
        print(
            f"| {name} {SIZE}x{SIZE}x{FRAMES[name]}, {STEPS} steps | {mine['psnr']:.1f} "
            f"({mine['deviation']:.3f}) | {mine['seconds']:.0f} | {theirs['seconds']:.0f} | "
            f"{mine['peak']:.2f} | {theirs['peak']:.2f} | {mine['load']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
