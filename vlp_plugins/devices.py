"""Where a model runs, and in which precision."""

from __future__ import annotations

import torch

from vlp_plugins.errors import UnsupportedError, first_line, suggest


def default_device(device: str | None) -> torch.device:
    """The device of that name; None takes a GPU if there is one.

    Raises:
        UnsupportedError: if there is no such device.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used ({first_line(error)}); write cpu, or leave it out"
        ) from error
    return found


_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype for `torch.autocast`; None for none.

    Raises:
        UnsupportedError: for anything but bfloat16 and float16.
    """
    if dtype is None or dtype in _PRECISIONS.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise UnsupportedError(f"autocast {name!r} is unknown{suggest(name, list(_PRECISIONS))}")
    return _PRECISIONS[name]


_PRODUCT_ERRORS = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-7}
_LEGACY_PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


def float32_product_error(device: torch.device) -> float:
    """What reduced precision of matrix products, where it is allowed, adds to their rounding.

    Set by `torch.set_float32_matmul_precision`, or backend by backend by `fp32_precision`, after
    which the getters of the older switches raise.

    Args:
        device: where float32 matrices are multiplied.

    Returns:
        Relative to the product of the magnitudes: 0, 2^-10 (TF32) or 2^-7 (bfloat16).
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch before 2.9
        precision = _LEGACY_PRECISIONS[torch.get_float32_matmul_precision()]
    return _PRODUCT_ERRORS.get(precision, max(_PRODUCT_ERRORS.values()))


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of that name; None for None.

    Raises:
        UnsupportedError: for anything but float32, bfloat16 and float16.
    """
    known = {"float32": torch.float32, **_PRECISIONS}
    if dtype is None or dtype in known.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UnsupportedError(f"dtype {name!r} is unknown{suggest(name, list(known))}")
    return known[name]
