"""The real tokens that enter a layer, as rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from vlp_plugins.runtime.errors import BatchError, UnsupportedError

# Elements of an unfolded convolution input that exist at a time: 64 MiB of float32.
_UNFOLDED = 1 << 24


class TokenReader(ABC):
    """Turns the input of one module into `[tokens, in_features]`.

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
            real = real.to(tokens.device)
            if not bool(real.all()):
                return tokens[real]
        return tokens.reshape(-1, tokens.shape[-1])

    def _misfit(self, tokens: torch.Tensor, real: torch.Tensor) -> BatchError:
        return BatchError(
            f"the input of {self._path} is {list(tokens.shape)}, but the mask of its tokens is "
            f"{list(real.shape)}; if the layer sees other tokens than those, the adapter must give "
            "it a token space of its own: with ModuleAdapter, tokens={regular expression: None}"
        )


class _Rows(TokenReader):
    """The last dimension holds the features, as `nn.Linear` reads them.

    One vector per sample (a pooler's input) has no tokens to leave out: told by the rank, which
    the adapter's mask of the samples' tokens shows to be missing a dimension.
    """

    def read(self, inputs: torch.Tensor, real: torch.Tensor | None) -> Iterator[torch.Tensor]:
        pooled = real is not None and inputs.ndim == 2 == real.ndim and len(inputs) == len(real)
        yield self._select(inputs, None if pooled else real)


class _Patches(TokenReader):
    """Every position of a convolution is a token; its features are the patch under the kernel."""

    def __init__(self, path: str, module: nn.Conv2d) -> None:
        super().__init__(path)
        if module.groups != 1:
            raise UnsupportedError(
                f"{path} is a convolution in {module.groups} groups, whose inputs cannot be told "
                "apart by output; exclude it (ModuleAdapter(exclude=...))"
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
