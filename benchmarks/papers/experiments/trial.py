"""One trial of a search, as NNI starts it: `python -m benchmarks.papers.experiments.trial`.

Runs the cell of what was drawn, unless its file is there, and reports its average R@1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

from benchmarks.papers.experiments.searches import SEARCHES, Search, result_of
from benchmarks.papers.world import World
from vlp_plugins.hosts.nni.trial import NniTrial


def run(search: Search, trial: NniTrial, seed: int, world: World, cells: Path) -> None:
    """Runs the cell if it is missing and tells the tuner."""
    cell = search.cell(trial.drawn, seed)
    if cell.content(cells) is None:
        cell.run(world, cells)
    content = cell.content(cells)
    assert content is not None
    trial.final(result_of(content))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.experiments.trial", description=__doc__
    )
    parser.add_argument("search", choices=SEARCHES)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--world", type=Path, required=True)
    options = parser.parse_args()
    logging.disable_progress_bar()
    trial = NniTrial.current()
    if trial.alone:
        sys.exit("no experiment started this trial: python -m benchmarks.papers table10 does")
    run(SEARCHES[options.search], trial, options.seed, World(options.world), options.cells)


if __name__ == "__main__":
    main()
