"""The errors of this package that are more than a ValueError, TypeError or OSError."""


class CheckpointError(ValueError):
    """A file or folder is not the checkpoint that it should be: what, which value, which rule, the cure."""


class NonFiniteError(ArithmeticError):
    """Infinities or NaNs appeared in the latents or frames; says at which step, and what helps."""
