"""Command line of the comparison with and without intrinsic dimensions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import benchmarks.papers.id_gain
from benchmarks.demo import MODELS
from benchmarks.demo.cells import Content, recorded_cells, run_cells
from benchmarks.papers.id_gain.cells import Cell, IdBench, Settings, seconds_left
from benchmarks.papers.id_gain.findings import (
    flat,
    gain,
    grouped,
    significant_gains,
    table,
    verdicts,
)
from benchmarks.papers.id_gain.ways import ARMS, ways
from benchmarks.results import FOLDER, recorded

CELLS = FOLDER / "id_gain"
QUICK = Settings(sparsities=(0.75,), samples=64, pool=64, pairs=64)
QUICK_METHODS = ["omp", "multiflow"]


def compare(
    cells: Sequence[Cell],
    settings: Settings,
    out: Path,
    *,
    models: Path = MODELS,
    limit: float | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells that have no file yet, and returns what all say that have one.

    Args:
        cells: what is asked for, in order.
        settings: of the comparison.
        out: folder of the cells' files.
        models: folder of the demo models.
        limit: seconds after which no further cell is begun; None: no limit.
    """
    return run_cells(cells, settings, out, IdBench, _line, models=models, limit=limit)


def _line(cell: Cell, done: list[Content], todo: list[Cell]) -> str:
    return (
        f"{cell.model} seed {cell.seed} {cell.way.method}: {done[-1]['seconds']:.0f} s; "
        f"{len(todo)} cells left, about {(seconds_left(done, todo) or 0) / 60:.0f} min"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.papers.id_gain", description=benchmarks.papers.id_gain.__doc__
    )
    parser.add_argument("--models", nargs="+", default=["blip", "xvlm"])
    parser.add_argument("--methods", nargs="+", help="registered names; all if left out")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="of calibration pairs"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.63, 0.75, 0.9])
    parser.add_argument("--pairs", type=int, default=400, help="unseen test pairs")
    parser.add_argument("--samples", type=int, default=512, help="calibration pairs of a seed")
    parser.add_argument("--minutes", type=float, help="begin no further cell after so many")
    parser.add_argument("--out", type=Path, default=CELLS, help="folder of the cells' files")
    parser.add_argument(
        "--record",
        action="store_true",
        help="run cells that are missing, write the summary beside all",
    )
    parser.add_argument("--quick", action="store_true", help="two methods, one seed, few pairs")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    settings = Settings(
        tuple(options.sparsities), options.samples, max(2048, options.samples), options.pairs
    )
    seeds, methods, out = options.seeds, options.methods, options.out
    if options.quick:
        settings, seeds, methods = QUICK, [1], methods or QUICK_METHODS
        out = Path(".quick") / "id_gain" if out == CELLS else out / "quick"
    cells = [
        Cell(model, seed, way)
        for seed in seeds
        for model in options.models
        for way in ways(methods)
    ]
    limit = None if options.minutes is None else 60 * options.minutes
    if out == CELLS and not options.record:
        cells = recorded_cells(cells, out)
    done = compare(cells, settings, out, limit=limit)
    if not done:
        return
    rows = flat(done)
    print("\nR@1 image->text/text->image, captions that are right (%), mean±spread over seeds")
    print("\n".join([*table(rows), "", *verdicts(rows), "", *significant_gains(rows)]))
    if not options.quick:
        where = out.parent if options.record else None
        print(recorded("id_gain", figures_of(done, settings), where))


def figures_of(done: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """What is kept of a comparison beside its cells: gains and verdicts."""
    rows = flat(done)
    gains = [
        {
            "model": model,
            "sparsity": sparsity,
            "method": method,
            "arm": arm,
            "gain": round(found.mean, 2),
            "spread": None if found.spread is None else round(found.spread, 2),
            "verdict": found.verdict,
        }
        for (model, sparsity, method), some in grouped(rows).items()
        for arm in ARMS[1:]
        for found in [gain(some, arm)]
    ]
    return {"settings": vars(settings), "verdicts": verdicts(rows), "gains": gains, "rows": rows}


if __name__ == "__main__":
    main()
