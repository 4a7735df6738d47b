"""Command line of the tables."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import benchmarks.tables
from benchmarks.results import FOLDER
from benchmarks.tables.catalogue import TABLES, Table
from benchmarks.tables.rendering import render
from benchmarks.tables.running import missing, run, unique
from benchmarks.tables.runtimes import METHODS
from benchmarks.tables.table7 import MODELS
from benchmarks.tables.world import World

CELLS = FOLDER / "tables" / "cells"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=benchmarks.tables.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all if left out")
    parser.add_argument("--list", action="store_true", help="which cells are there; runs nothing")
    parser.add_argument("--render", action="store_true", help="write the tables; runs nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time")
    parser.add_argument("--minutes", type=float, help="begin no further cell after so many")
    parser.add_argument(
        "--cells",
        type=Path,
        default=CELLS,
        help="folder of the cells' files; tables are written beside it",
    )
    parser.add_argument("--world", type=Path, default=Path(".tables"), help="models, data, masks")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="of table7; blip if left out")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], help="of table7; else all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # cells end with it
    chosen = [TABLES[name] for name in options.tables or TABLES]
    failed = _cells([table for table in chosen if table.run is None], options)
    failed += sum(table.run(options) for table in chosen if table.run is not None)
    sys.exit(f"{failed} cells failed" if failed else 0)


def _cells(tables: list[Table], options: argparse.Namespace) -> int:
    """Does what the command line says with tables of cells; returns how many failed."""
    if options.render:
        for table in tables:
            print(render(table, options.seeds, options.cells, options.cells.parent), flush=True)
        return 0
    cells = [cell for seed in options.seeds for table in tables for cell in table.cells(seed)]
    if options.list:
        todo = {cell.name for cell in missing(cells, options.cells)}
        for cell in unique(cells):
            print(f"{'missing' if cell.name in todo else 'done':8}{cell.name}")
        return 0
    if not cells:
        return 0
    limit = None if options.minutes is None else 60 * options.minutes
    world = World(options.world)
    return len(run(cells, world, options.cells, workers=options.workers, limit=limit))


if __name__ == "__main__":
    main()
