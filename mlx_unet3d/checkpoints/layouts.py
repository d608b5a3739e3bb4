"""How each parameter lies in a diffusers file and in MLX.

Letters: O output channels, I input channels, h w kernel. A module tells its layout by its class:
`nn.Conv2d` is "conv2d", `nn.Linear` is "linear", and a class attribute `diffusers_layout` names
any other.

| layout            | diffusers file                      | MLX          |
|-------------------|-------------------------------------|--------------|
| "identity"        | any                                 | the same     |
| "linear"          | (O, I); very old files (O, I, 1, 1) | (O, I)       |
| "conv2d"          | (O, I, h, w)                        | (O, h, w, I) |
| "conv2d_1x1"      | (O, I, 1, 1)                        | (O, I)       |
| "conv3d_temporal" | (O, I, h, w, 1)                     | (O, h, w, I) |
"""

import mlx.core as mx
import mlx.nn as nn

LAYOUTS = ("identity", "linear", "conv2d", "conv2d_1x1", "conv3d_temporal")

_WITHOUT_RULE = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def parameter_layouts(model: nn.Module) -> dict[str, str]:
    """The layout of each weight of `model` that is not "identity", by parameter name.

    Raises:
        TypeError: a module is of a convolution class without a rule, or names an unknown layout.
    """
    layouts = {}
    for path, module in model.named_modules():
        layout = _module_layout(path, module)
        if layout != "identity":
            layouts[f"{path}.weight" if path else "weight"] = layout
    return layouts


def _module_layout(path: str, module: nn.Module) -> str:
    layout = getattr(type(module), "diffusers_layout", None)
    if layout is not None:
        if layout not in LAYOUTS:
            raise TypeError(f"{path}: diffusers_layout={layout!r} is none of {', '.join(LAYOUTS)}")
        return layout
    if isinstance(module, _WITHOUT_RULE):
        raise TypeError(
            f"{path}: {type(module).__name__} has no rule for its diffusers layout; give its class "
            "a diffusers_layout"
        )
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    return "linear" if isinstance(module, nn.Linear) else "identity"


def file_shapes(layout: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that a file may have for an MLX parameter of `shape`; the first is the one written."""
    if layout == "identity":
        return [shape]
    if layout == "linear":
        return [shape, (*shape, 1, 1)]
    if layout == "conv2d_1x1":
        return [(*shape, 1, 1)]
    out, height, width, channels = shape
    if layout == "conv2d":
        return [(out, channels, height, width)]
    return [(out, channels, height, width, 1)]


def to_mlx(layout: str, array: mx.array) -> mx.array:
    """A tensor of a diffusers file as MLX wants it, row-contiguous once evaluated.

    A transposed view would compute the same, but every convolution would copy it again.
    """
    if layout in ("linear", "conv2d_1x1") and array.ndim == 4:
        return array.reshape(array.shape[:2])  # raises unless both kernel sizes are one
    if layout == "conv3d_temporal":
        array = array.squeeze(-1)
    if layout in ("conv2d", "conv3d_temporal"):
        return mx.contiguous(array.transpose(0, 2, 3, 1))
    return array


def to_diffusers(layout: str, array: mx.array) -> mx.array:
    """An MLX parameter as a diffusers file has it; a view where that is enough."""
    if layout == "conv2d_1x1":
        return array[:, :, None, None]
    if layout == "conv2d":
        return array.transpose(0, 3, 1, 2)
    if layout == "conv3d_temporal":
        return array.transpose(0, 3, 1, 2)[..., None]
    return array
