"""Writes tests/goldens/video_networks.npz: outputs of diffusers for the networks and inputs of
tests/seeded.py.

Needs torch and diffusers. Run from anywhere: python tests/goldens/make_video_networks.py
"""

import sys
from pathlib import Path

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from seeded import CONFIGS, inputs, weight


def main() -> None:
    outputs = {}
    for kind, config in CONFIGS.items():
        model = getattr(diffusers, kind)(**config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
            arguments = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in inputs(kind)]
            run = model.decode if kind.startswith("Autoencoder") else model
            outputs[kind] = run(*arguments).sample.numpy()
    np.savez_compressed(Path(__file__).parent / "video_networks.npz", **outputs)


if __name__ == "__main__":
    main()
