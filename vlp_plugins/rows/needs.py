"""What rows take, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from vlp_plugins.rows.columns import Columns
from vlp_plugins.rows.cutting import PART, cuts_of, least_width, shares_of
from vlp_plugins.runtime.distributed import all_reduce_min, rank_and_size
from vlp_plugins.runtime.memory import text_of, usable_bytes

Kept = Literal["ram", "disk", "passes"]

_WAYS = ("in memory", "on disk")
_STATE = 4 + 4 + 4 + 1
"""Bytes per weight of what solvers hold beside the rows: weights, values, scores, support."""
_GRADIENT = 4


@dataclass(frozen=True)
class RowPlan:
    """Where rows are kept, and what that costs. All bytes are of one process.

    Attributes:
        keep_in: in RAM (or the memory of `device`), in a file, or nowhere: in passes over the
            batches, one group of columns after the other.
        device: whose memory holds rows, or the group of columns in work.
        folder: of the file.
        edges: first column of every process, then p.
        cuts: by group and process, first column of every part, then the end of the last.
        ram_bytes: of rows and the parts in work.
        disk_bytes: of the file.
        state_bytes: of what is one number per weight: weights, values, scores, support; not part
            of the budget.
        passes: over the batches, in all sweeps.
        gradient_batches: forward and backward passes of this process, one batch each.
        lines: the same for a person.
    """

    keep_in: Kept
    device: torch.device
    folder: Path
    edges: tuple[int, ...]
    cuts: tuple[tuple[tuple[int, ...], ...], ...]
    ram_bytes: int
    disk_bytes: int
    state_bytes: int
    passes: int
    gradient_batches: int
    lines: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Number of groups of columns; 1 where all are kept."""
        return len(self.cuts)

    def because(self, refused: Sequence[Exception]) -> RowPlan:
        """The same plan, with the reasons that faster ways were not taken."""
        whys = [str(error).partition(";")[0] for error in refused]  # without the advice
        reasons = [f"not {way}: {why}" for way, why in zip(_WAYS, whys, strict=False)]
        return replace(self, lines=(self.lines[0], *reasons, *self.lines[1:]))


class Needs:
    """What rows take, wherever they are kept."""

    def __init__(
        self, columns: Columns, n: int, dtype: torch.dtype, sweeps: int, device: torch.device
    ) -> None:
        self.columns, self.n, self.sweeps, self.device = columns, n, sweeps, device
        self.processes = rank_and_size()[1]
        self.edges = shares_of(columns, self.processes)
        self.size = dtype.itemsize
        # A solver computes in float32: a copy of the part in work.
        self.extra = 4 if dtype.itemsize < 4 else 0
        self.block = n * least_width(columns)
        share = max(self.edges[i + 1] - self.edges[i] for i in range(self.processes))
        self.rows = n * share * self.size
        self.state = columns.p * _STATE

    def cuts(self, elements: int) -> tuple[tuple[int, ...], ...]:
        """The parts of every process, of about that many elements."""
        elements = min(PART, max(elements, self.block))
        return cuts_of(self.columns, self.n, self.edges, elements)

    def widest(self, cuts: tuple[tuple[int, ...], ...]) -> int:
        """Elements of the largest part of any process."""
        widths = [b - a for own in cuts for a, b in pairwise(own)]
        return self.n * max(widths)

    def usable(self, budget: int | None, device: torch.device) -> int:
        """The budget, or of a device no more than it has."""
        if budget is not None and device.type == "cpu":
            return budget
        free = all_reduce_min(usable_bytes(device, self.state + _GRADIENT * self.columns.p))
        return free if budget is None else min(budget, free)

    def plan(
        self,
        keep_in: Kept,
        device: torch.device,
        folder: Path,
        cuts: tuple[tuple[tuple[int, ...], ...], ...],
        ram: int,
        disk: int,
        line: str,
    ) -> RowPlan:
        passes = self.sweeps * len(cuts) if len(cuts) > 1 else 1
        each = -(-self.n // self.processes)
        held = f"beside them {text_of(self.state)} of weights, values, scores and support"
        return RowPlan(
            keep_in, device, folder, self.edges, cuts, ram, disk, self.state, passes,
            passes * each, (line, held),
        )  # fmt: skip
