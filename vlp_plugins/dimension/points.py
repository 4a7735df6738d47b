"""Points of layers, one per sample: what they take, and how many layers fit into the budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from vlp_plugins.calibration.moments import Site
from vlp_plugins.calibration.outputs import Output
from vlp_plugins.dimension.neighbours import working_bytes
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import text_of


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
        """Takes memory for so many rows with blocks of such widths."""
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
        return self._values.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Of the points."""
        return self._values.dtype

    @property
    def values(self) -> torch.Tensor:
        """`[count, columns]`, the rows of the complete batches; a view."""
        return self._values[: self.count]

    def of_batch(self, place: int, widths: Sequence[int]) -> torch.Tensor:
        """The rows of a complete batch by its place among `batches`, with blocks that may be wider.

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
        """Moves to a larger tensor, with no fewer rows or columns; both exist for a moment."""
        old = self._values[: self.count + self._size]
        new = self._values.new_empty(rows, sum(widths))
        _spread(old, self.widths, widths, new[: len(old)])
        self._values, self.widths = new, tuple(widths)

    def write(
        self, call: int, tokens: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Writes the output of a call for the current batch.

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
        """Ends the batch of that index; calls that it lacked are zeros."""
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
    """Rows with wider blocks, padded with zeros; written into `out` if it is given."""
    new = rows.new_empty(len(rows), sum(wider)) if out is None else out
    old_starts = _starts(widths)
    for call, (start, width) in enumerate(zip(_starts(wider), wider, strict=True)):
        had = widths[call] if call < len(widths) else 0
        if had:
            new[:, start : start + had] = rows[:, old_starts[call] : old_starts[call] + had]
        new[:, start + had : start + width] = 0
    return new


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One use of a weight, as far as it is known.

    Attributes:
        widths: numbers per sample of every call of the module, for the longest sample so far.
        itemsize: bytes of a number.
    """

    site: Site
    module: str
    widths: tuple[int, ...]
    itemsize: int

    def __str__(self) -> str:
        site = self.site
        return f"{self.module} (weight {site.weight!r}, stream {site.stream!r})"

    @property
    def ambient(self) -> int:
        """Numbers in a point."""
        return sum(self.widths)

    def wider(self, widths: tuple[int, ...]) -> LayerUse:
        """With blocks at least that wide."""
        if len(widths) < len(self.widths):
            widths += (0,) * (len(self.widths) - len(widths))
        own = self.widths + (0,) * (len(widths) - len(self.widths))
        return replace(self, widths=tuple(map(max, own, widths)))


class Sites(dict[Site, LayerUse]):
    """The layers that have run, in the order of execution."""

    def see(self, output: Output, itemsize: int) -> LayerUse:
        """Notes an output; returns what is known of its layer then."""
        widths = (0,) * output.call + (output.width,)
        use = self.get(output.site) or LayerUse(output.site, output.module, (), itemsize)
        if len(use.widths) <= output.call or use.widths[output.call] < output.width:
            use = self[output.site] = use.wider(widths)
        return use

    def merge(self, others: Iterable[LayerUse]) -> None:
        """Adds the layers of another process."""
        for use in others:
            self[use.site] = self[use.site].wider(use.widths) if use.site in self else use

    def streams(self) -> list[str]:
        """Names of the streams, in their order."""
        return list(dict.fromkeys(site.stream for site in self))


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one use of a weight takes.

    Attributes:
        name: for messages.
        stream: in which it runs.
        held: its points, until its dimension is computed.
        work: in addition to all points, while that happens.
    """

    name: str
    stream: str
    held: int
    work: int


def fits(needs: Sequence[Need], budget: int) -> bool:
    """Whether these can be gathered in one pass."""
    work = max((need.work for need in needs), default=0)
    return sum(need.held for need in needs) + work <= budget


def pack(needs: Sequence[Need], budget: int) -> list[tuple[int, int]]:
    """The fewest passes, each over neighbours in the order of execution.

    Among those, every pass but the last ends as early as possible, or at the end of the stream that
    it has begun: streams after its last layer need not run, and what is gathered in a stream that
    runs anyway leaves room in the later passes.

    Returns:
        By pass its first index and the one after its last.

    Raises:
        UnsupportedError: if one does not fit by itself.
    """
    for need in needs:
        if not fits([need], budget):
            raise UnsupportedError(
                f"the points of {need.name} take {text_of(need.held)} and the search for "
                f"neighbours {text_of(need.work)}, but the memory budget is {text_of(budget)}; use "
                "fewer samples (limit, --batches), keep points in bfloat16 (dtype='bfloat16', "
                "--points-dtype; half of it), or give "
                f"memory_budget={need.held + need.work} (--memory-budget) or more"
            )
    passes: list[tuple[int, int]] = []
    start = 0
    for stop in _earliest_ends(needs, budget):
        while stop < len(needs) and needs[stop].stream == needs[stop - 1].stream:
            if not fits(needs[start : stop + 1], budget):
                break
            stop += 1
        passes.append((start, stop))
        start = stop
    return passes


def _earliest_ends(needs: Sequence[Need], budget: int) -> list[int]:
    """Index after the last of every pass, if each leaves as much as can be left to those after."""
    ends = []
    start = len(needs)
    while start:
        ends.append(start)
        start -= 1
        while start and fits(needs[start - 1 : ends[-1]], budget):
            start -= 1
    return ends[::-1]


_GUESS = 8
"""Batches of a process, if their number is unknown; memory grows where there are more."""


@dataclass(frozen=True)
class Room:
    """The budget of one process, and how many rows are expected.

    Attributes:
        budget: bytes for points and the search for neighbours.
        rows: samples of this process.
        samples: of all processes.
        scattered: whether the samples are divided among processes, so that the one that computes
            a dimension must receive all points of a layer.
        dtype: of the points; None: that of the outputs.
    """

    budget: int
    rows: int
    samples: int
    scattered: bool = False
    dtype: torch.dtype | None = None

    def need(self, use: LayerUse, rows: int | None = None) -> Need:
        """Bytes of one use of a weight, with memory for so many rows; None: `rows`."""
        rows = self.rows if rows is None else rows
        samples = max(self.samples, rows)
        work = working_bytes(samples, use.ambient)
        if self.scattered:
            work += bytes_of_points(samples, use.widths, use.itemsize)
        held = bytes_of_points(rows, use.widths, use.itemsize)
        return Need(str(use), use.site.stream, held, work)


def expected(
    sizes: tuple[int, ...], total: int | None, size: int, processes: int
) -> tuple[int, int]:
    """Samples of one process, the one that has most, and of all.

    Args:
        sizes: of all batches; empty if they were not read yet.
        total: number of batches at most; None if that is unknown.
        size: of the first batch.
        processes: that share the batches.
    """
    if sizes:
        return max(sum(sizes[rank::processes]) for rank in range(processes)), sum(sizes)
    if total is None:
        return _GUESS * size, _GUESS * size * processes
    return -(-total // processes) * size, total * size
