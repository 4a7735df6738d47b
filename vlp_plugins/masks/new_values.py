"""New values of the kept elements, for methods that change what they keep. Pure functions.

They are compact: float32, one-dimensional, the kept elements alone in row-major order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.sharding import here, is_sharded, part_of, whole


def compact(name: str, dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values of the kept elements.

    Args:
        name: of the weight, for the message.
        dense: the new weight, of the mask's shape; floating, any device.
        mask: bool, True = kept.

    Returns:
        float32 `[kept]` on the CPU, in row-major order.

    Raises:
        MaskError: if the shapes differ.
    """
    if dense.shape != mask.shape:
        raise MaskError(
            f"the new values of {name!r} are {list(dense.shape)}, but its mask is "
            f"{list(mask.shape)}; give one value per element, removed ones included"
        )
    return dense.detach()[mask.to(dense.device)].to("cpu", torch.float32)


def check_values(values: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Raises `MaskError` unless there is one finite float32 value for every kept element.

    The message continues a sentence about the masks or their file.
    """
    for name in (*manifest.weights, *values):
        if name not in values:
            raise MaskError(f"the new values of {name!r} are missing")
        if name not in manifest.weights:
            raise MaskError(f"there are new values of {name!r}, but no mask")
        found, kept = values[name], manifest.weights[name]["kept"]
        if found.dtype != torch.float32 or tuple(found.shape) != (kept,):
            raise MaskError(
                f"the new values of {name!r} are {found.dtype} {list(found.shape)} instead of "
                f"torch.float32 [{kept}], one for every kept element"
            )
        if bad := int(found.numel() - torch.isfinite(found).sum()):
            raise MaskError(f"{bad} of {kept} new values of {name!r} are NaN or infinite")


def check_range(name: str, values: torch.Tensor, parameter: nn.Parameter) -> None:
    """Raises `MaskError` if a value is beyond what the parameter's dtype can hold (float16)."""
    most = torch.finfo(parameter.dtype).max
    if most < torch.finfo(torch.float32).max and values.numel():
        greatest = float(values.abs().max())
        if greatest > most:
            raise MaskError(
                f"a new value of {name!r} is {greatest:.4g} in size, more than {parameter.dtype} "
                f"holds ({most:.4g}); load the model in bfloat16 or float32"
            )


def write_kept(parameter: nn.Parameter, mask: torch.Tensor, values: torch.Tensor) -> None:
    """Writes compact values into the kept elements of a parameter, in place, in its dtype.

    Args:
        parameter: any strides, any device; sharded or not.
        mask: bool, of its shape and on its device.
        values: float32 `[kept]`, on any device.
    """
    values = values.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if not is_sharded((parameter,)):
            parameter.masked_scatter_(mask, values)
            return
        dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        spread = part_of(dense.masked_scatter_(mask, values), parameter)
        mine = here(parameter)
        mine.copy_(torch.where(part_of(mask, parameter), spread, mine))


def holds(parameter: nn.Parameter, mask: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `write_kept` would change nothing; see there. A collective if it is sharded."""
    dense = whole(parameter)
    return torch.equal(dense[mask.to(dense.device)], values.to(dense.device, dense.dtype))


def bytes_of_values(values: Mapping[str, torch.Tensor]) -> int:
    """Bytes that they take, in memory and in a file."""
    return sum(each.numel() * each.element_size() for each in values.values())


def same_values(
    one: Mapping[str, torch.Tensor] | None, two: Mapping[str, torch.Tensor] | None
) -> bool:
    """Whether two sets of new values (of the same masks) are equal; None means no new values."""
    if one is None or two is None:
        return one is two
    return all(torch.equal(values, two[name]) for name, values in one.items())
