"""Reads back what a clip shows: size, colour, shape, motion and background, from its pixels alone.

The ground is the median of the border, the figure is what differs from it, and everything else follows from
the figure's extent, place and hue over time. NumPy only; shares no code with the renderer of world.py. Where
a clip shows nothing clear (two figures, a blob between two shapes, a drift too small to name) the verdict is
"unclear", which counts as wrong.
"""

import colorsys
from dataclasses import dataclass

import numpy as np

UNCLEAR = "unclear"

# Hues in turns at which a viewer's word changes; red goes round the end.
_HUES = (("red", 0.07), ("yellow", 0.24), ("green", 0.44), ("cyan", 0.56), ("blue", 0.70), ("purple", 0.90))

# Outlines as (fill of the bounding box, cover of its centre, of its corners, of its diagonals half way out,
# upper half's share of the area), from plane geometry, with some allowance for soft corners.
_SHAPES = {
    "circle": (0.785, 1.0, 0.0, 1.0, 0.5),
    "square": (1.0, 1.0, 0.8, 1.0, 0.5),
    "triangle": (0.5, 1.0, 0.4, 0.5, 0.25),
    "cross": (0.57, 1.0, 0.0, 0.0, 0.5),
    "ring": (0.565, 0.0, 0.0, 1.0, 0.5),
}


@dataclass(frozen=True)
class Verdict:
    """The contents of a clip; words of world.ATTRIBUTES, or "unclear".

    Attributes:
        steadiness: 1 - mean change between frames of the figure's colour and, but for its trend, of its area.
    """

    size: str
    colour: str
    shape: str
    motion: str
    background: str
    steadiness: float

    def agrees(self, attributes: dict[str, str | None]) -> dict[str, bool]:
        """Attribute -> whether the clip shows the word asked for; only for those that were asked for."""
        return {name: getattr(self, name) == word for name, word in attributes.items() if word}


def judge(frames: np.ndarray) -> Verdict:
    """The verdict on a clip (F, H, W, 3), floats in [0, 1] or uint8."""
    clip = frames / 255.0 if frames.dtype == np.uint8 else frames.astype(np.float64)
    border = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3)])
    sides = np.concatenate([clip[:, :, :2].reshape(-1, 3), clip[:, :, -2:].reshape(-1, 3)])
    ground = np.median(np.concatenate([border, sides]), axis=0)
    light = ground.mean()
    background = "dark" if light < 0.35 else "light" if light > 0.65 else UNCLEAR

    away = np.linalg.norm(clip - ground, axis=-1)  # (F, H, W)
    if np.quantile(away, 0.99) < 0.2:
        return Verdict(UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR, background, 0.0)
    paint = np.median(clip[away > 0.75 * np.quantile(away, 0.99)], axis=0)
    axis = (paint - ground) / np.square(paint - ground).sum()
    cover = np.clip((clip - ground) @ axis, 0, 1)  # (F, H, W): share of the pixel that is figure
    masks = cover > 0.5
    figures = [largest_piece(mask) for mask in masks]
    whole = [piece.sum() > 0.85 * max(mask.sum(), 1) and piece.sum() >= 20
             for piece, mask in zip(figures, masks, strict=True)]  # fmt: skip
    if sum(whole) < 0.75 * len(whole):
        return Verdict(UNCLEAR, _hue(paint), UNCLEAR, UNCLEAR, background, 0.0)

    boxes = np.array([_box(figure) for figure in figures])  # (F, 4) left, right, top, bottom
    areas = np.array([(c * grown(piece)).sum() for c, piece in zip(cover, figures, strict=True)])
    centres = np.array([_centre(c * grown(piece)) for c, piece in zip(cover, figures, strict=True)])
    extents = np.sqrt((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])) / 2
    extent = np.exp(np.log(extents).mean())
    size = "small" if extent < 11.6 else "large"
    paints = np.array([np.median(f[p], axis=0) for f, p in zip(clip, figures, strict=True)])
    return Verdict(
        size=size,
        colour=_hue(paint),
        shape=_shape(cover, figures, boxes),
        motion=_motion(centres, areas),
        background=background,
        steadiness=_steadiness(paints, areas),
    )


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """The connected piece of a mask (H, W) that holds the most pixels."""
    left, best = mask.copy(), np.zeros_like(mask)
    while left.sum() > best.sum():
        piece = np.zeros_like(mask)
        piece[np.unravel_index(left.argmax(), left.shape)] = True
        count = 0
        while piece.sum() > count:
            count = piece.sum()
            piece = grown(piece) & left
        if count > best.sum():
            best = piece
        left &= ~piece
    return best


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) and all pixels that touch it."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _box(figure: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(figure.any(axis=0)), np.flatnonzero(figure.any(axis=1))
    if not len(columns):
        return 0, 1, 0, 1
    return columns[0], columns[-1] + 1, rows[0], rows[-1] + 1


def _centre(weights: np.ndarray) -> tuple[float, float]:
    total = max(weights.sum(), 1e-6)
    y, x = np.indices(weights.shape)
    return (x * weights).sum() / total, (y * weights).sum() / total


def _hue(paint: np.ndarray) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*np.clip(paint, 0, 1))
    if saturation < 0.3:
        return UNCLEAR
    return next((word for word, end in _HUES if hue < end), "red")


def _shape(cover: np.ndarray, figures: list[np.ndarray], boxes: np.ndarray) -> str:
    """The nearest outline on the mean over the larger frames, which show it best."""
    sizes = np.array([figure.sum() for figure in figures])
    seen = [_outline(cover[i], boxes[i]) for i in np.flatnonzero(sizes >= np.median(sizes))]
    outline = np.mean(seen, axis=0)
    distances = {word: np.abs(outline - ideal).mean() for word, ideal in _SHAPES.items()}
    first, second = sorted(distances, key=distances.__getitem__)[:2]
    clear = distances[first] < 0.12 and distances[first] < 0.75 * distances[second]
    return first if clear else UNCLEAR


def _outline(cover: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The five measures of _SHAPES for one frame's cover (H, W)."""
    left, right, top, bottom = box
    inside = cover[top:bottom, left:right]
    height, width = inside.shape
    y, x = np.meshgrid(
        (np.arange(height) + 0.5) / height * 2 - 1, (np.arange(width) + 0.5) / width * 2 - 1, indexing="ij"
    )

    def share(where: np.ndarray) -> float:
        return float(inside[where].mean()) if where.any() else 0.0

    centre = share(np.hypot(x, y) < 0.3)
    corners = share((np.abs(x) > 0.78) & (np.abs(y) > 0.78))
    diagonals = share((np.abs(np.abs(x) - 0.55) < 0.13) & (np.abs(np.abs(y) - 0.55) < 0.13))
    upper = inside[y < 0].sum() / max(inside[y != 0].sum(), 1e-6)
    return np.array([inside.mean(), centre, corners, diagonals, upper])


def _motion(centres: np.ndarray, areas: np.ndarray) -> str:
    time = np.linspace(-0.5, 0.5, len(areas))

    def trend(values: np.ndarray) -> float:
        return float((time * (values - values.mean())).sum() / np.square(time).sum())

    dx, dy = trend(centres[:, 0]), trend(centres[:, 1])
    growth = trend(np.log(np.maximum(areas, 1))) / 2  # of the logarithm of the length
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along > 12 and across < 0.4 * along and abs(growth) < 0.3:
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    if abs(growth) > 0.3 and along < 8:
        return "growing" if growth > 0 else "shrinking"
    if along < 6 and abs(growth) < 0.15:
        return "standing still"
    return UNCLEAR


def _steadiness(paints: np.ndarray, areas: np.ndarray) -> float:
    colour = np.linalg.norm(np.diff(paints, axis=0), axis=1).mean()
    change = np.diff(np.log(np.maximum(areas, 1)))
    return float(max(0.0, 1 - colour - np.abs(change - change.mean()).mean()))
