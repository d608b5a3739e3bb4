"""A world that a viewer can check at a glance: one coloured shape on a plain ground, moving or changing size.

A clip is 8 frames of 64x64 pixels. Five attributes describe it, each with a closed vocabulary:

    "a large red circle moving left on a dark background"
       size  colour shape  motion          background

Any word may be left out of a prompt; what it would have said is then open ("a shape" names no attribute).
NumPy only: nothing here knows about models, and the judge (judge.py) shares no code with it.
"""

import hashlib
from collections.abc import Mapping
from itertools import product

import numpy as np

FRAMES, SIZE = 8, 64

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": ("small", "large"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "motion": (
        "moving left",
        "moving right",
        "moving up",
        "moving down",
        "growing",
        "shrinking",
        "standing still",
    ),
    "background": ("dark", "light"),
}
"""Attribute -> its words."""

Attributes = Mapping[str, str | None]
"""Attribute -> word, or None (or no entry) where the prompt leaves it open."""

_COLOURS = {  # RGB in [0, 1]
    "red": (0.88, 0.16, 0.16),
    "yellow": (0.94, 0.80, 0.14),
    "green": (0.15, 0.68, 0.26),
    "cyan": (0.10, 0.76, 0.80),
    "blue": (0.18, 0.30, 0.90),
    "purple": (0.60, 0.20, 0.82),
}
_GREYS = {"dark": 0.10, "light": 0.88}
_RADII = {"small": 9.0, "large": 15.0}  # pixels
_DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
_TRAVEL = 24.0  # pixels from the first frame to the last
_GROWTH = 1.7  # radius of the last frame over that of the first
# Farthest extent over the radius.
_REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.25, "cross": 1.1, "ring": 1.05}


def prompt_of(attributes: Attributes) -> str:
    """The prompt for attributes; open ones are left out. `attributes_of` is its inverse."""
    get = attributes.get
    words = ["a", get("size"), get("colour"), get("shape") or "shape", get("motion")]
    if get("background"):
        words += ["on a", get("background"), "background"]
    return " ".join(word for word in words if word)


def attributes_of(prompt: str) -> dict[str, str | None]:
    """The attributes that a prompt names, None for the others; words of no attribute are passed over."""
    text = f" {' '.join(prompt.lower().split())} "
    return {
        name: next((word for word in words if f" {word} " in text), None)
        for name, words in ATTRIBUTES.items()
    }


def vocabulary() -> list[str]:
    """Every word of the prompts, once, sorted."""
    words = {"a", "shape", "on", "background"}
    words.update(word for values in ATTRIBUTES.values() for value in values for word in value.split())
    return sorted(words)


def is_held_out(attributes: Attributes) -> bool:
    """Return True if this (colour, shape, motion) is kept from training, one in five; by hash, for good."""
    key = "/".join(str(attributes[name]) for name in ("colour", "shape", "motion"))
    return hashlib.sha256(key.encode()).digest()[0] % 6 == 0


def combinations(held_out: bool) -> list[dict[str, str]]:
    """All full attribute sets that are held out of training, or all that are in it."""
    every = (dict(zip(ATTRIBUTES, words, strict=True)) for words in product(*ATTRIBUTES.values()))
    return [attributes for attributes in every if is_held_out(attributes) == held_out]


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different full prompts of held-out combinations, the same ones for the same seed.

    Raises ValueError where there are not so many.
    """
    every = combinations(held_out=True)
    if count > len(every):
        raise ValueError(f"{count} prompts asked for; the world holds out {len(every)} combinations")
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return [prompt_of(every[i]) for i in order]


def sample_attributes(rng: np.random.Generator, *, training: bool = False) -> dict[str, str]:
    """Random full attributes; with `training`, never a held-out combination."""
    while True:
        attributes = {name: words[rng.integers(len(words))] for name, words in ATTRIBUTES.items()}
        if not (training and is_held_out(attributes)):
            return attributes


def render(attributes: Attributes, seed: int | np.random.Generator) -> np.ndarray:
    """A clip (8, 64, 64, 3), float32 in [0, 1]; open attributes, place and shade are drawn from the seed.

    Equal attributes and seed give equal pixels.
    """
    rng = np.random.default_rng(seed)
    drawn = sample_attributes(rng)
    words = {name: attributes.get(name) or drawn[name] for name in ATTRIBUTES}
    shape, motion = words["shape"], words["motion"]

    time = np.linspace(-0.5, 0.5, FRAMES)
    growth = {"growing": _GROWTH, "shrinking": 1 / _GROWTH}.get(motion, 1.0)
    radii = _RADII[words["size"]] * rng.uniform(0.95, 1.05) * growth**time  # (F,)
    direction = np.array(_DIRECTIONS.get(motion, (0, 0)), float)
    path = np.outer(time, direction) * _TRAVEL * rng.uniform(0.92, 1.04)  # (F, 2) in x, y around the middle
    room = SIZE / 2 - 1 - radii.max() * _REACH[shape] - np.abs(path).max(axis=0)
    # Moving shapes cross the middle, growing and shrinking ones are near it: words alone say where and when.
    spread = np.where(direction != 0, 2.0, room if growth == 1 else 6.0)
    centres = SIZE / 2 + rng.uniform(-1, 1, 2) * np.clip(room, 0, spread) + path

    colour = np.array(_COLOURS[words["colour"]]) * rng.uniform(0.9, 1.06) + rng.uniform(-0.03, 0.03, 3)
    ground = _GREYS[words["background"]] + rng.uniform(-0.05, 0.05) + rng.uniform(-0.015, 0.015, 3)

    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    frames = np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    for frame, radius, centre in zip(frames, radii, centres, strict=True):
        distance = _distance(shape, x - centre[0], y - centre[1], radius)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]  # (H, W, 1): one pixel of smooth edge
        frame[:] = np.clip(cover * colour + (1 - cover) * ground, 0, 1)
    return frames


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline, negative inside; exact near straight edges and circles."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.79 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "cross":
        near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
        return np.maximum(near - 0.38 * radius, far - 1.1 * radius)
    # An upright triangle, its centre of mass in the middle.
    slope = np.sqrt(3) / 2 * np.abs(x) - 0.5 * y
    return np.maximum(slope, y) - 0.625 * radius
