"""From the gradients of a batch to the entries of its row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from vlp_plugins.rows.columns import Columns
from vlp_plugins.runtime.sharding import whole

Gradients = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Entries:
    """Which gradient goes to which column.

    Attributes:
        columns: where every weight lies.
        device: of the gradients.
        alive: bool masks by canonical name: the gradients of what was removed are 0. None: no mask.
    """

    columns: Columns
    device: torch.device
    alive: Mapping[str, torch.Tensor] | None = None

    def pieces(
        self, gradients: Gradients, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Entries `start` to `stop` of a row, weight by weight.

        Args:
            gradients: by canonical name, float32; absent where the loss does not reach a weight.
            start: first column.
            stop: the column after the last.

        Yields:
            A column, and the entries from there on, float32.
        """
        for name, first, last, column in self.columns.pieces(start, stop):
            gradient = gradients.get(name)
            if gradient is None:
                yield column, torch.zeros(last - first, dtype=torch.float32, device=self.device)
                continue
            values = gradient.reshape(-1)[first:last]
            if self.alive is not None:
                values = values * self.alive[name].reshape(-1)[first:last].to(values.device)
            yield column, values

    def gathered(
        self, gradients: Gradients, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same of gradients that are sharded: a collective.

        All processes make one gradient after the other whole, and each takes what it holds.
        """
        for name, bounds in zip(self.columns.names, pairwise(self.columns.starts), strict=True):
            sharded = gradients.get(name)
            gradient = {} if sharded is None else {name: whole(sharded)}
            first, last = max(start, bounds[0]), min(stop, bounds[1])
            if first < last:
                yield from self.pieces(gradient, first, last)

    def together(self, gradients: Gradients, start: int, stop: int) -> torch.Tensor:
        """The same in one tensor `[stop - start]`."""
        found = torch.empty(stop - start, dtype=torch.float32, device=self.device)
        for column, values in self.pieces(gradients, start, stop):
            found[column - start : column - start + len(values)] = values
        return found
