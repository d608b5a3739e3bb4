"""The work of MLX's Metal backend on a forward, from its graph and MLX's own rules.

`trace.trace` records a forward without running it; `predict.predict` reads from the record which kernels will
run, what they compute, move and keep, and how long that takes at best. All of it is prediction; none was
measured on a Mac.
"""

import mlx_unet3d  # noqa: F401
