"""One cell: one model, pruned one way, fine-tuned on one task with one seed, measured."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.papers import kept
from benchmarks.papers.pruning import load, pruned
from benchmarks.papers.tuning import TUNINGS, Tuning, measured, tuned
from benchmarks.papers.ways import Way
from benchmarks.papers.world import VERSION, World
from vlp_plugins.jobs.work_dir import delete_work, working
from vlp_plugins.runtime.files import reserved, write_text

THREADS = 1
"""Of a cell of the small models: as many as cores run side by side."""


@dataclass(frozen=True)
class Origin:
    """Where a model and data of one's own are.

    Attributes:
        checkpoint: of the model.
        calibration: pre-training pairs.
        data: of the task.
    """

    checkpoint: str
    calibration: str
    data: str


@dataclass(frozen=True)
class Cell:
    """What a cell is made of; everything else follows.

    Attributes:
        model: `blip`, `xvlm` or `vit`.
        task: a key of `TUNINGS`, with the model.
        way: how the model is pruned; None: not at all.
        sparsity: fraction removed.
        seed: of calibration data, of fine-tuning, and of methods that draw.
        split: what is measured on: `dev`, for choosing, or `test`.
        recipe: of fine-tuning; None: that of `TUNINGS`, for the small models.
        origin: of model and data; None: those of this repository.
    """

    model: str
    task: str
    way: Way | None
    sparsity: float
    seed: int = 1
    split: str = "test"
    recipe: Tuning | None = None
    origin: Origin | None = None

    @property
    def tuning(self) -> Tuning:
        """How it is fine-tuned and measured."""
        return self.recipe or TUNINGS[self.model, self.task]

    @property
    def name(self) -> str:
        """Short and unique."""
        way = "dense" if self.way is None else f"{self.way.name}-{self.sparsity:g}"
        split = "" if self.split == "test" else f"-{self.split}"
        return f"{self.model}/{self.task}/{way}-seed{self.seed}{split}"

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.name}.json"

    def identity(self) -> dict[str, Any]:
        """What decides its figures, as JSON keeps it."""
        made: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            "way": None if self.way is None else self.way.name,
            "pruning": None if self.way is None else self.way.as_dict(),
            "sparsity": self.sparsity,
            "seed": self.seed,
            "split": self.split,
            "tuning": self.tuning.as_dict(),
            "version": VERSION,
        }
        if self.origin is not None:
            made |= asdict(self.origin)
        return dict(json.loads(json.dumps(made)))

    def content(self, out: Path) -> Mapping[str, Any] | None:
        """What its file says; None if there is none.

        Raises:
            OutputError: if the file is of a cell with other settings, or no JSON.
        """
        return kept.read(self.path(out), self.identity())

    def run(self, world: World, out: Path) -> None:
        """Does the work and writes the file whole or not at all; a cell has one run at a time."""
        with reserved(self.path(out)):
            self._run_alone(world, out)

    def _run_alone(self, world: World, out: Path) -> None:
        if self.origin is None:
            torch.set_num_threads(THREADS)
            self._run(world, out, None)
            return
        stem = self.path(out).with_suffix("")
        with working(stem, resume=True) as work:  # hours of fine-tuning can go on
            self._run(world, out, work)
        delete_work(stem)

    def _run(self, world: World, out: Path, work: Path | None) -> None:
        start = time.perf_counter()
        tuning = self.tuning
        loaded = load(world, self.model)
        made = None
        if self.way is not None:
            made = pruned(world, loaded, self.model, self.way, self.sparsity, self.seed)
        before = time.perf_counter()
        masks = None if made is None else made.masks
        about = {f"cell {key}": value for key, value in self.identity().items()}
        model, loss = tuned(world, loaded, tuning, masks, self.seed, workplace=work, about=about)
        middle = time.perf_counter()
        figures = measured(world, loaded, model, tuning, self.split)
        end = time.perf_counter()
        content = {
            **self.identity(),
            "metrics": {name: round(value, 2) for name, value in figures.metrics.items()},
            "absent": dict(figures.absent),
            "pruned": made and made.facts,
            "last_loss": round(loss, 4),
            "seconds": {
                "pruning": round(before - start, 1),
                "tuning": round(middle - before, 1),
                "measuring": round(end - middle, 1),
            },
        }
        path = self.path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n", overwrite=True)
