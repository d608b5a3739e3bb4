"""Deep features of one step, reused in the next ones (DeepCache, arXiv:2312.00858)."""

import mlx.core as mx

from ..scalars import as_count


class FeatureCache:
    """The output of a UNet's deep layers in one step, which stands for them in the next steps.

    Pass one cache to all forwards of a run, in order. The result is an approximation: the deep features are
    up to `interval` - 1 steps old.

    Args:
        interval: run all layers in every `interval`th forward; at least 1, which reuses nothing.
        depth: number of layers at the end of the way up that always run, with the layers that make their
            skips; at least 1.

    Raises ValueError for numbers below 1.
    """

    def __init__(self, interval: int = 3, depth: int = 1):
        self.interval, self.depth = as_count("interval", interval), as_count("depth", depth)
        self.reset()

    def reset(self) -> None:
        """Forget the features: the next forward is a full one."""
        self._features: mx.array | None = None
        self._age = 0

    def next(self) -> mx.array | None:
        """Return the features for the next forward; None where it must run all layers."""
        self._age += 1
        return None if self._age >= self.interval else self._features

    def keep(self, features: mx.array) -> None:
        """Store the features (B, F, H, W, C) of a full forward."""
        self._features, self._age = features, 0
