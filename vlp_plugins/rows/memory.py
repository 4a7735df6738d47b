"""Rows in the memory of this machine or of a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlp_plugins.rows.layout import Layout


class MemoryStore:
    """Parts in one tensor.

    Attributes:
        layout: where a part lies.
    """

    def __init__(self, layout: Layout, flat: torch.Tensor) -> None:
        """Takes what it needs of a tensor.

        Args:
            layout: where a part lies.
            flat: `[m]` of at least `layout.elements`; what is in it does not matter.
        """
        self.layout = layout
        self._flat = flat

    def write(self, row: int, start: int, values: torch.Tensor) -> None:
        """Writes entries of a row, `values` `[m]` from column `start` on."""
        for offset, piece in self.layout.places(row, start, values):
            self._flat[offset : offset + len(piece)].copy_(piece)

    def parts(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first `n` rows: first column of a part, and the part `[n, width]`."""
        for start, width, offset in self.layout.parts():
            yield start, self._flat[offset : offset + n * width].view(n, width)
