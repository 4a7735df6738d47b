"""Models whose parameters are sharded over processes by `torch.distributed.fsdp.fully_shard`.

Every process runs every batch of such a model, the same one at the same time, and holds a part of
each parameter. Everything that makes a tensor whole is a collective: all processes must call it, in
the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from vlp_plugins.runtime.offload import at_hand

Result = TypeVar("Result")
_FORWARD = "_vlp_plugins_forward"


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor among these is sharded over processes."""
    kind = _kind("torch.distributed.tensor", "DTensor")
    return kind is not None and any(isinstance(tensor, kind) for tensor in tensors)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a tensor, detached: gathered if it is sharded (a collective), else itself."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded((tensor,)) else tensor  # type: ignore[attr-defined]


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that this process holds, in the same memory, detached; may be empty."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded((tensor,)) else tensor  # type: ignore[attr-defined]


def part_of(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor the elements that belong where `here(parameter)` is. No collective.

    Args:
        values: of the parameter's shape, the same in all processes, of any dtype and device.
        parameter: sharded or not.

    Returns:
        On the parameter's device, of the values' dtype.
    """
    values = values.detach().to(parameter.device)
    if not is_sharded((parameter,)):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    placed: Any = parameter
    mesh = placed.device_mesh
    # Every process has all of it already, and takes its part without communication.
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placed.placements).to_local().to(parameter.device)


@torch.no_grad()
def write(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Writes a whole tensor into a parameter in place, in its dtype. No collective."""
    here(parameter).copy_(part_of(values, parameter))


@torch.no_grad()
def zero_outside(parameter: torch.Tensor, mask: torch.Tensor) -> None:
    """Fills a parameter with 0 where a whole bool mask is false, in place. No collective."""
    # Filling, not multiplying: no negative zeros, and no NaN where a weight is infinite.
    values = here(parameter)
    if values.element_size() == 1:  # 8-bit floats cannot be filled; their zero is a zero byte
        values = values.view(torch.uint8)
    values.masked_fill_(~part_of(mask, parameter), 0)


def write_kept(parameter: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> None:
    """Writes compact values, float32 `[kept]`, into the kept elements of a parameter, in place.

    The parameter may be of any dtype, strides and device, and sharded; the bool mask is of its
    shape and on its device.
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


def at_rest(model: nn.Module) -> None:
    """Frees parameters that `fully_shard` has gathered for a forward pass; no collective.

    Those of the root module stay gathered after a forward pass without a backward pass: the model
    has other `Parameter` objects meanwhile, and what is written into them is lost.
    """
    kind = _kind("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules() if kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


def as_forward(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Calls a function that runs parts of the model, as if it was the forward of the whole.

    `fully_shard`, and accelerate of an offloaded model, bring the parameters of the root module for
    its `forward` alone.
    """
    kind = _kind("torch.distributed.fsdp", "FSDPModule")
    if kind is None or not isinstance(model, kind):
        with at_hand(model):
            return function()
    from torch.distributed.fsdp import register_fsdp_forward_method

    errors: list[Exception] = []

    def forward(_: nn.Module) -> Result | None:
        try:
            return function()
        except Exception as error:  # the model must leave its forward pass in any case
            errors.append(error)
            return None

    setattr(model, _FORWARD, MethodType(forward, model))
    try:
        register_fsdp_forward_method(model, _FORWARD)
        result: Result = getattr(model, _FORWARD)()
    finally:
        delattr(model, _FORWARD)
    if errors:
        raise errors[0]
    return result


def in_any_process(flags: torch.Tensor) -> torch.Tensor:
    """Where bool flags are true in any process of the process group; a collective."""
    device = flags.device if distributed.get_backend() == "nccl" else "cpu"
    found = flags.to(device, torch.int32)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.to(flags.device, torch.bool)


class OnDemand(Mapping[str, torch.Tensor]):
    """Tensors by name that are made on every access."""

    def __init__(self, names: Iterable[str], make: Callable[[str], torch.Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # that of `Mapping` would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _kind(module: str, name: str) -> Any:
    """A class of torch, if its module was imported; importing it would slow down every start."""
    return getattr(sys.modules.get(module), name, None)
