"""Rows that are gathered once and kept: in memory or in a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from vlp_plugins.rows import processes
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.solvers.rows import Rows


class Store(Protocol):
    """Room for the rows of some columns."""

    def write(self, row: int, start: int, values: torch.Tensor) -> None:
        """Writes entries of a row, `values` `[m]` from column `start` on."""

    def parts(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first `n` rows: first column of a part, and the part `[n, width]`."""


class GradientRows(Rows):
    """Rows of a model; their columns are shared out among the processes, if there are several.

    Attributes:
        rounding: relative error of the rows by rounding them to their dtype, in the Frobenius norm;
            0 for float32.
    """

    def __init__(self, n: int, edges: Sequence[int], rounding: float) -> None:
        """Keeps the numbers.

        Args:
            n: number of rows.
            edges: first column of every process, then p.
            rounding: see the attribute.
        """
        self.n, self.p = n, edges[-1]
        self.rounding = rounding
        self._edges = edges

    @abstractmethod
    def release(self) -> None:
        """Gives the memory back; there are no parts any more."""

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return processes.add_up(tensor)

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        return processes.fill(vector, self._edges)


class KeptRows(GradientRows):
    """Rows in a store; their parts are read to the device of the solver."""

    def __init__(
        self, store: Store, n: int, edges: Sequence[int], device: torch.device, rounding: float
    ) -> None:
        super().__init__(n, edges, rounding)
        self._store: Store | None = store
        self._device = device

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        if self._store is None:
            raise released()
        self.sweeps += 1
        for start, part in self._store.parts(self.n):
            yield start, part.to(self._device)

    def release(self) -> None:
        self._store = None


def released() -> UnsupportedError:
    """For rows that are used too late."""
    return UnsupportedError("these gradient rows are gone: use them inside `with gradient_rows`")
