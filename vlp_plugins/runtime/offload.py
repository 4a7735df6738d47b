"""Tensors of a model that accelerate keeps outside of it, in RAM or on disk.

A hook of accelerate gives a module its parameters for the time of a call, each time as new
`Parameter` objects, and leaves them on the meta device in between. What is read and written here is
what the hook takes them from. Files that the model was offloaded to are never changed: a changed
tensor goes to a file of its own, next to them, which is removed when nothing refers to it any more.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from vlp_plugins.runtime.errors import OutputError, UnsupportedError, first_line

Part = Callable[[torch.Tensor], torch.Tensor]


class Offloaded:
    """Where one tensor of a model is kept.

    Attributes:
        device: that it is computed on.
        place: equal for tensors that are kept once.
    """

    def __init__(self, hook: Any, name: str, dtype: torch.dtype) -> None:
        self._values, self._key = _home(hook.weights_map, name)
        self._dtype = dtype
        self.device = _device_of(hook)

    @property
    def place(self) -> tuple[object, ...]:
        if self._in_memory is not None:
            kept = self._in_memory[self._key]
            pointer = kept.untyped_storage().data_ptr()
            return (pointer, kept.storage_offset(), tuple(kept.shape), kept.stride(), kept.device)
        entry = self._values.index[self._key]
        return ("file", entry.get("safetensors_file"), entry.get("weight_name", self._key))

    def read(
        self, part: Part | None = None, *, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The values on a device, None: on `device`; of a part alone only that part is moved there.

        They may share their memory with what is kept: for reading only.
        """
        kept = self._values[self._key].detach()
        there = self.device if device is None else device
        return (kept if part is None else part(kept)).to(there, self._dtype)

    @torch.no_grad()
    def write(self, values: torch.Tensor, part: Part | None = None) -> None:
        """Replaces the values, or those of a part.

        Raises:
            OutputError: if they are on disk and there is no space for new ones.
        """
        if self._in_memory is not None:
            kept = self._in_memory[self._key]
            (kept if part is None else part(kept)).copy_(values)
            return
        if part is None:
            whole = values.detach().to("cpu", self._dtype)
        else:
            whole = self._values[self._key].detach().clone()
            part(whole).copy_(values)
        self._values.index[self._key] = _Changed(whole.contiguous(), self._values.save_folder)

    def kept(self) -> Callable[[], None]:
        """Keeps the values of now; what it returns brings them back."""
        if self._in_memory is not None:
            values = self._in_memory[self._key].detach().clone()
            return lambda: self.write(values)
        index, key = self._values.index, self._key
        entry = index[key]
        return lambda: index.__setitem__(key, entry)

    @property
    def _in_memory(self) -> Mapping[str, torch.Tensor] | None:
        """What holds the tensor in RAM; None if it is on disk."""
        if not _reads_files(self._values):
            return self._values
        held: Mapping[str, torch.Tensor] = self._values.state_dict
        return held if self._key in held else None


class _Changed(dict[str, str]):
    """An entry of accelerate's index of files, whose file goes with it."""

    def __init__(self, values: torch.Tensor, folder: str | None) -> None:
        where = Path(tempfile.gettempdir() if folder is None else folder)
        try:
            with tempfile.NamedTemporaryFile(
                prefix="vlp-", suffix=".safetensors", dir=where, delete=False
            ) as file:
                path = Path(file.name)
            weakref.finalize(self, path.unlink, missing_ok=True)
            save_file({"values": values}, path)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"a changed weight of a model that is offloaded to disk cannot be written to "
                f"{where}: {first_line(error)}; give the offload folder, or TMPDIR, more space"
            ) from error
        dtype = str(values.dtype).removeprefix("torch.")
        super().__init__(safetensors_file=str(path), weight_name="values", dtype=dtype)

    def __deepcopy__(self, memo: object) -> _Changed:
        return self  # entries are replaced, never changed


def offloaded_in(model: nn.Module) -> dict[str, Offloaded]:
    """Where every parameter and buffer is kept that accelerate has taken out of a model, by path.

    Raises:
        UnsupportedError: if they are kept in a way that cannot be written to.
    """
    hooks: list[tuple[str, Any]] = [
        (path, hook) for path, module in model.named_modules() for hook in offloading(module)
    ]
    found: dict[str, Offloaded] = {}
    for path, hook in hooks:
        module = model.get_submodule(path)
        deep = hook.place_submodules
        named = [
            *module.named_parameters(recurse=deep, remove_duplicate=False),
            *module.named_buffers(recurse=deep, remove_duplicate=False),
        ]
        for name, tensor in named:
            whole = f"{path}.{name}" if path else name
            if tensor.is_meta and whole not in found and _knows(hook.weights_map, name):
                found[whole] = Offloaded(hook, name, tensor.dtype)
    return found


def offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on a module that take its parameters away."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            yield each


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of a model belong: where its first parameter is, or is brought."""
    path, parameter = next(model.named_parameters(), ("", torch.empty(0, device="cpu")))
    parts = path.split(".") if parameter.is_meta else []
    for length in range(len(parts) - 1, -1, -1):
        for hook in offloading(model.get_submodule(".".join(parts[:length]))):
            return _device_of(hook)
    return parameter.device


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps parameters of a model outside of it."""
    return any(True for module in model.modules() for _ in offloading(module))


def check_resident(model: nn.Module, what: str) -> None:
    """Raises `UnsupportedError` for an offloaded model, for `what` ("training") cannot be done."""
    if is_offloaded(model):
        raise UnsupportedError(
            f"accelerate has offloaded parameters of this {type(model).__name__}: {what} needs "
            "them in the model; load it without device_map, or bring them back: "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )


def at_hand(model: nn.Module) -> AbstractContextManager[None]:
    """The model's own parameters, not those of its parts, as in its forward."""
    return _at_hand(model) if any(True for _ in offloading(model)) else nullcontext()


@contextmanager
def _at_hand(model: nn.Module) -> Iterator[None]:
    hooks = list(offloading(model))
    for hook in hooks:
        hook.pre_forward(model)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(model, None)


@contextmanager
def brought(model: nn.Module, paths: Collection[str]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """The `Parameter` objects that accelerate makes of some parameters in the calls of a block.

    Yields:
        The path and object of each, in the order of the calls; to be emptied by the caller.
    """
    made: list[tuple[str, nn.Parameter]] = []
    hooks = []
    for prefix, module in model.named_modules():
        for hook in offloading(module):
            named = module.named_parameters(recurse=hook.place_submodules, remove_duplicate=False)
            within = [(f"{prefix}.{name}" if prefix else name, name) for name, _ in named]
            names = [(path, name) for path, name in within if path in paths]
            if names:
                hook.pre_forward = _recording(hook.pre_forward, names, made)
                hooks.append(hook)
    try:
        yield made
    finally:
        for hook in hooks:
            del hook.pre_forward


def _recording(
    bring: Callable[..., Any], names: list[tuple[str, str]], made: list[tuple[str, nn.Parameter]]
) -> Callable[..., Any]:
    def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = bring(module, *args, **kwargs)
        made.extend((path, module.get_parameter(name)) for path, name in names)
        return result

    return pre_forward


def _device_of(hook: Any) -> torch.device:
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def _home(values: Any, name: str) -> tuple[Any, str]:
    """What really keeps the tensors of a hook, and the name there."""
    while hasattr(values, "prefix") and hasattr(values, "dataset"):
        values, name = values.dataset, f"{values.prefix}{name}"
    return values, name


def _reads_files(values: Any) -> bool:
    return hasattr(values, "state_dict") and hasattr(values, "index")


def _knows(values: Any, name: str) -> bool:
    values, name = _home(values, name)
    if _reads_files(values):
        return name in values.state_dict or name in values.index
    if not isinstance(values, dict):
        raise UnsupportedError(
            f"the parameters of this model are kept in a {type(values).__name__}, which is none of "
            "accelerate's own: cpu_offload, disk_offload, dispatch_model, device_map"
        )
    return name in values
