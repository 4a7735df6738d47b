"""Which tokens enter the modules that use prunable weights, and the hooks that read them."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from vlp_plugins.models.adapter import Adapter, Owner, Stream, TokenKind
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, StatisticsError, UnsupportedError
from vlp_plugins.runtime.model_state import (
    callers_defaults,
    fast_path_off,
    flags_kept,
    random_state_kept,
)
from vlp_plugins.runtime.offload import device_of
from vlp_plugins.runtime.sharding import as_forward, at_rest

# Elements of an unfolded convolution input that exist at a time: 64 MiB of float32.
_UNFOLDED = 1 << 24


class TokenReader(ABC):
    """Makes `[tokens, in_features]` of the input of one module.

    Attributes:
        key: equal for readers that make the same rows of the same input.
    """

    key: tuple[object, ...] = ()

    def __init__(self, path: str) -> None:
        self._path = path

    @abstractmethod
    def read(self, inputs: torch.Tensor, real: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """The rows, in one or several parts.

        Args:
            inputs: what entered the module.
            real: bool, true where a token is real; None where all are.

        Raises:
            BatchError: if `real` does not fit the input.
        """

    def _select(self, tokens: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """`[..., features]` and a mask of its leading dimensions to `[real tokens, features]`."""
        if real is not None:
            if real.dtype != torch.bool:
                raise UnsupportedError(
                    f"the token mask of {self._path} is {real.dtype}; an adapter must give bool"
                )
            if tokens.shape[:-1] != real.shape:
                raise self._misfit(tokens, real)
            rows = _rows_of(real, tokens.device)
            if rows is not None:
                return tokens.flatten(0, -2).index_select(0, rows)
        return tokens.reshape(-1, tokens.shape[-1])

    def _misfit(self, tokens: torch.Tensor, real: torch.Tensor) -> BatchError:
        return BatchError(
            f"the input of {self._path} is {list(tokens.shape)}, but the mask of its tokens is "
            f"{list(real.shape)}; if the layer sees other tokens than those, the adapter must give "
            "it a token space of its own: with ModuleAdapter, tokens={regular expression: None}, "
            "or ['attention_mask', None] in place of None for padded words and then images"
        )


def _rows_of(real: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Places of the real tokens among all, int64; None if all are real. One wait per mask."""
    version = None if real.is_inference() else real._version
    known = _ROWS.get(real)
    if version is not None and known is not None and known[:2] == (device, version):
        return known[2]
    rows = torch.nonzero(real.flatten())[:, 0]
    found = None if len(rows) == real.numel() else rows.to(device)
    _ROWS[real] = (device, version, found)
    return found


_ROWS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of each mask of tokens, as long as it lives: a look at its values waits for a device."""


class _Rows(TokenReader):
    """The last dimension holds the features, as `nn.Linear` reads them."""

    def read(self, inputs: torch.Tensor, real: torch.Tensor | None) -> Iterator[torch.Tensor]:
        # One vector per sample (a pooler's input) has no dimension for the tokens of the mask.
        pooled = real is not None and inputs.ndim == 2 == real.ndim and len(inputs) == len(real)
        yield self._select(inputs, None if pooled else real)


class _Patches(TokenReader):
    """Every position of a convolution is a token; its features are the patch under the kernel."""

    def __init__(self, path: str, module: nn.Conv2d) -> None:
        super().__init__(path)
        if module.groups != 1:
            raise UnsupportedError(
                f"{path} is a convolution in {module.groups} groups, whose outputs do not all "
                "read the same inputs; exclude it (ModuleAdapter(exclude=...))"
            )
        self._kernel, self._stride = module.kernel_size, module.stride
        self._dilation = module.dilation
        # What the module pads by itself, also for padding='same': left, right, top, bottom.
        self._padding = list(module._reversed_padding_repeated_twice)
        self._mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        geometry = (self._kernel, self._stride, self._dilation, *self._padding, self._mode)
        self.key = ("patches", *geometry)

    def read(self, inputs: torch.Tensor, real: torch.Tensor | None) -> Iterator[torch.Tensor]:
        if inputs.ndim == 3:
            inputs = inputs.unsqueeze(0)
        if real is not None and len(real) != len(inputs):
            raise self._misfit(inputs, real)
        if any(self._padding):
            inputs = F.pad(inputs, self._padding, mode=self._mode)
        # Unfolding repeats every element; samples are taken a few at a time to bound that.
        count = max(1, _UNFOLDED // max(1, inputs[0].numel() * math.prod(self._kernel)))
        for start in range(0, len(inputs), count):
            some = slice(start, start + count)
            patches = F.unfold(
                inputs[some], self._kernel, dilation=self._dilation, stride=self._stride
            )
            yield self._select(patches.transpose(1, 2), None if real is None else real[some])


def reader_of(path: str, module: nn.Module) -> TokenReader:
    """How the input of a module is read.

    Raises:
        UnsupportedError: if it is a convolution in groups.
    """
    return _Patches(path, module) if isinstance(module, nn.Conv2d) else _Rows(path)


@dataclass(frozen=True, slots=True)
class Use:
    """One module as the user of one weight.

    Attributes:
        weight: canonical name.
        index: of the module among the weight's owners.
        owner: the module.
    """

    weight: str
    index: int
    owner: Owner


def modules_using(
    model: nn.Module, weights: WeightMap
) -> Iterator[tuple[str, nn.Module, list[Use]]]:
    """Every module that uses weights, once: its path, itself, and what it uses.

    A call of a module that has two paths does not show which one was meant: the module counts as
    the first of its owners, or each call would count twice.
    """
    found: dict[nn.Module, tuple[str, dict[str, Use]]] = {}
    for name, weight in weights.items():
        for index, owner in enumerate(weight.owners):
            module = model.get_submodule(owner.module)
            _, uses = found.setdefault(module, (owner.module, {}))
            uses.setdefault(f"{name}.{owner.parameter}", Use(name, index, owner))
    for module, (path, uses) in found.items():
        yield path, module, list(uses.values())


@contextmanager
def hooked(model: nn.Module) -> Iterator[list[RemovableHandle]]:
    """The model in evaluation mode, with hooks.

    Yields:
        A list for the handles of the hooks. On leaving they are removed, and training flags (of
        every single module) are as they were.
    """
    hooks: list[RemovableHandle] = []
    with flags_kept(model), fast_path_off():
        try:
            model.eval()
            yield hooks
        finally:
            for handle in hooks:
                handle.remove()


def run_without_gradients(model: nn.Module, run: Callable[[], None]) -> None:
    """Runs parts of a model as if by its forward; the caller's random state is kept.

    Inference mode is left: its tensors have no version counter, which shows whether a tensor was
    changed.
    """
    with random_state_kept(device_of(model)), without_gradients(model):
        as_forward(model, run)
        at_rest(model)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """What `run_without_gradients` sets for one thread."""
    with torch.inference_mode(False), torch.no_grad(), callers_defaults(model):
        yield


def check_reached(adapter: Adapter, weights: WeightMap, reached: Collection[str]) -> None:
    """Raises `StatisticsError` if a weight is not among the canonical names `reached`."""
    if missed := [name for name in weights if name not in reached]:
        raise StatisticsError(
            f"no stream of adapter {adapter.name!r} ran {named(weights, missed)}; the "
            "adapter must run it or exclude it (with ModuleAdapter and TransformersAdapter: "
            "exclude=..., or batches that use the whole model)"
        )


def named(weights: WeightMap, missed: Sequence[str]) -> str:
    """The first of some weights, with its modules, and how many there are, all of them named."""
    owners = ", ".join(owner.module for owner in weights[missed[0]].owners)
    first = f"weight {missed[0]!r} at {owners}"
    if len(missed) == 1:
        return first
    layer = re.compile(r"\.\d+(?=\.|$)")
    kinds = dict.fromkeys(layer.sub(".*", weights[name].owners[0].module) for name in missed)
    return f"{first} ({len(missed)} weights in all: {', '.join(kinds)})"


def kinds_of(
    adapter: Adapter, stream: Stream, owner: Owner, inputs: torch.Tensor
) -> torch.Tensor | TokenKind:
    """The kinds of the tokens that enter a module, see `Kinds`; to be called while it runs.

    Where a stream says only which tokens are real, those of the space `vision` are images and all
    others text.

    Raises:
        UnsupportedError: if the stream says nothing of them.
    """
    if stream.kinds is not None:
        return stream.kinds(owner, inputs)
    kind = TokenKind.IMAGE if owner.tokens == "vision" else TokenKind.TEXT
    real = _declared(adapter, stream, owner)
    return kind if real is None else real.to(torch.uint8) * kind


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with first, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def real_of(
    adapter: Adapter, stream: Stream, owner: Owner, inputs: torch.Tensor
) -> torch.Tensor | None:
    """Which tokens of a module's input are real, bool; None: all.

    Of a stream with `kinds` the mask is a new tensor only where the kinds are.

    Raises:
        UnsupportedError: if the stream does not say.
    """
    if stream.kinds is None:
        return _declared(adapter, stream, owner)
    kinds = stream.kinds(owner, inputs)
    if isinstance(kinds, TokenKind):
        return None
    known = _MASKS.get(kinds)
    if known is None:
        known = _MASKS[kinds] = kinds != TokenKind.PADDING
    return known


_MASKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The mask of each tensor of kinds: what is measured is recognised by the identity of its mask."""


def _declared(adapter: Adapter, stream: Stream, owner: Owner) -> torch.Tensor | None:
    try:
        return stream.real[owner.tokens]
    except KeyError:
        raise UnsupportedError(
            f"adapter {adapter.name!r}: stream {stream.name!r} does not say which "
            f"tokens of {owner.tokens!r} are real, which {owner.module} reads (it says: "
            f"{', '.join(stream.real) or 'nothing'}); add {owner.tokens!r} to "
            "Stream.real, with None if all are"
        ) from None
