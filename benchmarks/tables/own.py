"""The same cells on checkpoints and data of one's own, with the recipes of the paper.

A YAML file says where they are:

    models: {blip: /checkpoints/blip-base, xvlm: /checkpoints/xvlm}
    calibration: /data/cc3m                # pre-training pairs, as `vlp prune --data` takes them
    data:                                  # in their usual layouts; what is left out is not run
      retrieval: /data/coco
      captioning: /data/coco
      vqa: /data/vqav2
    device: cuda                           # a GPU, if there is one, if left out
    memory_budget: 40GiB                   # of gradients (CHITA); what is free if left out
    accumulate: 8                          # parts of a step of fine-tuning; else 1
    prune: {batches: 500, batch_size: 32}  # at most; else those of recipes/paper
    finetune:                              # else those of recipes/paper
      vqa: {epochs: 2, measured: 5000}

`python -m benchmarks.tables main --world FILE.yaml --cells FOLDER`. Methods are the default
variants with the batches and rounds of the paper, and CHITA chooses its own penalty; what the paper
does not have gets the batches of TAMT. Fine-tuning that was interrupted goes on. VQA is measured on
`val`, as nobody has the answers of the test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.demo.processors import FAMILIES
from benchmarks.tables.catalogue import TASKS, Table
from benchmarks.tables.cell import Cell, Origin
from benchmarks.tables.tuning import Tuning
from benchmarks.tables.ways import SIZED, Way
from benchmarks.tables.world import World
from vlp_plugins.errors import RecipeError
from vlp_plugins.intrinsic.factors import GUIDED
from vlp_plugins.job.finetuning import rows_of_a_batch
from vlp_plugins.recipes import load_recipe
from vlp_plugins.recipes.finetuning import load_finetune_recipe, with_finetune_options
from vlp_plugins.recipes.lines import Value, read_yaml
from vlp_plugins.recipes.reading import read_section
from vlp_plugins.recipes.values import amount, integer, number, text

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"
RERANK = 256
"""Candidates that the published BLIP and X-VLM order on COCO."""
_ROUND = {"itersnip": "batches_per_round", "chita++": "rows"}
"""What says how many batches a round has."""
_LIKE = "tamt"
"""Whose budget a method gets that the paper does not have."""


@dataclass(frozen=True)
class OwnWorld(World):
    """Checkpoints and data that a file names; its `folder` keeps masks only.

    Attributes:
        pairs: pre-training data.
        models: checkpoints by family.
        data: of tasks.
        accumulate: parts of a step of fine-tuning.
        prune: `batches` and `batch_size` instead of those of the recipes.
        finetune: by task, values instead of those of the recipes.
    """

    device: str | None = None
    memory_budget: str | None = None
    pairs: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    accumulate: int = 1
    prune: Mapping[str, int] = field(default_factory=dict)
    finetune: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    small = False

    @classmethod
    def read(cls, path: Path) -> OwnWorld:
        """Reads the file; masks go into a folder beside it.

        Raises:
            RecipeError: if it lacks something, or says something that nobody knows.
        """
        found = read_section(read_yaml(path), _READERS)
        for key in ("models", "calibration", "data"):
            if not found.get(key):
                raise RecipeError(f"{path}: no {key} given")
        pairs = found.pop("calibration")
        return cls(path.with_name(f"{path.stem}-masks"), pairs=pairs, **found)

    def model(self, name: str) -> str:
        return self.models[name]

    def task_data(self, data: str) -> str:
        return self.data[data]

    @property
    def calibration(self) -> str:
        return self.pairs

    def make(self) -> None:
        self.masks.mkdir(parents=True, exist_ok=True)

    def table(self, table: Table) -> Table:
        """The same table of these models."""
        return replace(table, cells=lambda seed: self.cells(table.cells(seed)))

    def cells(self, cells: list[Cell]) -> list[Cell]:
        """The cells of a table that can be run here, with the paper's budgets and recipes."""
        return [
            replace(
                cell,
                way=cell.way and self.way(cell.model, cell.way),
                recipe=self.tuning(cell.model, cell.task),
                origin=Origin(self.models[cell.model], self.pairs, self.data[cell.task]),
            )
            for cell in cells
            if cell.model in self.models and cell.task in self.data
        ]

    def way(self, model: str, way: Way) -> Way:
        """With the data and the rounds of the paper; what else it is made of stays."""
        if way in SIZED:
            return replace(way, parameters={**way.parameters, **_chosen(way.parameters)})
        path = RECIPES / f"{way.method.removeprefix(GUIDED)}-{model}.yaml"
        like = load_recipe(RECIPES / f"{_LIKE}-{model}.yaml")
        recipe = load_recipe(path) if path.exists() else like
        data = recipe.data if recipe.data.batches else like.data  # allocations read some, too
        batches = min(data.batches or 0, self.prune.get("batches", sys.maxsize))
        size = self.prune.get("batch_size", data.batch_size)
        parameters = {**recipe.parameters, **way.parameters}
        parameters |= _chosen(parameters)
        if "steps" in parameters:
            parameters["steps"] = batches
        if "rounds" in parameters:
            rounds = min(int(recipe.parameters["rounds"]), batches)
            parameters |= {"rounds": rounds, _ROUND[way.method]: batches // rounds}
        return replace(way, parameters=parameters, samples=batches * size, batch_size=size)

    def tuning(self, model: str, task: str) -> Tuning:
        """Table 11."""
        changed = {"accumulate": self.accumulate, **self.finetune.get(task, {})}
        measured = {name: changed.pop(name) for name in ("measured", "rerank") if name in changed}
        path = RECIPES / f"finetune-{model}-{task}.yaml"
        found = with_finetune_options(load_finetune_recipe(path), **changed)
        rows_of_a_batch(found)  # refuses what cannot be shared out, before anything is run
        settings = found.settings
        return Tuning(
            task,
            task,
            settings.steps or 0,
            settings.learning_rate,
            settings.betas,
            settings.weight_decay,
            settings.schedule,
            settings.warmup,
            found.batch_size,
            measured=measured.get("measured", 0),
            rerank=measured.get("rerank", RERANK if task == "retrieval" else 0),
            epochs=settings.epochs,
            accumulate=settings.accumulate,
        )


def _chosen(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The penalty by the method itself: that of the small models is of no use here."""
    return {"lambda": "auto"} if "lambda" in parameters else {}


def _section(readers: Mapping[str, Callable[[Value], Any]]) -> Callable[[Value], dict[str, Any]]:
    """Reader of a section with these keys."""
    return lambda section: read_section(section, readers)


_TUNED = {
    **dict.fromkeys(("measured", "rerank"), integer(0)),
    **dict.fromkeys(("steps", "epochs", "batch_size", "accumulate"), integer(1)),
    "learning_rate": number,
}
_READERS: Mapping[str, Callable[[Value], Any]] = {
    "models": _section(dict.fromkeys(FAMILIES, text)),
    "calibration": text,
    "data": _section(dict.fromkeys(TASKS, text)),
    "device": text,
    "memory_budget": amount,
    "accumulate": integer(1),
    "prune": _section({"batches": integer(1), "batch_size": integer(1)}),
    "finetune": _section(dict.fromkeys(TASKS, _section(_TUNED))),
}
