"""Writes noise.npz: torch's CPU normals, drawn on an x86 CPU with AVX2.

Needs torch. Run from anywhere: python tests/goldens/make_noise.py
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

SEEDS = (0, 7, 2**31, 2**32 + 5, 2**64 - 1, -2)
# One stream a seed: short draws leave half a pair for the next short one, across the long ones.
SHAPES = ((3,), (16,), (2, 2), (17,), (), (2, 4, 3, 5), (0,), (15,), (1,), (31,))
LARGE = (2, 4, 16, 33, 31)


def main() -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise SystemExit("this CPU has no AVX2: torch's numbers would differ in their last bits")
    arrays = {"seeds": np.array([str(seed) for seed in SEEDS]), "large_shape": np.array(LARGE)}
    for seed in SEEDS:
        generator = torch.Generator("cpu").manual_seed(seed)
        for i, shape in enumerate(SHAPES):
            arrays[f"{seed}/{i}"] = torch.randn(shape, generator=generator).numpy()
        large = torch.randn(LARGE, generator=generator).numpy()
        arrays[f"{seed}/large"] = np.array(hashlib.sha256(large.tobytes()).hexdigest())
    np.savez_compressed(Path(__file__).with_name("noise.npz"), **arrays)


if __name__ == "__main__":
    main()
