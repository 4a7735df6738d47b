"""Searches that NNI runs: what is drawn, by which tuner, and the record of the trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.papers import kept
from benchmarks.papers.cell import Cell
from benchmarks.papers.experiments import lambda_grid, pruner_search
from benchmarks.papers.measures import AVERAGE_FEATURES, IMAGE_FEATURES, TEXT_FEATURES
from vlp_plugins.runtime.files import write_text

Trial = dict[str, Any]
"""`parameters` as drawn, `cell`, `value` that the tuner was told, `experiment` of NNI."""


@dataclass(frozen=True)
class Search:
    """A search; every trial is a cell.

    Attributes:
        name: of its record.
        tuner: of NNI.
        arguments: of the tuner.
        space: as NNI takes it.
        trials: in all.
        cell: of what was drawn, with a seed.
    """

    name: str
    tuner: str
    arguments: Mapping[str, Any]
    space: Mapping[str, Any]
    trials: int
    cell: Callable[[Mapping[str, Any], int], Cell] = field(repr=False)

    def path(self, cells: Path, seed: int) -> Path:
        """Its record, beside the folder of the cells."""
        which = "" if seed == 1 else f"-seed{seed}"
        return cells.parent / f"search-{self.name}{which}.json"

    def identity(self, seed: int) -> dict[str, Any]:
        """What decides its trials, as JSON keeps it."""
        made = {"search": self.name, "seed": seed, "tuner": self.tuner}
        return dict(
            json.loads(json.dumps(made | {"arguments": self.arguments, "space": self.space}))
        )

    def done(self, cells: Path, seed: int) -> list[Trial]:
        """The trials of the record whose cells are there, in the order in which they were drawn.

        Their values are those of the cells.

        Raises:
            OutputError: if the record is of other settings, or is no JSON.
        """
        found = kept.read(self.path(cells, seed), self.identity(seed))
        trials: list[Trial] = [] if found is None else found["trials"]
        contents = [self.cell(each["parameters"], seed).content(cells) for each in trials]
        return [
            each | {"value": result_of(content)["default"]}
            for each, content in zip(trials, contents, strict=True)
            if content is not None
        ]

    def write(self, cells: Path, seed: int, trials: Sequence[Trial]) -> None:
        """Writes the record."""
        content = self.identity(seed) | {"trials": list(trials)}
        text = json.dumps(content, indent=1) + "\n"
        write_text(self.path(cells, seed), text, overwrite=True)


def result_of(content: Mapping[str, Any]) -> dict[str, float]:
    """What a trial reports of its cell: `default`, which tuners look at, and what it is made of.

    It is R@1 by the features alone: the matching head learns too slowly to choose by.
    """
    measures = {"default": AVERAGE_FEATURES, "text": TEXT_FEATURES, "image": IMAGE_FEATURES}
    return {name: round(measure.of(content) or 0.0, 3) for name, measure in measures.items()}


LAMBDA_GRID = Search(
    "lambda-grid",
    "GridSearch",
    {},
    lambda_grid.SPACE,
    len(lambda_grid.METHODS) * len(lambda_grid.MODELS) * len(lambda_grid.LAMBDAS),
    lambda_grid.drawn_cell,
)
# NNI's TPE draws blindly until every key has 20 results: a whole search of this length.
TPE = Search(
    "tpe-blip",
    "TPE",
    {"optimize_mode": "maximize", "tpe_args": {"n_startup_jobs": 8}},
    pruner_search.SPACE,
    pruner_search.TRIALS,
    pruner_search.drawn_cell,
)
SEARCHES = {search.name: search for search in (LAMBDA_GRID, TPE)}
