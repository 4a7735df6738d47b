"""Models whose parameters are sharded over processes by `torch.distributed.fsdp.fully_shard`.

Each process holds a part of each parameter. Everything that makes a tensor whole is a collective:
all processes must call it, in the same order. A forward pass of the model is one, too, so every
process runs every batch, the same one at the same time; `Gathering` is for those that do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from vlp_plugins.runtime.errors import UnsupportedError
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


class Gathering:
    """Gathers the parameters of a model under `fully_shard` part by part, when it is asked to.

    By itself `fully_shard` gathers them where a module is called, and frees them where it returns.
    If several forwards wait in a module, the first to leave it would free what the others need, and
    processes would have to call every module equally often. Here they may call it as they like. For
    a model that is not sharded all of this does nothing.
    """

    def __init__(self, model: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Changes nothing yet.

        Args:
            model: of which some parts run one after the other.
            parts: of it.
        """
        kind = _kind("torch.distributed.fsdp", "FSDPModule")
        self._model = model
        every = [m for m in model.modules() if kind is not None and isinstance(m, kind)]
        inside = {module for part in parts for module in part.modules()}
        # Modules that were given to `fully_shard` together are gathered together.
        shared = {_state_of(module) for module in every if module not in inside}
        self._outside: list[Any] = [m for m in every if _state_of(m) in shared]
        self._inside: list[Any] = [m for m in every if _state_of(m) not in shared]
        self._hooks: list[_Hook] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """What is in no part is gathered, and calls of modules gather and free nothing.

        A collective. What is written into gathered parameters is lost afterwards.
        """
        at_rest(self._model)
        self._hooks = [hook for m in (*self._outside, *self._inside) for hook in _hooks_of(m)]
        try:
            self._take_over()
            yield
        finally:
            self._give_back()
            at_rest(self._model)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within `open`: all processes may run the whole model together; a collective."""
        self._give_back()
        yield
        self._take_over()

    @contextmanager
    def of(self, part: nn.Module) -> Iterator[None]:
        """Within `open`: a part whose parameters are gathered; a collective.

        Raises:
            UnsupportedError: if they are sharded in another way than by `fully_shard`.
        """
        within = set(part.modules())
        own = [module for module in self._inside if module in within]
        try:
            for module in own:
                module.unshard()
            if is_sharded(part.parameters()):
                raise UnsupportedError(
                    f"a {type(part).__name__} is split over processes that would have to run each "
                    "batch together (tensor parallelism?), and in a walk by blocks each runs its "
                    "own; shard the model by fully_shard alone, or give every process all of it"
                )
            yield
        finally:
            for module in own:
                module.reshard()

    def _take_over(self) -> None:
        for hooks, key, _, cast in self._hooks:
            hooks[key] = cast
        for module in self._outside:
            module.unshard()

    def _give_back(self) -> None:
        for hooks, key, own, _ in self._hooks:
            hooks[key] = own


_Hook = tuple[dict[int, Any], int, Any, Any]
"""Where a module keeps a hook of `fully_shard`, by which key, the hook, and its casts alone."""


def _hooks_of(module: nn.Module) -> Iterator[_Hook]:
    policy = _state_of(module)._mp_policy
    entering = policy.param_dtype if policy.cast_forward_inputs else None
    for hooks, cast in (
        (module._forward_pre_hooks, partial(_cast_inputs, entering)),
        (module._forward_hooks, partial(_cast_output, policy.output_dtype)),
    ):
        for key, hook in hooks.items():
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp."):
                yield hooks, key, hook, cast


def _state_of(module: nn.Module) -> Any:
    """What `fully_shard` knows of a module, and of those that were given to it together."""
    return module._get_fsdp_state()  # type: ignore[operator]


def _cast_inputs(dtype: torch.dtype | None, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast((args, kwargs), dtype)


def _cast_output(dtype: torch.dtype | None, _: nn.Module, __: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    """The floating tensors of any containers in a dtype; None: as they are."""
    if dtype is None:
        return values
    from torch.distributed.utils import _apply_to_tensors

    return _apply_to_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, values)


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
