"""The full-size pipeline against diffusers: the same checkpoint, prompt and seed, frame by frame.

    python benchmarks/full_size.py FOLDER

Writes a pipeline of ModelScope's size with seeded weights into FOLDER (1.41 B UNet, 23-layer ViT-H text
encoder, 83.7 M VAE; 7.4 GB in fp32), runs diffusers on it, then `mlx-unet3d generate`, each in a process
of its own, and prints time, peak memory, the PSNR of the frames, and the error of one forward of the UNet
on (1, 4, 16, 32, 32) relative to its largest output. Needs the [parity] extra and 16 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PROMPT, SEED, TIMESTEP = "a panda surfing a wave", 7, 500


def write_tokenizer(folder: Path) -> None:
    """CLIP's file format with single characters for words; the networks are untrained anyway."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>")
    special |= {"bos_token": "<|startoftext|>", "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer_source")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_source")
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            vocab_size=49408,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet3DConditionModel(sample_size=32)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".conv4.3.weight" in name:  # zero at the start, which would leave it untested
                parameter.normal_(0, parameter[0].numel() ** -0.5)
        # An untrained decoder paints grey; more contrast makes differences visible.
        vae.decoder.conv_out.weight.mul_(4)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = TextToVideoSDPipeline(vae.eval(), text.eval(), tokenizer, unet.eval(), scheduler)
    pipe.save_pretrained(folder)


def reference(folder: Path, steps: int, out: Path) -> None:
    import torch
    from diffusers import TextToVideoSDPipeline

    start = time.perf_counter()
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(SEED)
    frames = pipe(PROMPT, num_inference_steps=steps, generator=generator).frames
    np.save(out, frames[0])
    report("diffusers", time.perf_counter() - start)
    sample, text = map(torch.from_numpy, forward_inputs())
    with torch.no_grad():
        np.save(out.with_name("forward.npy"), pipe.unet(sample, TIMESTEP, text).sample.numpy())


def ours(folder: Path, steps: int, out: Path) -> None:
    from mlx_unet3d.cli import main

    start = time.perf_counter()
    arguments = f"generate --steps {steps} --seed {SEED} --dtype float32 --overwrite --keep-latents".split()
    status = main([*arguments, "--model", str(folder), "--output", f"{out}/", PROMPT])
    if status:
        sys.exit(status)
    report("mlx-unet3d", time.perf_counter() - start)

    import mlx.core as mx
    from mlx_unet3d import UNet3DConditionModel

    unet = UNet3DConditionModel.from_pretrained(folder, subfolder="unet")
    sample, text = map(mx.array, forward_inputs())
    prediction, expected = (
        np.array(unet(sample, TIMESTEP, text).sample),
        np.load(out.with_name("forward.npy")),
    )
    error = np.abs(prediction - expected).max() / np.abs(expected).max()
    print(f"one forward of {unet.num_parameters():,} parameters: relative error {error:.1e}", flush=True)


def forward_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Latents (B, C, F, H, W) and text states (B, L, D)."""
    rng = np.random.default_rng(SEED)
    shapes = (1, 4, 16, 32, 32), (1, 77, 1024)
    sample, text = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return sample, text


def report(name: str, seconds: float) -> None:
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{name}: {seconds:.0f} s with loading, peak memory of the process {peak / 1e9:.1f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--part", choices=("make", "reference", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint, frames = args.folder / "checkpoint", args.folder / "reference.npy"
    images = args.folder / "frames"
    if args.part == "make":
        return make(checkpoint)
    if args.part == "reference":
        return reference(checkpoint, args.steps, frames)
    if args.part == "ours":
        return ours(checkpoint, args.steps, images)

    def run(part: str) -> None:
        subprocess.run(
            [sys.executable, __file__, str(args.folder), "--steps", str(args.steps), "--part", part],
            check=True,
        )

    if not (checkpoint / "model_index.json").is_file():
        run("make")
    run("reference")
    run("ours")

    from mlx_unet3d.media import read_video

    expected = np.load(frames)
    made, _ = read_video(images)
    rounded = np.square(made / 255 - (expected * 255).round() / 255).mean()
    print(f"frames {made.shape}, standard deviation {expected.std():.3f}, 8-bit PSNR {psnr(rounded)}")
    return None


def psnr(error: float) -> str:
    return "infinite" if error == 0 else f"{-10 * np.log10(error):.1f} dB"


if __name__ == "__main__":
    main()
