"""Dtypes as users write them, and the one that pipelines run in where nobody says."""

from typing import Any

import mlx.core as mx

FLOAT_DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def as_dtype(dtype: Any, name: str = "dtype") -> mx.Dtype | None:
    """Return the MLX dtype of a dtype of MLX, NumPy or torch, or of a string such as "float16".

    Others' dtypes are told by their names, so that torch need not be there. None stays None; ValueError for
    any but float32, float16 and bfloat16, with `name` in its message.
    """
    if dtype is None:
        return None
    written = getattr(dtype, "__name__", None) or str(dtype)  # np.float16 is a class; torch.float16 is not
    found = FLOAT_DTYPES.get(written.rpartition(".")[2])
    if found is None:
        raise ValueError(
            f"{name}={dtype} must be mx.float32, mx.float16 or mx.bfloat16, or one of these as a string"
        )
    return found


def default_dtype() -> mx.Dtype:
    """Return float16 on a GPU, float32 on a CPU, where half precision is slower."""
    return mx.float16 if mx.default_device() == mx.gpu else mx.float32
