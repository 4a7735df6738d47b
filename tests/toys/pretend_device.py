"""Devices that are not there: tensors of the CPU that say they are elsewhere, with its rules.

What a GPU refuses is an error: operands on two devices, NumPy. What waits for a GPU is counted: a
number read, and a result whose size depends on values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CPU = torch.device("cpu")
_ANYWHERE = (aten.copy_, aten._to_copy, aten.set_)
_SIZED_BY_VALUES = (
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
)  # fmt: skip
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class PretendDevices:
    """Where tensors are, by their storage, and what waited for a device.

    Attributes:
        waits: how often, by the innermost lines of the package.
    """

    def __init__(self) -> None:
        self._places: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.waits: Counter[str] = Counter()

    @contextmanager
    def active(self) -> Iterator[PretendDevices]:
        engine = torch.autograd._engine_run_backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            with _Functions(self):  # off inside of `torch.autograd.grad`, for its hooks too
                return engine(*args, **kwargs)

        with (
            patch("torch.autograd._engine_run_backward", backward),
            _Functions(self),
            _Operations(self),
        ):
            yield self

    def place(self, tensor: torch.Tensor) -> torch.device:
        return self._places.get(tensor.untyped_storage()._cdata, (None, CPU))[1]

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        # The weak reference keeps the address of a storage from being used again.
        reference = StorageWeakRef(tensor.untyped_storage())
        self._places[reference.cdata] = (reference, device)

    def copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied = tensor.clone()
        self.put(copied, device)
        return copied

    def wait_for(self, tensor: torch.Tensor) -> None:
        if self.place(tensor) == CPU:
            return
        frame = sys._getframe(1)
        lines = []
        while frame is not None:
            path = frame.f_code.co_filename
            if "/vlp_plugins/" in path or "/vlp_adapters/" in path or "/transformers/" in path:
                lines.append(f"{path.rpartition('/')[2]}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        self.waits[" < ".join(islice(lines, 3))] += 1


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient goes back."""

    @staticmethod
    def forward(
        context: Any, values: torch.Tensor, devices: PretendDevices, *way: torch.device
    ) -> torch.Tensor:
        context.devices, context.way = devices, way
        return devices.copy(values, way[1])

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return context.devices.copy(gradient, context.way[0]), None, None, None


class _Functions(TorchFunctionMode):
    """What names a device, which the operations below no longer see."""

    def __init__(self, devices: PretendDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        devices, kwargs = self._devices, dict(kwargs or {})
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return devices.place(args[0])
        if function in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(function, args[0], args[1:], kwargs)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            if devices.place(args[0]) != CPU:
                raise TypeError(f"can't convert a tensor on {devices.place(args[0])} to numpy")
        elif function is torch.Tensor.tolist:
            devices.wait_for(args[0])
        elif function is torch.Tensor.copy_ and devices.place(args[0]) == CPU:
            devices.wait_for(args[1])
        wanted = kwargs.get("device")
        if wanted is None and function is torch.Tensor.new_tensor:
            wanted = devices.place(args[0])
        if wanted is not None:
            kwargs["device"] = CPU
        found = function(*args, **kwargs)
        if wanted is not None and isinstance(found, torch.Tensor):
            devices.put(found, torch.device(wanted))
        return found

    def _moved(self, function: Any, tensor: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        devices = self._devices
        before = after = devices.place(tensor)
        if function is torch.Tensor.cpu:
            after, args = CPU, ()
        elif args and isinstance(args[0], torch.Tensor):
            after, args = devices.place(args[0]), (args[0].dtype, *args[1:])
        elif args and isinstance(args[0], torch.device | str | int | None):
            after, args = torch.device(args[0] or before), args[1:]
        if (wanted := kwargs.pop("device", None)) is not None:
            after = torch.device(wanted)
        found = tensor.to(CPU, *args, **kwargs)
        if after == before:
            return found
        if after == CPU:
            devices.wait_for(tensor)
        return _Move.apply(found, devices, before, after)


class _Operations(TorchDispatchMode):
    """What is computed, by whatever calls it."""

    def __init__(self, devices: PretendDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kind, devices = operation.overloadpacket, self._devices
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if kind not in _ANYWHERE and not kind.__name__.startswith("_foreach"):
            self._check(kind, tensors)
            masked = kind in _INDEXING and _has_mask(args[1])
            if masked or kind in _SIZED_BY_VALUES:
                devices.wait_for(tensors[0])
        found = operation(*args, **(kwargs or {}))
        places = {devices.place(t) for t in tensors} - {CPU}
        if len(places) == 1:
            known = {t.untyped_storage()._cdata for t in tensors}
            for made in tree_leaves(found):
                if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in known:
                    devices.put(made, *places)
        return found

    def _check(self, kind: Any, tensors: list[torch.Tensor]) -> None:
        """A number may come from the host, and so may places in an index."""
        bound = tensors[:1] if kind in _INDEXING else tensors
        places = {self._devices.place(t) for t in tensors}
        if not any(t.ndim and self._devices.place(t) == CPU for t in bound):
            places.discard(CPU)
        if len(places) > 1:
            raise RuntimeError(f"{kind} got tensors that are not on the same device: {places}")


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
