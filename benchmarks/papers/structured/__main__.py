"""Command line of the comparison of importances."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

import benchmarks.papers.structured
from benchmarks.demo import MODELS
from benchmarks.demo.cells import Bench, Content, recorded_cells, run_cells
from benchmarks.papers.structured.cells import Cell, Settings
from benchmarks.papers.structured.findings import rows_of, table, verdicts, worse_than_random
from benchmarks.papers.structured.tuning import Tuning
from benchmarks.papers.structured.ways import DENSE, ways
from benchmarks.results import FOLDER, recorded

CELLS = FOLDER / "structured"
QUICK = Settings(samples=64, pool=64, pairs=64, tuning=Tuning(steps=4, pairs=16))
QUICK_WAYS = ["multiflow", "omp"]


def compare(
    cells: Sequence[Cell],
    settings: Settings,
    out: Path,
    *,
    models: Path = MODELS,
    limit: float | None = None,
) -> list[Content]:
    """Runs the cells that have no file yet, and returns what all say that have one.

    Args:
        cells: what is asked for, in order.
        settings: of the comparison.
        out: folder of the cells' files.
        models: folder of the demo models.
        limit: seconds after which no further cell is begun; None: no limit.
    """
    return run_cells(cells, settings, out, Bench, _line, models=models, limit=limit)


def _line(cell: Cell, done: list[Content], todo: list[Cell]) -> str:
    return f"{cell.path(CELLS).stem}: {done[-1]['seconds']:.0f} s; {len(todo)} cells left"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.papers.structured", description=benchmarks.papers.structured.__doc__
    )
    parser.add_argument("--models", nargs="+", default=["blip", "xvlm"])
    parser.add_argument("--importances", nargs="+", help="any registered methods; all if left out")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cut", nargs="+", default=["heads", "ffn"])
    parser.add_argument("--scope", default="layer", choices=["layer", "block kind"])
    parser.add_argument("--minutes", type=float, help="begin no further cell after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=CELLS, help="folder of the cells' files")
    parser.add_argument(
        "--record",
        action="store_true",
        help="run cells that are missing, write the summary beside all",
    )
    parser.add_argument("--quick", action="store_true", help="two importances, one seed, few pairs")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    settings = Settings(cut=tuple(options.cut), scope=options.scope)
    seeds, names, out = options.seeds, options.importances, options.out
    if options.quick:
        settings, seeds, names = QUICK, [1], names or QUICK_WAYS
        out = Path(".quick") / "structured" if out == CELLS else out / "quick"
    cells = [
        Cell(model, seed, 0.0 if way.name == DENSE else ratio, way)
        for seed in seeds
        for model in options.models
        for ratio in options.ratios
        for way in ways(names)
    ]
    limit = None if options.minutes is None else 60 * options.minutes
    once = list({cell.path(out): cell for cell in cells}.values())  # the dense one has no ratio
    if out == CELLS and not options.record:
        once = recorded_cells(once, out)
    done = compare(once, settings, out, limit=limit)
    if not done:
        return
    rows = rows_of(done)
    print("\nR@1 (mean of both ways, %) after cutting and after tuning, mean±spread over seeds")
    print("\n".join([*table(rows), "", *verdicts(rows)]))
    if behind := worse_than_random(rows):
        print(f"behind random cutting: {', '.join(behind)}")
    if not options.quick:
        figures = {"settings": _settings(settings), "rows": rows}
        print(recorded("structured", figures, out.parent if options.record else None))


def _settings(settings: Settings) -> dict[str, object]:
    return {**vars(settings), "tuning": vars(settings.tuning)}


if __name__ == "__main__":
    main()
