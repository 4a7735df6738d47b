"""The tables by name, and the cells that each is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.tables.cell import Cell
from benchmarks.tables.ways import ABLATION, MORE, PAPER, SIZED, WAYS, WITH_ID, Way

SPARSITIES = (0.63, 0.75, 0.9)
FAMILIES = ("blip", "xvlm")
TASKS = ("retrieval", "captioning", "vqa")


def grid(
    ways: Sequence[Way | None],
    seed: int,
    *,
    models: Sequence[str] = FAMILIES,
    tasks: Sequence[str] = TASKS,
    sparsities: Sequence[float] = SPARSITIES,
    split: str = "test",
) -> list[Cell]:
    """Every way on every task, a task at a time; a dense model once."""
    return [
        Cell(model, task, way, sparsity, seed, split)
        for task in tasks
        for way in ways
        for sparsity in (sparsities if way else (0.0,))
        for model in models
    ]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: on the command line.
        title: one line.
        cells: those of a seed, in the order in which they are run.
    """

    name: str
    title: str
    cells: Callable[[int], list[Cell]]


def _main(seed: int) -> list[Cell]:
    return [*grid((None, *PAPER), seed), *grid(MORE, seed)]


def _named(*names: str) -> list[Way | None]:
    return [None, *(WAYS[name] for name in names)]


def _table4(seed: int) -> list[Cell]:
    ways = _named("l2", "lamp", "tamt", "multiflow")
    return grid(ways, seed, models=["xvlm"], tasks=TASKS[:2])


def _table5(seed: int) -> list[Cell]:
    ways = _named("l2", "lamp", "tamt", "multiflow")
    return grid(ways, seed, models=["blip"], tasks=TASKS[:2])


def _table8(seed: int) -> list[Cell]:
    return grid([None, WAYS["random"], *ABLATION, WAYS["multiflow"]], seed, tasks=TASKS[:1])


def _id(seed: int) -> list[Cell]:
    plain = [WAYS[name] for name in ("snip", "omp", "chita", "multiflow")]
    return grid([None, *plain, *WITH_ID], seed, tasks=TASKS[:1], sparsities=SPARSITIES[1:])


def _modality(seed: int) -> list[Cell]:
    return grid((*PAPER, *MORE), seed, tasks=TASKS[:1])


def _data(seed: int) -> list[Cell]:
    return grid([None, *SIZED], seed, tasks=TASKS[:1], sparsities=[0.75])


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("main", "All methods on all tasks (Tables 2 and 9 of MULTIFLOW)", _main),
        Table("table4", "More baselines on X-VLM (Table 4)", _table4),
        Table("table5", "The same on BLIP (Table 5)", _table5),
        Table("table8", "Parts of MULTIFLOW's score, and its inverted mask (Table 8)", _table8),
        Table("id", "With and without the intrinsic dimension", _id),
        Table("modality", "What each method leaves of vision, text and fusion", _modality),
        Table("data", "By the number of calibration pairs", _data),
    )
}
