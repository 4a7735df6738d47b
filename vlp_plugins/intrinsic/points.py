"""The points of one layer: one per sample, what it lacks filled up with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


class Points:
    """A row per sample, and in it a block of columns per call of the module.

    A module that is called several times in a stream gives one point all the same, its calls side
    by side. Blocks are as wide as the longest sample so far; a shorter one ends in zeros.

    Attributes:
        widths: of the blocks.
        count: rows of the batches that are complete.
        batches: index and size of each of them.
    """

    def __init__(
        self, widths: Sequence[int], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes its memory.

        Args:
            widths: of the blocks, as far as they are known.
            rows: that are expected.
            dtype: of the points.
            device: where they are kept.
        """
        self.widths = tuple(widths)
        self.count = 0
        self.batches: list[tuple[int, int]] = []
        self._values = torch.empty(rows, sum(widths), dtype=dtype, device=device)
        self._written: dict[int, int] = {}
        self._size = 0

    @property
    def rows(self) -> int:
        """Rows that there is memory for."""
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return bytes_of_points(self.rows, self.widths, self._values.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """Of the points."""
        return self._values.dtype

    @property
    def values(self) -> torch.Tensor:
        """`[count, columns]`, the rows of the complete batches; a view."""
        return self._values[: self.count]

    def of_batch(self, place: int, widths: Sequence[int]) -> torch.Tensor:
        """The rows of a complete batch, with blocks that may be wider.

        Args:
            place: of the batch among `batches`.
            widths: of the blocks, at least as many and as wide as here.

        Returns:
            `[size, columns]`, contiguous; a view if the blocks are not wider.
        """
        first = sum(size for _, size in self.batches[:place])
        rows = self._values[first : first + self.batches[place][1]]
        return rows if tuple(widths) == self.widths else _spread(rows, self.widths, widths)

    def fits(self, call: int, size: int, width: int) -> bool:
        """Whether there is room for `size` rows more, `width` columns in the block of a call."""
        wide = call < len(self.widths) and width <= self.widths[call]
        return wide and self.count + size <= self.rows

    def grow(self, widths: Sequence[int], rows: int) -> None:
        """Moves to a larger tensor; both exist for a moment.

        Args:
            widths: of the blocks; none smaller than before.
            rows: not fewer than before.
        """
        old = self._values[: self.count + self._size]
        new = self._values.new_empty(rows, sum(widths))
        _spread(old, self.widths, widths, new[: len(old)])
        self._values, self.widths = new, tuple(widths)

    def write(
        self, call: int, tokens: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Writes what a call gave out for the batch in work.

        Args:
            call: index of the call in its stream.
            tokens: `[batch, T, features]`; there must be room, see `fits`.
            padding: bool `[batch, T]`, where zeros are written instead; None: nowhere.

        Returns:
            What was written, a view `[batch, T * features]`.
        """
        size, length, features = tokens.shape
        width = length * features
        start = _starts(self.widths)[call]
        rows = self._values[self.count : self.count + size]
        block = rows[:, start : start + width]
        place = block.view(size, length, features)
        place.copy_(tokens)
        if padding is not None:
            place.masked_fill_(padding.unsqueeze(-1), 0)
        rows[:, start + width : start + self.widths[call]] = 0
        self._written[call] = width
        self._size = size
        return block

    def finish(self, batch: int) -> None:
        """Ends a batch; calls that it lacked are zeros.

        Args:
            batch: its index.
        """
        if not self._size:
            return
        rows = self._values[self.count : self.count + self._size]
        for call, start in enumerate(_starts(self.widths)):
            if call not in self._written:
                rows[:, start : start + self.widths[call]] = 0
        self.count += self._size
        self.batches.append((batch, self._size))
        self._written.clear()
        self._size = 0


def bytes_of_points(rows: int, widths: Sequence[int], itemsize: int) -> int:
    """Bytes of so many rows with blocks of such widths."""
    return rows * sum(widths) * itemsize


def _starts(widths: Sequence[int]) -> list[int]:
    """First column of every block."""
    return list(accumulate(widths, initial=0))[:-1]


def _spread(
    rows: torch.Tensor,
    widths: Sequence[int],
    wider: Sequence[int],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows with wider blocks, zeros behind what they had; written into `out` if it is given."""
    new = rows.new_empty(len(rows), sum(wider)) if out is None else out
    old_starts = _starts(widths)
    for call, (start, width) in enumerate(zip(_starts(wider), wider, strict=True)):
        had = widths[call] if call < len(widths) else 0
        if had:
            new[:, start : start + had] = rows[:, old_starts[call] : old_starts[call] + had]
        new[:, start + had : start + width] = 0
    return new
