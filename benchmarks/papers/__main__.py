"""Command line of the tables."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import benchmarks.papers
from benchmarks.results import FOLDER
from vlp_plugins.runtime.errors import VlpError, suggest

if TYPE_CHECKING:
    from benchmarks.papers.catalogue import Table
    from benchmarks.papers.own import OwnWorld
    from benchmarks.papers.world import World

CELLS = FOLDER / "tables" / "cells"
_YAML = (".yaml", ".yml")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers",
        description=benchmarks.papers.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", help="as --list names them; all if left out")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--list",
        action="store_true",
        help="how many cells of each table are there, or which of those named; runs nothing",
    )
    instead.add_argument("--render", action="store_true", help="write the tables; runs nothing")
    parser.add_argument("--seeds", nargs="+", type=int, help="else those of each table")
    parser.add_argument(
        "--workers",
        type=_positive,
        help="cells at a time; as many as cores, 1 with a world of one's own",
    )
    parser.add_argument("--minutes", type=float, help="begin no further cell after so many")
    parser.add_argument(
        "--cells",
        type=Path,
        default=CELLS,
        help="folder of the cells' files; tables are written beside it",
    )
    parser.add_argument(
        "--world",
        type=Path,
        default=Path(".tables"),
        help="folder of models, data and masks, which are made; or FILE.yaml of one's own",
    )
    alone = parser.add_argument_group("table7 alone")
    alone.add_argument("--models", nargs="+", help="blip, xvlm; blip if left out")
    alone.add_argument("--methods", nargs="+", help="of its methods; all if left out")
    options = parser.parse_args()
    # After --help, which does not wait for torch.
    from benchmarks.papers.catalogue import TABLES
    from benchmarks.papers.own import OwnWorld
    from benchmarks.papers.runtimes import METHODS
    from benchmarks.papers.table7 import MODELS
    from benchmarks.papers.world import World

    for option, given, known in (
        ("--models", options.models, MODELS),
        ("--methods", options.methods, METHODS),
    ):
        if unknown := [name for name in given or () if name not in known]:
            parser.error(f"argument {option}: {unknown[0]!r} is none of {', '.join(known)}")
    if (options.models or options.methods) and options.tables != ["table7"]:
        parser.error("--models and --methods choose what table7 runs, and no other table")
    # Cells end with it. Not by `sys.exit`: within a solver that is an error of the solver's.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if unknown := [name for name in options.tables if name not in TABLES]:
        parser.error(f"no table {unknown[0]!r}{suggest(unknown[0], list(TABLES))}")
    chosen = [TABLES[name] for name in options.tables or TABLES]
    try:
        world = World(options.world)
        if options.world.suffix in _YAML:
            world = OwnWorld.read(options.world)
            chosen = _possible(parser, chosen, options, world)
        if options.workers is None:
            options.workers = os.cpu_count() or 1 if world.small else 1
        # A page of cells is written like any other, whatever runs the cells.
        plain = [table for table in chosen if table.run is None or (options.render and table.view)]
        failed = _cells(plain, options, world)
        failed += sum(table.run(options) for table in chosen if table.run and table not in plain)
    except VlpError as error:
        parser.error(str(error))
    sys.exit(f"{failed} cells failed" if failed else 0)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _possible(
    parser: argparse.ArgumentParser,
    chosen: list[Table],
    options: argparse.Namespace,
    world: OwnWorld,
) -> list[Table]:
    """Tables of models of one's own; all that have cells, if none is named."""
    if options.cells == CELLS:
        parser.error("give --cells FOLDER: those of this repository are of its own models")
    wrong = [table.name for table in chosen if table.small]
    if options.tables and wrong:
        parser.error(f"{wrong[0]} is not of models of one's own; leave it out")
    possible = [world.table(table) for table in chosen if not table.small]
    empty = [table.name for table in possible if not table.of(options.seeds)]
    if options.tables and empty:
        parser.error(f"{options.world} has no model with data that {empty[0]} is about")
    return [table for table in possible if table.name not in empty]


def _cells(tables: list[Table], options: argparse.Namespace, world: World) -> int:
    """Does what the command line says with tables of cells; returns how many failed."""
    from benchmarks.papers.kept import counted, listed
    from benchmarks.papers.rendering import render
    from benchmarks.papers.running import run, unique

    if options.render:
        for table in tables:
            print(render(table, options.seeds, options.cells, options.cells.parent), flush=True)
        return 0
    if options.list and not options.tables:
        for table in tables:
            print(counted(table.name, unique(table.of(options.seeds)), options.cells))
        return 0
    cells = [cell for table in tables for cell in table.of(options.seeds)]
    if options.list:
        for line in listed(unique(cells), options.cells):
            print(line)
        return 0
    if not cells:
        return 0
    limit = None if options.minutes is None else 60 * options.minutes
    return len(run(cells, world, options.cells, workers=options.workers, limit=limit))


if __name__ == "__main__":
    main()
