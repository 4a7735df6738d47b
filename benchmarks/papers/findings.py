"""What the cells of a table say together: figures over seeds, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.papers.cell import Cell, Origin
from benchmarks.papers.measures import FAILED_BELOW, Content, Measure, converged
from benchmarks.papers.running import unique
from benchmarks.papers.tuning import Tuning
from benchmarks.papers.ways import Way

DENSE = "dense"
"""The name of no pruning."""


@dataclass(frozen=True)
class Entry:
    """A figure of a table.

    Attributes:
        asked: cells that it is made of, one per seed; 0: the table has none here.
        there: of them, those that have been run.
        by_seed: the figure; without the seeds whose file lacks it.
        failed: the model has not converged.
    """

    asked: int = 0
    there: int = 0
    by_seed: Mapping[int, float] = field(default_factory=dict)
    failed: bool = False

    @property
    def mean(self) -> float | None:
        """Over seeds; None if there is no figure that means something."""
        return None if self.failed or not self.by_seed else fmean(self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def text(self) -> str:
        """As tables show it: `-` if the cells are missing, nothing if the table has none."""
        if not self.asked:
            return ""
        if not self.there:
            return "-"
        if self.failed:
            return "ERR"
        if self.mean is None:
            return "absent"
        spread = "" if self.spread is None else f"±{self.spread:.1f}"
        some = f" ({self.there}/{self.asked})" if self.there < self.asked else ""
        return f"{self.mean:.1f}{spread}{some}"


class Found:
    """The cells of a table and what their files say.

    Attributes:
        cells: each once, in the table's order.
        folder: of the cells' files.
        contents: by name of the cell, of those that have been run.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path) -> None:
        """Reads the files.

        Raises:
            OutputError: if a file is of a cell with other settings.
            ValueError: if cells are measured on different splits, which no mean should mix.
        """
        if len(splits := {cell.split for cell in cells}) > 1:
            raise ValueError(f"a table shows one split, not {', '.join(sorted(splits))}")
        self.cells, self.folder = unique(cells), folder
        read = {cell.name: cell.content(folder) for cell in self.cells}
        self.contents = {name: content for name, content in read.items() if content is not None}

    @property
    def missing(self) -> list[Cell]:
        """Those that have not been run."""
        return [cell for cell in self.cells if cell.name not in self.contents]

    @property
    def split(self) -> str:
        """What is measured on."""
        return self.cells[0].split

    @property
    def origins(self) -> dict[str, Origin]:
        """Of models that are not those of this repository, by family."""
        return {cell.model: cell.origin for cell in self.cells if cell.origin is not None}

    @property
    def models(self) -> list[str]:
        """In the table's order."""
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def tasks(self) -> list[str]:
        """In the table's order."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return sorted({cell.seed for cell in self.cells})

    @property
    def sparsities(self) -> list[float]:
        """Of pruned models, from low to high."""
        return sorted({cell.sparsity for cell in self.cells if cell.way is not None})

    @property
    def ways(self) -> dict[str, Way]:
        """By name, in the table's order, without the dense one."""
        return {cell.way.name: cell.way for cell in self.cells if cell.way is not None}

    def tuning(self, model: str, task: str) -> Tuning | None:
        """How a model is fine-tuned on a task and measured; None if the table has no such cell."""
        found = (cell.tuning for cell in self.cells if (cell.model, cell.task) == (model, task))
        return next(found, None)

    def queries(self, model: str) -> int:
        """Images that retrieval is measured with; 0 if nobody says."""
        tuning = self.tuning(model, "retrieval")
        return tuning.measured if tuning else 0

    def at(self, model: str, sparsity: float) -> list[str]:
        """Names of the ways that a model is pruned by to a sparsity, in the table's order."""
        some = [cell for cell in self.cells if (cell.model, cell.sparsity) == (model, sparsity)]
        return list(dict.fromkeys(way_of(cell) for cell in some))

    def of(self, model: str, task: str, way: str, sparsity: float) -> dict[int, Content]:
        """What the files of a figure say, by seed."""
        return {
            cell.seed: self.contents[cell.name]
            for cell in self._cells(model, task, way, sparsity)
            if cell.name in self.contents
        }

    def entry(self, measure: Measure, model: str, way: str, sparsity: float) -> Entry:
        """A figure of a table."""
        contents = self.of(model, measure.task, way, sparsity)
        values = {seed: measure.of(content) for seed, content in contents.items()}
        failed = bool(contents) and fmean(map(converged, contents.values())) < FAILED_BELOW
        return Entry(
            asked=len(self._cells(model, measure.task, way, sparsity)),
            there=len(contents),
            by_seed={seed: value for seed, value in values.items() if value is not None},
            failed=failed,
        )

    def _cells(self, model: str, task: str, way: str, sparsity: float) -> list[Cell]:
        wanted = (model, task, way, sparsity)
        return [
            cell
            for cell in self.cells
            if (cell.model, cell.task, way_of(cell), cell.sparsity) == wanted
        ]


def way_of(cell: Cell) -> str:
    """The name of how a cell is pruned."""
    return DENSE if cell.way is None else cell.way.name
