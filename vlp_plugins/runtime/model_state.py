"""Modes, precision and wrappers of a model: set for a while, and restored afterwards."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock, RLock
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vlp_plugins.runtime.errors import UnsupportedError, check_known, first_line
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.runtime.sharding import is_sharded

_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    for module, name, inner in _WRAPPERS:
        # A wrapper whose module was not imported cannot be there.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(model, kind):
            return bare(getattr(model, inner))
    return model


_SAMPLE = 8  # values of a tensor, at most twice as many


def fingerprint(tensors: Iterable[torch.Tensor]) -> list[str]:
    """How often each tensor was written, and some of its values: `.data` hides writes."""
    found: list[object] = []
    for tensor in tensors:
        found.append(None if tensor.is_inference() else tensor._version)
        if tensor.is_meta or is_sharded((tensor,)) or not tensor.is_contiguous():
            continue
        values = tensor.detach().view(-1)
        found += values[:: max(1, len(values) // _SAMPLE)].tolist()
    return [str(value) for value in found]  # NaN equals NaN


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, out of wrappers such as that of `accelerate`."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} is not a torch.optim.Optimizer, so its steps cannot be "
            "hooked; give the torch optimizer, or call mask_gradients() before and apply() after "
            "every step"
        )
    return optimizer


def before_updates(
    optimizer: Optimizer, read: Callable[[Optimizer, bool], None]
) -> RemovableHandle:
    """Calls a function in every step when the gradients are there and no weight has changed yet.

    Without a closure that is before the step. A closure computes the gradients in the step, some
    optimizers (L-BFGS) call it several times: the function is called after each of its calls.

    Args:
        optimizer: not wrapped.
        read: called with the optimizer and whether these are the first gradients of the step, which
            are those of the weights before it; may change them in place.

    Returns:
        What ends it.
    """

    def hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The first argument is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            read(optimizer, True)
            return None
        first = True

        def closure_and_read() -> Any:
            nonlocal first
            loss = closure()
            read(optimizer, first)
            first = False
            return loss

        if len(args) > 1:
            return (args[0], closure_and_read, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_and_read}

    return optimizer.register_step_pre_hook(hook)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def exclusive(model: nn.Module) -> AbstractContextManager[Any]:
    """A re-entrant lock of a model: hooks, modes and weights belong to one thread at a time."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(bare(model), RLock())


def check_module(model: object) -> None:
    """Raises `UnsupportedError` for what is not a module, a path above all."""
    if not isinstance(model, nn.Module):
        made = f"vlp_plugins.load({model!r})" if isinstance(model, str) else "vlp_plugins.load"
        raise UnsupportedError(
            f"model is a {type(model).__name__}, not a torch.nn.Module; {made} makes one of a "
            "path or hub id"
        )


def takes_model(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorates every function that users give a model to: `bare` and `exclusive` for it."""
    place = list(inspect.signature(function).parameters).index("model")
    given: Callable[..., Result] = function

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        values, named = list[Any](args), dict[str, Any](options)
        by_position = place < len(values)
        model = values[place] if by_position else named.get("model")
        if not by_position and "model" not in named:
            return given(*values, **named)  # Python says what is missing
        check_module(model)
        model = bare(model)  # type: ignore[arg-type]
        if by_position:
            values[place] = model
        else:
            named["model"] = model
        with exclusive(model), _explained_float64():
            return given(*values, **named)

    return call


@contextmanager
def _explained_float64() -> Iterator[None]:
    """Says what to do on an Apple GPU, where torch has no float64."""
    try:
        yield
    except TypeError as error:
        if "MPS" not in str(error) or "float64" not in str(error):
            raise
        raise UnsupportedError(
            "the model is on an Apple GPU (MPS), which has no float64, and sums and thresholds "
            "here need it; move the model to the CPU: model.to('cpu'), or --device cpu"
        ) from error


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restores the training flag of every module afterwards; other threads wait (`exclusive`).

    Yields:
        What restores them at any time in between.
    """
    with exclusive(model):
        flags = [(module, module.training) for module in model.modules()]

        def restore() -> None:
            for module, training in flags:
                module.training = training

        try:
            yield restore
        finally:
            restore()


@contextmanager
def fast_path_off() -> Iterator[None]:
    """`nn.TransformerEncoder` and `nn.MultiheadAttention` run their layers one by one.

    Their fast path packs the real tokens into nested tensors, which hooks cannot read, or runs no
    layer at all. The switch is the process's: it is restored when the last block of any thread
    ends.
    """
    with _FAST_PATH.lock:
        if not _FAST_PATH.blocks:
            _FAST_PATH.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _FAST_PATH.blocks += 1
    try:
        yield
    finally:
        with _FAST_PATH.lock:
            _FAST_PATH.blocks -= 1
            if not _FAST_PATH.blocks:
                torch.backends.mha.set_fastpath_enabled(_FAST_PATH.before)


@dataclass
class _FastPath:
    """How many blocks want it off, and what it was before the first."""

    blocks: int = 0
    before: bool = True
    lock: AbstractContextManager[Any] = field(default_factory=Lock)


_FAST_PATH = _FastPath()


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Models of transformers keep no keys and values, so that a layer can be run twice."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    cached = {id(c): c for c in configs if getattr(c, "use_cache", False)}.values()
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Models of transformers compute attention probabilities, which other kernels do not give."""
    key = "_attn_implementation"
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    kernels = {id(c): (c, getattr(c, key)) for c in configs if hasattr(c, key)}.values()
    try:
        for config, _ in kernels:
            setattr(config, key, "eager")
        yield
    finally:
        for config, kernel in kernels:  # from the whole to its parts, which follow it
            setattr(config, key, kernel)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores the buffers of a model afterwards: a forward may change its own state."""
    kept = [
        (module, name, buffer, None if buffer.is_meta else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


def random_state_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Restores the random state of the CPU and of this device afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to a dtype; nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


_callers_defaults: ContextVar[tuple[torch.device, torch.dtype] | None] = ContextVar(
    "callers_defaults", default=None
)
"""Default device and dtype outside the outermost `neutral_state`; None if they are torch's own."""


@contextmanager
def neutral_state() -> Iterator[None]:
    """Torch as a new process has it: default dtype float32, default device CPU, no autocast.

    For every public function that computes, as a decorator: what the caller has set for the process
    (`torch.set_default_dtype`, `torch.set_default_device`) or around the call (`torch.autocast`)
    changes no result. `callers_defaults` brings back what a model may rely on.
    """
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in {"cpu", *_accelerators()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu" or dtype != torch.float32:
            token = _callers_defaults.set((device, dtype))
            stack.callback(_callers_defaults.reset, token)
            stack.enter_context(_defaults(torch.device("cpu"), torch.float32))
        yield


@contextmanager
def callers_defaults(model: nn.Module) -> Iterator[None]:
    """Inside `neutral_state`, the caller's default device and dtype where the model has the same.

    A model that was made under `torch.set_default_device("cuda")` may make tensors in its forward
    pass that belong there.
    """
    found = _callers_defaults.get()
    if found is None:
        yield
        return
    parameter = next(model.parameters())
    device = found[0] if found[0].type == device_of(model).type else torch.device("cpu")
    dtype = found[1] if found[1] == parameter.dtype else torch.float32
    with _defaults(device, dtype):
        yield


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with nullcontext() if device == torch.get_default_device() else device:
            yield
    finally:
        torch.set_default_dtype(before)


def _accelerators() -> list[str]:
    if not torch.accelerator.is_available():  # torch 2.6 has an error then, later ones None
        return []
    found = torch.accelerator.current_accelerator()
    return [] if found is None else [found.type]


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


_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOATING = {"float32": torch.float32, **_HALF}


def autocast_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype for `torch.autocast`; None for none.

    Raises:
        UnsupportedError: for anything but bfloat16 and float16.
    """
    return _dtype_in(_HALF, "autocast", dtype)


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of that name; None for None.

    Raises:
        UnsupportedError: for anything but float32, bfloat16 and float16.
    """
    return _dtype_in(_FLOATING, "dtype", dtype)


def _dtype_in(
    known: Mapping[str, torch.dtype], what: str, dtype: torch.dtype | str | None
) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    check_known(what, name, known)
    return known[name]


_PRODUCT_ERRORS = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-7}
_LEGACY_PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


def float32_product_error(device: torch.device) -> float:
    """What reduced precision of matrix products, where it is allowed, adds to their rounding.

    Set by `torch.set_float32_matmul_precision`, or backend by backend by `fp32_precision`, after
    which the getters of the older switches raise.

    Returns:
        Relative to the product of the magnitudes: 0, 2^-10 (TF32) or 2^-7 (bfloat16).
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch before 2.9
        precision = _LEGACY_PRECISIONS[torch.get_float32_matmul_precision()]
    return _PRODUCT_ERRORS.get(precision, max(_PRODUCT_ERRORS.values()))


_PRODUCTS = {0.0: "float32", 2.0**-10: "TF32", 2.0**-7: "bfloat16"}


def arithmetic_of(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a result besides data and seed, for the record of a run.

    Args:
        device: where a model is.

    Returns:
        `device`, `deterministic` (whether torch runs such algorithms alone), and in what float32
        `products` of matrices and, on CUDA devices, `convolutions` are computed.
    """
    cuda = device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "products": _PRODUCTS[float32_product_error(device)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if cuda:
        precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
        if precision is None:  # torch before 2.9
            precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
        found["convolutions"] = "TF32" if precision == "tf32" else "float32"
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; every module gets its own training flag back.

    Yields:
        The device that its inputs belong on.
    """
    with flags_kept(model), torch.no_grad():
        model.eval()
        yield device_of(model)
