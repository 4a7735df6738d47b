"""Table 10: the grid of ridge penalties and the search over methods, run by NNI."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.papers import kept
from benchmarks.papers.experiments import experiment, lambda_grid
from benchmarks.papers.experiments.searches import SEARCHES
from benchmarks.papers.world import World

TITLE = "Ridge penalties of CHITA and CHITA++ (Table 10), and a search over methods"


def run(options: argparse.Namespace) -> int:
    """Does what the command line says; returns how many trials failed."""
    seeds = options.seeds or [1]
    if options.list:
        if not options.tables:
            grid = [cell for seed in seeds for cell in lambda_grid.cells(seed)]
            print(kept.counted("table10", grid, options.cells))
        lines = listed if options.tables else trials
        print("\n".join(line for seed in seeds for line in lines(options.cells, seed)))
        return 0
    begin = time.monotonic()
    failed = 0
    for seed in seeds:
        for search in SEARCHES.values():
            limit = None
            if options.minutes is not None:
                limit = 60 * options.minutes - (time.monotonic() - begin)
            failed += experiment.run(
                search,
                seed,
                World(options.world),
                options.cells,
                workers=options.workers,
                limit=limit,
            )
    return failed


def listed(cells: Path, seed: int) -> list[str]:
    """The cells of the grid, and how far the searches are."""
    return [*kept.listed(lambda_grid.cells(seed), cells), *trials(cells, seed)]


def trials(cells: Path, seed: int) -> list[str]:
    """How far the searches are."""
    return [
        f"{len(search.done(cells, seed))}/{search.trials} trials of {search.name}, seed {seed}"
        for search in SEARCHES.values()
    ]
