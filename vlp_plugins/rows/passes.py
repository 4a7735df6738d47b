"""Rows that are kept nowhere: every sweep runs the batches again, for some columns at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vlp_plugins.rows.filling import Filler
from vlp_plugins.rows.kept import GradientRows, released
from vlp_plugins.rows.layout import Layout
from vlp_plugins.rows.memory import MemoryStore
from vlp_plugins.runtime.distributed import rank_and_size


class PassRows(GradientRows):
    """One group of columns is in memory; the next takes its place.

    The loss starts from the same state in every pass (queues, momentum copies, random numbers), so
    a second sweep yields what the first did.
    """

    def __init__(
        self,
        filler: Filler,
        groups: Sequence[Sequence[tuple[int, ...]]],
        edges: Sequence[int],
        flat: torch.Tensor,
    ) -> None:
        """Gathers the first group.

        Args:
            filler: runs batches.
            groups: by group and process, the cuts of the parts.
            edges: first column of every process, then p.
            flat: memory for the largest group.

        Raises:
            VlpError: see `Filler.run`.
        """
        self._filler, self._groups = filler, groups
        self._flat: torch.Tensor | None = flat
        self._held: int | None = None
        self._met = 0
        # Which batches are left out must be known before the first column is used.
        self._gather(0, all_weights=filler.probe.skip_nonfinite)
        super().__init__(filler.rows, edges, self.rounding)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.sweeps += 1
        for index in range(len(self._groups)):
            if self._held != index:
                self._gather(index)
            yield from self._store(index).parts(self.n)

    def release(self) -> None:
        self._flat = None

    def _gather(self, index: int, *, all_weights: bool = False) -> None:
        """Runs the batches for one group of columns."""
        self._held = None  # in case it ends early
        ranges = [(cuts[0], cuts[-1]) for cuts in self._groups[index]]
        names = {name for own in ranges for name, *_ in self._filler.entries.columns.pieces(*own)}
        self._filler.run(self._store(index), ranges, None if all_weights else names)
        self._held = index
        if index >= self._met:
            self._met = index + 1
            self.rounding = self._filler.rounding.relative(self._filler.entries.device)

    def _store(self, index: int) -> MemoryStore:
        if self._flat is None:
            raise released()
        layout = Layout(self._filler.n, self._groups[index][rank_and_size()[0]])
        return MemoryStore(layout, self._flat)
