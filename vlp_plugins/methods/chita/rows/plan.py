"""Where rows are kept: decided and explained before the first batch runs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import torch

from vlp_plugins.methods.chita.rows.stores import ELSEWHERE
from vlp_plugins.methods.chita.solver.problem import part_bounds
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.distributed import all_reduce_min, rank_and_size
from vlp_plugins.runtime.errors import OutputError, UnsupportedError
from vlp_plugins.runtime.memory import (
    local_processes,
    spill_folder,
    text_of,
    usable_bytes,
    usable_disk,
)


@dataclass(frozen=True)
class Columns:
    """The weights of a model one after the other, each flattened row by row.

    Attributes:
        names: canonical names, in the order of the adapter.
        shapes: of the weights.
        starts: first column of every weight, then p.
        bounds: boundaries of blocks that never cross a weight, the first 0, the last p; equal
            neighbours are empty blocks. None for no blocks.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    bounds: tuple[int, ...] | None = None

    @classmethod
    def of(cls, weights: WeightMap, block_size: int | None) -> Columns:
        """The columns of all weights.

        Args:
            weights: of the model.
            block_size: columns of a block, about: see `block_bounds`; None for no blocks.
        """
        starts = tuple(accumulate((weight.numel for weight in weights.values()), initial=0))
        bounds = None if block_size is None else block_bounds(starts, block_size)
        return cls(tuple(weights), tuple(w.shape for w in weights.values()), starts, bounds)

    @property
    def p(self) -> int:
        """Number of columns."""
        return self.starts[-1]

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One vector of all weights; nothing else of its size is made.

        Args:
            tensors: by canonical name, of the weights' shapes, all on one device.

        Returns:
            `[p]`, float32, or bool if the first tensor is.
        """
        first = tensors[self.names[0]]
        dtype = torch.bool if first.dtype == torch.bool else torch.float32
        joined = torch.empty(self.p, dtype=dtype, device=first.device)
        for name, view in self.split(joined).items():
            view.copy_(tensors[name])
        return joined

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a vector `[p]` by canonical name, in the weights' shapes."""
        ranges = zip(self.names, self.shapes, pairwise(self.starts), strict=True)
        return {name: vector[start:stop].view(shape) for name, shape, (start, stop) in ranges}

    def only(self, names: Collection[str]) -> Columns:
        """The columns of some weights, pushed together, with their blocks."""
        chosen = [index for index, name in enumerate(self.names) if name in names]
        starts, bounds = [0], [0]
        for index in chosen:
            first, last = self.starts[index : index + 2]
            shift = starts[-1] - first
            starts.append(last + shift)
            if self.bounds is not None:
                own = slice(bisect_right(self.bounds, first), bisect_right(self.bounds, last))
                bounds += [bound + shift for bound in self.bounds[own]]
        return Columns(
            tuple(self.names[index] for index in chosen),
            tuple(self.shapes[index] for index in chosen),
            tuple(starts),
            None if self.bounds is None else tuple(bounds),
        )

    def ranges(self, names: Collection[str]) -> list[tuple[int, int]]:
        """First column of weights and the one after their last; neighbours are one range."""
        merged: list[tuple[int, int]] = []
        for name, (start, stop) in zip(self.names, pairwise(self.starts), strict=True):
            if name in names and merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            elif name in names:
                merged.append((start, stop))
        return merged

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """The weights that columns `start` to `stop` are of.

        Yields:
            The name of a weight, of its elements the first and the one after the last that lie in
            these columns, and the column of the first.
        """
        index = bisect_right(self.starts, start) - 1
        while index < len(self.names) and self.starts[index] < stop:
            first, last = self.starts[index : index + 2]
            if first < last:
                here = max(start, first)
                yield self.names[index], here - first, min(stop, last) - first, here
            index += 1

    @property
    def widest(self) -> int:
        """Columns of the largest block, which are read together; 1 without blocks."""
        if self.bounds is None:
            return 1
        return max(stop - start for start, stop in pairwise(self.bounds))


def block_bounds(starts: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """The blocks of the published code.

    A weight of fewer than `block_size` elements is one block. One of n elements is cut into
    q = int(n / block_size) blocks of int(n / q), the last with the rest. The published list names
    the boundary between a weight that is cut and the one before twice, which makes an empty block.

    Args:
        starts: first column of every weight, then p.
        block_size: columns of a block, 1 at least.
    """
    bounds = [0]
    for start, stop in pairwise(starts):
        if count := (stop - start) // block_size:
            width = (stop - start) // count
            bounds += range(start, start + count * width, width)
        bounds.append(stop)
    return tuple(bounds)


PART = 1 << 26
"""Most elements of a part, unless a block is larger: 256 MiB of float32.

A part should hold enough blocks for many cores."""

_LEAST_WIDTH = 1 << 12

PartBounds = tuple[int, ...]


def shares_of(columns: Columns, processes: int) -> PartBounds:
    """First column of every process, then p: about equal shares of whole blocks."""
    p, bounds = columns.p, columns.bounds
    ideal = [p * i // processes for i in range(processes + 1)]
    if bounds is None:
        return tuple(ideal)
    edges = [0]
    for wanted in ideal[1:-1]:
        index = bisect_left(bounds, wanted)
        near = min(bounds[max(index - 1, 0) : index + 1], key=lambda bound: abs(bound - wanted))
        edges.append(max(edges[-1], near))
    return (*edges, p)


def part_bounds_of(
    columns: Columns, n: int, edges: PartBounds, elements: int
) -> tuple[PartBounds, ...]:
    """The parts of every process: first column of each, then the end of the last.

    Args:
        columns: of all processes.
        n: number of rows.
        edges: see `shares_of`.
        elements: most elements of a part that is more than one block.
    """
    found = []
    for start, stop in pairwise(edges):
        inner = None
        if columns.bounds is not None:
            first, last = bisect_left(columns.bounds, start), bisect_left(columns.bounds, stop)
            inner = [bound - start for bound in columns.bounds[first : last + 1]]
        cuts = part_bounds(n, stop - start, inner, elements) if start < stop else [0]
        found.append(tuple(start + cut for cut in dict.fromkeys(cuts)))
    return tuple(found)


def column_groups(cuts: tuple[PartBounds, ...], columns: int) -> tuple[tuple[PartBounds, ...], ...]:
    """Groups of neighbouring parts, by group and process.

    Args:
        cuts: the parts of every process.
        columns: the most of a group and process, at least those of the widest part.

    Returns:
        As many groups for every process; some may be empty (a single cut).
    """
    by_process = [_grouped(own, columns) for own in cuts]
    count = max(map(len, by_process))
    for groups in by_process:
        groups += [groups[-1][-1:]] * (count - len(groups))
    return tuple(zip(*by_process, strict=True))


def _grouped(cuts: PartBounds, columns: int) -> list[PartBounds]:
    groups = [[cuts[0]]]
    for start, stop in pairwise(cuts):
        if stop - groups[-1][0] > columns and len(groups[-1]) > 1:
            groups.append([start])
        groups[-1].append(stop)
    return [tuple(group) for group in groups]


KEEP_IN = ("auto", "ram", "disk", "passes")
Kept = Literal["ram", "disk", "passes"]

_CPU = torch.device("cpu")
_PLACES = ("in memory", "on disk")
_STATE = 4 + 4 + 4 + 1
"""Bytes per weight of what solvers hold next to the rows: weights, values, scores, support."""
_GRADIENT = 4


@dataclass(frozen=True)
class RowNeeds:
    """What rows must hold and may take, from which `plan` follows.

    Attributes:
        columns: of the rows.
        n: number of rows, one batch each.
        budget: bytes of memory for rows and the parts in work; None: three quarters of what is
            free, less what else will be needed.
        folder: where a file may go; None: `TMPDIR` or /var/tmp.
        dtype: float32, or bfloat16 for half of the memory and an error that is logged.
        sweeps: how often all columns will be read.
        keep_in: `ram`, `disk`, `passes` (nowhere: the batches run again for every group of columns
            and sweep), or `auto`: the first of them that fits.
        device: of the model; rows that fit are kept in its memory.
        solutions: bytes of solutions that would be held in order to take gradients once; without a
            budget they get up to half of the memory.
    """

    columns: Columns
    n: int
    budget: int | None
    folder: Path | None
    dtype: torch.dtype
    sweeps: int = 1
    keep_in: str = "auto"
    device: torch.device = _CPU
    solutions: int = 0

    def plan(self) -> RowPlan:
        """The fastest way to keep rows within the budget: in memory, on disk, or in passes.

        Raises:
            UnsupportedError: if the budget is too small, with the least that will do.
            OutputError: if rows must go to a disk that has no room for them.
        """
        ways = {"ram": self._in_memory, "disk": self._on_disk, "passes": self._in_passes}
        refused: list[Exception] = []
        for way, plan in ways.items():
            if self.keep_in not in (way, "auto"):
                continue
            try:
                found = plan()
            except (UnsupportedError, OutputError) as error:
                refused.append(error)
                continue
            whys = [str(error).partition(";")[0] for error in refused]  # without the advice
            reasons = [f"not {place}: {why}" for place, why in zip(_PLACES, whys, strict=False)]
            return replace(found, lines=(found.lines[0], *reasons, *found.lines[1:]))
        raise refused[-1]

    @property
    def place(self) -> Path:
        """The folder of the file."""
        return spill_folder(self.folder)

    @cached_property
    def edges(self) -> PartBounds:
        """First column of every process, then p."""
        return shares_of(self.columns, rank_and_size()[1])

    @cached_property
    def bytes(self) -> int:
        """Of all rows, in the process that holds most columns."""
        return self.n * max(b - a for a, b in pairwise(self.edges)) * self.dtype.itemsize

    @property
    def copy(self) -> int:
        """Bytes per element of the part in work as float32, in which solvers compute."""
        return 4 if self.dtype.itemsize < 4 else 0

    @property
    def block(self) -> int:
        """Elements of the narrowest part that must be possible: the largest block."""
        blocked = self.columns.bounds is not None
        return self.n * (self.columns.widest if blocked else min(self.columns.p, _LEAST_WIDTH))

    def _in_memory(self) -> RowPlan:
        least = self.bytes + self.copy * self.block
        for device in dict.fromkeys((self.device, _CPU)):
            usable = self._usable(device)
            if least > usable:
                continue
            cuts = self._cuts((usable - self.bytes) // self.copy if self.copy else PART)
            ram = self.bytes + self.copy * self._widest(cuts)
            where = "RAM" if device.type == "cpu" else f"the memory of {device}"
            line = f"the rows stay in {where}: {text_of(ram)} of {text_of(usable)}"
            return self._plan("ram", device, (cuts,), ram, line)
        raise UnsupportedError(
            f"{self.n} rows of {self.columns.p:,} columns need {text_of(least)} of memory, but "
            f"{self._limit(usable)}; give memory_budget={_amount(least)!r} or more, take fewer "
            "rows, or let them go to disk (keep_in='auto')"
        )

    def _on_disk(self) -> RowPlan:
        each = 2 * self.dtype.itemsize + self.copy  # while one part is in work the next is read
        usable = self._usable(_CPU)
        self._check_block(each, usable)
        free = all_reduce_min(usable_disk(self.place))
        if self.bytes > free:
            raise OutputError(
                f"{self.n} rows of {self.columns.p:,} columns need {text_of(self.bytes)} of disk, "
                f"but {self.place} has room for {text_of(free)}; {ELSEWHERE}"
            )
        cuts = self._cuts(usable // (8 * (self.dtype.itemsize + self.copy)))
        ram = each * self._widest(cuts)
        line = (
            f"the rows go to disk: {text_of(self.bytes * local_processes())} in {self.place}, "
            f"read once per sweep, {text_of(ram)} at a time"
        )
        return self._plan("disk", _CPU, (cuts,), ram, line)

    def _in_passes(self) -> RowPlan:
        size = self.dtype.itemsize
        usable = self._usable(self.device)
        if self.budget is None and self.device.type == "cpu":
            usable -= min(self.solutions, usable // 2)
        self._check_block(size + self.copy, usable)
        cuts = self._cuts(usable // (8 * size))
        copy = self.copy * self._widest(cuts)
        groups = column_groups(cuts, (usable - copy) // (self.n * size))
        largest = max(own[-1] - own[0] for group in groups for own in group)
        ram = self.n * size * largest + copy
        line = f"the rows are one group of columns that stays in memory: {text_of(ram)}"
        if len(groups) > 1:
            line = (
                f"the rows are kept nowhere: {len(groups)} groups of columns one after the other "
                f"in {text_of(ram)}, so every sweep runs all {self.n} batches again, "
                f"{len(groups)} times"
            )
        return self._plan("passes", self.device, groups, ram, line)

    def _plan(
        self,
        keep_in: Kept,
        device: torch.device,
        cuts: tuple[tuple[PartBounds, ...], ...],
        ram: int,
        line: str,
    ) -> RowPlan:
        state = text_of(self.columns.p * _STATE)
        more = f"next to them {state} of weights, values, scores and support"
        return RowPlan(self, keep_in, device, cuts, ram, (line, more))

    def _cuts(self, elements: int) -> tuple[PartBounds, ...]:
        """The parts of every process, of about that many elements."""
        elements = min(PART, max(elements, self.block))
        return part_bounds_of(self.columns, self.n, self.edges, elements)

    def _widest(self, cuts: tuple[PartBounds, ...]) -> int:
        """Elements of the largest part of any process."""
        return self.n * max(b - a for own in cuts for a, b in pairwise(own))

    def _usable(self, device: torch.device) -> int:
        """The budget, or of a device no more than it has."""
        if self.budget is not None and device.type == "cpu":
            return self.budget
        free = all_reduce_min(usable_bytes(device, (_STATE + _GRADIENT) * self.columns.p))
        return free if self.budget is None else min(self.budget, free)

    def _check_block(self, each: int, usable: int) -> None:
        least = each * self.block
        if usable < least:
            raise UnsupportedError(
                f"{self.n} rows of the largest block ({self.block // self.n:,} columns) take "
                f"{text_of(least)}, but {self._limit(usable)}; give "
                f"memory_budget={_amount(least)!r} or more, take fewer rows or smaller blocks"
            )

    def _limit(self, usable: int) -> str:
        if self.budget is None:
            return f"only {text_of(usable)} of what is free may be used"
        return f"the budget is {text_of(self.budget)}"


@dataclass(frozen=True)
class RowPlan:
    """Where rows are kept, and what that costs. All bytes are of one process.

    Attributes:
        needs: what it is for.
        keep_in: in RAM (or the memory of `device`), in a file, or nowhere: in passes over the
            batches, one group of columns after the other.
        device: whose memory holds rows, or the group of columns in work.
        cuts: by group and process, first column of every part, then the end of the last.
        ram_bytes: of rows and the parts in work.
        lines: the same in words.
    """

    needs: RowNeeds
    keep_in: Kept
    device: torch.device
    cuts: tuple[tuple[PartBounds, ...], ...]
    ram_bytes: int
    lines: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Number of groups of columns; 1 where all are kept."""
        return len(self.cuts)

    @property
    def disk_bytes(self) -> int:
        """Of the file."""
        return self.needs.bytes if self.keep_in == "disk" else 0

    @property
    def passes(self) -> int:
        """Over the batches, in all sweeps."""
        return self.needs.sweeps * self.groups if self.groups > 1 else 1

    @property
    def gradient_batches(self) -> int:
        """Forward and backward passes of this process, one batch each."""
        return self.passes * -(-self.needs.n // rank_and_size()[1])


def _amount(least: int) -> str:
    """An amount that is at least that many bytes, as people write it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if least >= size:
            tenths = -(-least * 10 // size)
            return f"{tenths / 10:g}{unit}"
    return f"{least}B"
