"""The same cells on checkpoints and data of one's own, with the recipes of the paper.

A YAML file says where they are:

    models: {blip: /checkpoints/blip-base, xvlm: /checkpoints/xvlm, vit: /checkpoints/dino-vitb16}
    calibration: /data/cc3m                # pre-training pairs, as `vlp prune --data` takes them
    images: /data/imagenet/train           # the same for the ViT
    data:                                  # in their usual layouts; what is left out is not run
      retrieval: /data/coco
      captioning: /data/coco
      vqa: /data/vqav2
      cifar10: /data/cifar-10-batches-bin  # these three are of the ViT
      cifar100: /data/cifar-100-binary
      flowers102: /data/flowers-102
    device: cuda                           # a GPU, if there is one, if left out
    memory_budget: 40GiB                   # of gradients (CHITA); what is free if left out
    accumulate: 8                          # parts of a step of fine-tuning; else 1
    prune: {batches: 500, batch_size: 32}  # at most; else those of the paper's recipes
    finetune:                              # else those of the paper's recipes
      vqa: {epochs: 2, measured: 5000}

`python -m benchmarks.papers main --world FILE.yaml --cells FOLDER`. Methods are the default
variants with the batches and rounds of the paper, and CHITA chooses its own penalty; what the paper
does not have gets the batches of TAMT. Dimensions are measured once, with 2,000 samples. Mask
training of a ViT, whose checkpoint has lost the head of its pre-training, learns to give out what
the dense model does. Fine-tuning that was interrupted goes on. VQA is measured on `val`, as nobody
has the answers of the test. Table 10 is its grid of penalties, with one epoch, without the search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.demo.processors import FAMILIES
from benchmarks.papers.budgets import tuning_of, way_of
from benchmarks.papers.catalogue import TASKS, Table
from benchmarks.papers.cell import Cell, Origin
from benchmarks.papers.experiments.lambda_grid import POWERS
from benchmarks.papers.tuning import Tuning
from benchmarks.papers.world import World
from vlp_plugins.data.sources import open_source
from vlp_plugins.jobs.recipe_values import (
    Value,
    amount,
    integer,
    number,
    read_section,
    read_yaml,
    text,
)
from vlp_plugins.jobs.samples import read_samples
from vlp_plugins.loading import load_model
from vlp_plugins.runtime.errors import RecipeError

_VIT = "vit"
IMAGE_SETS = {"digits": "cifar10", "coloured": "cifar100", "framed": "flowers102"}
"""By set of the small ViT the one of the paper in whose role it is."""


@dataclass(frozen=True)
class OwnWorld(World):
    """Checkpoints and data that a file names; its `folder` keeps masks only.

    Attributes:
        pairs: pre-training data of BLIP and X-VLM.
        images: pre-training data of the ViT.
        models: checkpoints by family.
        data: of tasks.
        accumulate: parts of a step of fine-tuning.
        prune: `batches` and `batch_size` instead of those of the recipes.
        finetune: by task, values instead of those of the recipes.
    """

    device: str | None = None
    memory_budget: str | None = None
    pairs: str = ""
    images: str = ""
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
        models = found.get("models") or {}
        seen = ["calibration"] if any(name in FAMILIES for name in models) else []
        seen += ["images"] if _VIT in models else []
        for key in ("models", "data", *seen):
            if not found.get(key):
                raise RecipeError(f"{path}: no {key} given")
        pairs = found.pop("calibration", "")
        return cls(path.with_name(f"{path.stem}-masks"), pairs=pairs, **found)

    def model(self, name: str) -> str:
        return self.models[name]

    def task_data(self, data: str) -> str:
        return self.data[data]

    def calibration_of(self, model: str) -> str:
        return self.images if model == _VIT else self.pairs

    def make(self) -> None:
        """Makes the folder of masks, once everything that the file names can be opened.

        Raises:
            VlpError: naming what cannot: a model, pairs or images, a split of a task.
        """
        for name, source in self.models.items():
            adapter = load_model(source, device="cpu")[1].name
            if adapter != name:
                raise RecipeError(f"{source} is a model of {adapter}, not of {name}")
            open_source(self.calibration_of(name), captions="none" if name == _VIT else "first")
        for task, source in self.data.items():
            kind = task if task in TASKS else "classification"
            for split in ("train", "val" if task == "vqa" else "test"):
                read_samples(kind, source, split=split)
        self.masks.mkdir(parents=True, exist_ok=True)

    def table(self, table: Table) -> Table:
        """The same table of these models, with one seed unless the command line says others."""
        made = replace(table, cells=lambda seed: self.cells(table.cells(seed)), seeds=(1,))
        if table.name != "table10":
            return made
        return replace(
            made,
            title="Ridge penalties of CHITA and CHITA++ (Table 10)",
            cells=lambda seed: self.penalties(table.cells(seed)),
            run=None,  # no search: the grid is cells like others
        )

    def cells(self, cells: list[Cell]) -> list[Cell]:
        """The cells of a table that can be run here, with the paper's budgets and recipes."""
        renamed = [replace(cell, task=IMAGE_SETS.get(cell.task, cell.task)) for cell in cells]
        return [
            replace(
                cell,
                way=cell.way and way_of(cell.model, cell.way, self.prune),
                recipe=self.tuning(cell.model, cell.task),
                origin=Origin(
                    self.models[cell.model],
                    self.calibration_of(cell.model),
                    self.data[cell.task],
                ),
            )
            for cell in renamed
            if cell.model in self.models and cell.task in self.data
        ]

    def penalties(self, cells: list[Cell]) -> list[Cell]:
        """Those of Table 10 with the penalties of the paper, each after one epoch."""
        papers = [cell for cell in cells if cell.way and cell.way.parameters["lambda"] in POWERS]
        return [replace(cell, recipe=replace(cell.tuning, epochs=1)) for cell in self.cells(papers)]

    def tuning(self, model: str, task: str) -> Tuning:
        """How a model is fine-tuned on a task."""
        return tuning_of(
            model, task, {"accumulate": self.accumulate, **self.finetune.get(task, {})}
        )


def _section(readers: Mapping[str, Callable[[Value], Any]]) -> Callable[[Value], dict[str, Any]]:
    """Reader of a section with these keys."""
    return lambda section: read_section(section, readers)


_TUNED = {
    **dict.fromkeys(("measured", "rerank"), integer(0)),
    **dict.fromkeys(("steps", "epochs", "batch_size", "accumulate"), integer(1)),
    "learning_rate": number,
}
_TASKS = (*TASKS, *IMAGE_SETS.values())
_READERS: Mapping[str, Callable[[Value], Any]] = {
    "models": _section(dict.fromkeys((*FAMILIES, _VIT), text)),
    "calibration": text,
    "images": text,
    "data": _section(dict.fromkeys(_TASKS, text)),
    "device": text,
    "memory_budget": amount,
    "accumulate": integer(1),
    "prune": _section({"batches": integer(1), "batch_size": integer(1)}),
    "finetune": _section(dict.fromkeys(_TASKS, _section(_TUNED))),
}
