"""The tables by name, and the cells that each is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.demo.processors import FAMILIES
from benchmarks.papers.candidates import better_cells, final_cells, search_cells
from benchmarks.papers.cell import Cell
from benchmarks.papers.chat import CHAT, Comparison
from benchmarks.papers.downstream.classes import SETS
from benchmarks.papers.experiments import lambda_grid
from benchmarks.papers.pretraining import TABLE as PRETRAINING
from benchmarks.papers.table7 import TITLE as TITLE7
from benchmarks.papers.table7 import run as run_table7
from benchmarks.papers.table10 import TITLE as TITLE10
from benchmarks.papers.table10 import run as run_table10
from benchmarks.papers.tuning import LONGER
from benchmarks.papers.views import (
    View,
    against_paper,
    calibration_size,
    classification,
    compared,
    dimensions,
    lengths,
    modalities,
    parts,
    penalties,
    ranked,
)
from benchmarks.papers.ways import ABLATION, MORE, OURS, PAPER, SIZED, VIT_WAYS, WAYS, WITH_ID, Way

SPARSITIES = (0.63, 0.75, 0.9)
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
        view: how it looks; None: all figures of all tasks, `views.whole`.
        run: of a table whose cells are not run like others: does whatever the command line says and
            returns how much failed; the page it leaves to `view`, if there is one.
        seeds: those that are run and shown unless the command line says others.
        small: of the models of this repository, or of weights that do not matter.
    """

    name: str
    title: str
    cells: Callable[[int], list[Cell]]
    view: View | None = None
    run: Callable[[argparse.Namespace], int] | None = None
    seeds: tuple[int, ...] = (1,)
    small: bool = False

    def of(self, seeds: Sequence[int] | None) -> list[Cell]:
        """The cells of some seeds; None: of those of the table."""
        return [cell for seed in seeds or self.seeds for cell in self.cells(seed)]


def _main(seed: int) -> list[Cell]:
    # What the paper compares comes first, then what other tables need, in case time runs out.
    return [*grid((None, *PAPER), seed), *grid(MORE[:2], seed), *grid((OURS, *MORE[2:]), seed)]


def _none(_: int) -> list[Cell]:
    return []


def _again(seed: int) -> list[Cell]:
    ways = (None, *PAPER, *MORE, OURS)
    return grid(ways, seed, models=["blip"], tasks=TASKS[1:], sparsities=SPARSITIES[1:])


def _named(*names: str) -> list[Way | None]:
    return [None, *(WAYS[name] for name in names)]


def _table4(seed: int) -> list[Cell]:
    ways = _named("l2", "lamp", "tamt", "multiflow")
    return grid(ways, seed, models=["xvlm"], tasks=TASKS[:2])


def _table5(seed: int) -> list[Cell]:
    ways = _named("l2", "lamp", "tamt", "multiflow")
    return grid(ways, seed, models=["blip"], tasks=TASKS[:2])


def _table6(seed: int) -> list[Cell]:
    return grid([None, *VIT_WAYS], seed, models=["vit"], tasks=tuple(SETS))


def _table8(seed: int) -> list[Cell]:
    return grid([None, WAYS["random"], *ABLATION, WAYS["multiflow"]], seed, tasks=TASKS[:1])


def _id(seed: int) -> list[Cell]:
    plain = [WAYS[name] for name in ("snip", "omp", "chita", "multiflow")]
    return grid([None, *plain, *WITH_ID], seed, tasks=TASKS[:1], sparsities=[0.9])


def _modality(seed: int) -> list[Cell]:
    return grid((*PAPER, *MORE, OURS), seed, tasks=TASKS[:1])


def _data(seed: int) -> list[Cell]:
    return grid([None, *SIZED], seed, tasks=TASKS[:1], sparsities=[0.75])


def _longer(seed: int) -> list[Cell]:
    named = {"blip": ("multiflow", "tamt", "platon"), "xvlm": ("multiflow", "tamt", "l2")}
    return [
        cell
        for task in (LONGER, "retrieval")
        for model, names in named.items()
        for cell in grid(_named(*names), seed, models=[model], tasks=[task], sparsities=[0.75])
    ]


def _compared(it: Comparison) -> Table:
    return Table(it.name, it.title, _none, run=it.run, seeds=tuple(it.seeds), small=True)


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("main", "All methods on all tasks (Tables 2 and 9 of MULTIFLOW)", _main, compared),
        Table(
            "again",
            "Captions and answers of BLIP with a second seed",
            _again,
            seeds=(1, 2),
            small=True,
        ),
        Table("table4", "More baselines on X-VLM (Table 4)", _table4, against_paper),
        Table("table5", "The same on BLIP (Table 5)", _table5, against_paper),
        Table(
            "table6",
            "A vision transformer, pruned before it learns to classify (Table 6)",
            _table6,
            classification,
            seeds=(1, 2, 3),
        ),
        Table("table7", TITLE7, _none, run=run_table7, small=True),
        Table(
            "table8", "Parts of MULTIFLOW's score, and its inverted mask (Table 8)", _table8, parts
        ),
        Table(
            "table10",
            TITLE10,
            lambda_grid.cells,
            penalties,
            run_table10,
        ),
        Table("id", "With and without the intrinsic dimension", _id, dimensions),
        Table(
            "modality", "What each method leaves of vision, text and fusion", _modality, modalities
        ),
        Table("data", "By the number of calibration pairs", _data, calibration_size),
        Table("longer", "Fine-tuned four times as long", _longer, lengths, small=True),
        Table(
            "search",
            "Compositions, on the development split",
            search_cells,
            ranked,
            small=True,
        ),
        Table(
            "finals",
            "The two best of the search, with seeds that took no part in the choice",
            final_cells,
            ranked,
            seeds=(2, 3),
            small=True,
        ),
        Table(
            "better",
            "What the search found, its parts, and everything published",
            better_cells,
            ranked,
            seeds=(1, 2, 3),
            small=True,
        ),
        *map(_compared, (CHAT, PRETRAINING)),
    )
}
