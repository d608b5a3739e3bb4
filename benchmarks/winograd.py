"""What half-precision Winograd on a Mac's GPU costs: an emulation of it, on any machine.

    python benchmarks/winograd.py --prompts 20 --dtype float16 bfloat16
    python benchmarks/winograd.py --unet FOLDER --size 1x16x32x32

MLX's Metal backend computes large 3x3 convolutions by Winograd's F(6x6, 3x3) (arXiv:1509.09308), transforms
in float32, and stores the transformed filter, input and product in the dtype of the network. Here all else is
float32, so that what is printed is due to this alone. The first form makes clips with the demo model and
prints which show their prompt, and the PSNR against those of exact convolutions; there every 3x3 layer of 32n
channels is emulated, whatever its number of pixels, which is the worst case. The second prints the
signal-to-noise ratio of one forward of any UNet: with all layers emulated that Metal gives to Winograd, and
with those of one block at a time.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_unet3d
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_unet3d.layers import convolution

TILE, POINTS = 6, (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
METAL = 4096  # pixels of all frames from which Metal takes Winograd
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (6, 8), B (8, 8) and G (8, 3) with A ((G g) * (B d)) the correlation of d (8) with g (3): the product
    of polynomials (Toom and Cook), by its values at seven points and infinity, transposed."""
    size = len(POINTS) + 1
    a, b, g = np.zeros((TILE, size)), np.zeros((size, size)), np.zeros((size, 3))
    for j, point in enumerate(POINTS):
        others = [p for p in POINTS if p != point]
        a[:, j] = point ** np.arange(TILE)
        b[j, : size - 1] = np.poly(others)[::-1]
        g[j] = point ** np.arange(3) / np.prod([point - p for p in others])
    a[-1, -1], g[-1, -1] = 1, 1
    b[-1] = np.poly(POINTS)[::-1]
    return a, b, g


_A, _B, _G = (mx.array(m.astype(np.float32)) for m in matrices())


def _along_both(matrix: mx.array, x: mx.array) -> mx.array:
    """matrix @ x @ matrix.T over the first two axes of x (k, k, ...)."""
    x = mx.tensordot(matrix, x, axes=([1], [0]))
    return mx.tensordot(matrix, x, axes=([1], [1])).swapaxes(0, 1)


def winograd(x: mx.array, weight: mx.array, stored: mx.Dtype) -> mx.array:
    """A 3x3 convolution with padding 1, (N, H, W, I) by (O, 3, 3, I) -> (N, H, W, O), rounded to `stored`
    where MLX's Metal kernels store."""

    def store(x: mx.array) -> mx.array:
        return x.astype(stored).astype(mx.float32)

    n, height, width, channels = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = mx.pad(
        store(x), [(0, 0), (1, 1 + rows * TILE - height), (1, 1 + columns * TILE - width), (0, 0)]
    )
    patches = [
        mx.stack([padded[:, i : i + TILE * rows : TILE, j : j + TILE * columns : TILE] for j in range(8)])
        for i in range(8)
    ]
    inputs = store(_along_both(_B, mx.stack(patches).reshape(8, 8, -1, channels)))
    filters = store(_along_both(_G, store(weight).transpose(1, 2, 3, 0)))
    outputs = _along_both(_A, store(inputs @ filters)).reshape(TILE, TILE, n, rows, columns, -1)
    y = outputs.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * TILE, columns * TILE, -1)
    return store(y[:, :height, :width])


@contextmanager
def emulated(stored: mx.Dtype, pixels: int, module: nn.Module | None = None) -> Iterator[list[int]]:
    """Every 3x3 convolution that Metal would give to Winograd, or of at least `pixels` pixels where that is
    given, goes through `winograd`: of `module`, or of all. Yields a list with one entry for each that did."""
    exact = convolution.conv2d
    weights = None if module is None else {id(a) for _, a in tree_flatten(module.parameters())}
    count: list[int] = []

    def conv2d(x: mx.array, weight: mx.array, bias: Any = None, *options: Any, **keywords: Any) -> mx.array:
        n, height, width, channels = x.shape
        plain = weight.shape[1:3] == (3, 3) and options[:2] in (((1, 1), (1, 1)), (1, 1))
        wide = channels % 32 == 0 and weight.shape[0] % 32 == 0
        if pixels == METAL:
            wide = wide and channels + weight.shape[0] >= 256
        ours = weights is None or id(weight) in weights
        if not (ours and plain and wide and n * height * width >= pixels):
            return exact(x, weight, bias, *options, **keywords)
        count.append(n * height * width)
        y = winograd(x, weight, stored)
        return y if bias is None else y + bias

    convolution.conv2d = conv2d
    try:
        yield count
    finally:
        convolution.conv2d = exact


def signal_to_noise(folder: Path, size: tuple[int, ...], dtype: str, pixels: int) -> Iterator[str]:
    """A line for all layers together, and one for each block that has some."""
    batch, frames, height, width = size
    unet = mlx_unet3d.UNet3DConditionModel.from_pretrained(folder, dtype=mx.float32)
    rng = np.random.default_rng(7)
    config = unet.config
    shapes = (batch, config.in_channels, frames, height, width), (batch, 77, config.cross_attention_dim)
    sample, text = (mx.array(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    exact = unet(sample, 500, text).sample
    mx.eval(exact)
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {"mid_block": unet.mid_block}
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    for name, module in {"all": None, **blocks}.items():
        with emulated(DTYPES[dtype], pixels, module) as count:
            rounded = unet(sample, 500, text).sample
            mx.eval(rounded)
        if count:
            noise = mx.sqrt(mx.square(rounded - exact).mean() / mx.square(exact).mean()).item()
            ratio = -20 * np.log10(noise)
            yield f"{dtype}, {name}, {len(count)} layers: relative rms {noise:.1e}, SNR {ratio:.1f} dB"
        else:
            yield f"{dtype}, {name}: no layer takes Winograd"


def demo(prompts: int, dtypes: list[str], steps: int) -> Iterator[str]:
    """A row of verdicts for exact convolutions, and for each dtype those of the UNet, and of the VAE too."""
    sys.path.insert(0, str(Path(__file__).parent))
    import evaluate

    texts = evaluate.world.held_out_prompts(prompts)
    pipe = mlx_unet3d.TextToVideoPipeline.from_pretrained("demo", dtype=mx.float32, vae_dtype=mx.float32)

    def clips() -> np.ndarray:
        return evaluate.generate(pipe, texts, dict(num_inference_steps=steps), 0, 10)

    def row(kind: str, clips: np.ndarray, psnr: str) -> str:
        shares, _ = evaluate.score(texts, clips, None)
        return f"| {kind} | {' | '.join(f'{share:.0%}' for share in shares.values())} | {psnr} |"

    exact = clips()
    names = list(evaluate.score(texts[:1], exact[:1], None)[0])
    yield f"| convolutions | {' | '.join(names)} | PSNR |"
    yield "|---" * (len(names) + 2) + "|"
    yield row("exact", exact, "")
    for dtype in dtypes:
        for kind, module in (("UNet", pipe.unet), ("UNet and VAE", None)):
            with emulated(DTYPES[dtype], 1, module) as count:
                rounded = clips()
            if not count:
                raise SystemExit("no convolution was emulated; is the demo model what it was?")
            error = np.square(exact.astype(np.float64) - rounded).mean()
            yield row(f"{kind} in {dtype}", rounded, f"{10 * np.log10(255**2 / error):.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float16"])
    parser.add_argument("--unet", type=Path, help="folder of a UNet, for forwards of it")
    parser.add_argument("--size", default="1x4x16x16", help="BxFxHxW of that forward")
    parser.add_argument("--pixels", type=int, default=METAL, help=f"emulate from so many pixels on ({METAL})")
    args = parser.parse_args()
    if args.unet:
        size = tuple(map(int, args.size.split("x")))
        for dtype in args.dtype:
            for line in signal_to_noise(args.unet, size, dtype, args.pixels):
                print(line, flush=True)
    else:
        for line in demo(args.prompts, args.dtype, args.steps):
            print(line, flush=True)


if __name__ == "__main__":
    main()
