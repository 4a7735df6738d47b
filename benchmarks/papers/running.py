"""Runs cells side by side, each in a process of its own; what is there is never run again."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.papers.cell import Cell
from benchmarks.papers.world import World
from vlp_plugins.runtime.errors import VlpError

LONGEST = 90.0
"""Seconds that a cell may take on two cores."""
ENDED_AFTER = 40 * LONGEST
"""Seconds after which a cell of the small models is given up."""
_POLL = 0.2  # seconds
_PRELOADED = ["benchmarks.papers.cell", "transformers.models.blip.modeling_blip"]


def missing(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells that have no file, in order, each once.

    Raises:
        OutputError: if a file is of a cell with other settings.
    """
    return [cell for cell in unique(cells) if cell.content(out) is None]


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """Each cell once: tables share some."""
    return list({cell.name: cell for cell in cells}.values())


def run(
    cells: Sequence[Cell], world: World, out: Path, *, workers: int, limit: float | None = None
) -> list[Cell]:
    """Runs the cells that are missing; returns those that failed.

    Args:
        cells: what is asked for, in order.
        world: models and data; made if they are not there.
        out: folder of the cells' files.
        workers: cells at a time.
        limit: seconds after which no further cell is begun; None: no limit.
    """
    begin = time.monotonic()
    todo = missing(cells, out)
    print(f"{len(unique(cells)) - len(todo)} cells are there, {len(todo)} to run", flush=True)
    if todo:
        world.make()
    # Processes that start with everything imported, and share nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    running: list[tuple[Cell, BaseProcess, float]] = []
    failed: list[Cell] = []
    try:
        while todo or running:
            late = limit is not None and time.monotonic() - begin > limit
            while todo and not late and len(running) < workers:
                cell = todo.pop(0)
                if cell.path(out).exists():  # of another run of this command
                    continue
                begun = context.Process(target=_run, args=(cell, world, out))
                begun.start()
                running.append((cell, begun, time.monotonic()))
            for _, hanging, start in running:
                if world.small and time.monotonic() - start > ENDED_AFTER:
                    hanging.kill()
                    hanging.join()
            for entry in [each for each in running if not each[1].is_alive()]:
                running.remove(entry)
                cell, process, start = entry
                seconds = time.monotonic() - start
                said = f"{seconds:.0f} s" if process.exitcode == 0 else "FAILED"
                if process.exitcode != 0:
                    failed.append(cell)
                elif world.small and seconds > LONGEST:
                    said += f", longer than {LONGEST:.0f}"
                print(f"{cell.name}: {said}; {len(todo) + len(running)} left", flush=True)
            if late and not running:
                break
            time.sleep(_POLL)
    finally:
        for _, process, _ in running:
            process.terminate()
    return failed


def _run(cell: Cell, world: World, out: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        cell.run(world, out)
    except VlpError as error:  # what to do about it is in the message
        sys.exit(f"{cell.name}: {error}")
