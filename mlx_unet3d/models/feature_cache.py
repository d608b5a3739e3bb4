"""Deep features of one step that serve the next ones as well (DeepCache, arXiv:2312.00858)."""

import mlx.core as mx

from ..scalars import as_count


class FeatureCache:
    """What the deep layers of a UNet made of a step, in place of running them in the steps after it.

    Give one to all forwards of a run, in their order. The result is no longer that of the plain run: the deep
    features are those of up to `interval` - 1 steps ago.

    Args:
        interval: a full forward in every so many; at least 1, which keeps nothing.
        depth: layers at the end of the up path, and the skips for them, that always run; at least 1.

    Raises ValueError for other numbers.
    """

    def __init__(self, interval: int = 3, depth: int = 1):
        self.interval, self.depth = as_count("interval", interval), as_count("depth", depth)
        self.reset()

    def reset(self) -> None:
        """Forget the features: the next forward is a full one."""
        self._features: mx.array | None = None
        self._age = 0

    def next(self) -> mx.array | None:
        """The features for the next forward, or None where that is a full one."""
        self._age += 1
        return None if self._age >= self.interval else self._features

    def keep(self, features: mx.array) -> None:
        """Take the features (B, F, H, W, C) of a full forward."""
        self._features, self._age = features, 0
