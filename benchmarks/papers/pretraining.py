"""Table pretraining: the questions of table chat, asked of the demo's BLIP and X-VLM.

The cells are those of table chat with another model, other data and other measures: retrieval by
features, and the pre-training loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from benchmarks.demo import MODELS
from benchmarks.demo.build_data import write_folder
from benchmarks.demo.measure import BATCH_SIZE
from benchmarks.demo.samples import calibration_sample, unseen_sample, validation_sample
from benchmarks.papers import chat_cells
from benchmarks.papers.chat import ALPS, ERRORS, MULTIFLOW, Comparison
from benchmarks.papers.chat_cells import BATCH, NO_DATA, PATTERN, POOL, SAMPLES, SPARSITIES, way_of
from benchmarks.papers.ways import Way
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.loading import batches, load_model
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.tasks.retrieval import retrieval

PAIRS = 400
"""Of a split, for retrieval."""
LOSSES, LOSS_BATCH = 20, 10
"""Batches of the first pairs whose loss is measured, each a sample: it is of pairs among others."""
CHITA_BATCH = 4
"""CHITA makes a row of every batch: many small ones serve it best."""
VERSION = 1
"""Of model, data and defaults of methods; to be raised when one changes."""

WAYS = (
    *(way_of("omp"), way_of("lamp"), way_of("multiflow", walk="model")),
    *(way_of(m, walk=walk) for m in ("wanda", "sparsegpt", "alps") for walk in ("model", "blocks")),
    *(way_of("alps+", walk="model"), way_of("atv"), way_of("tamp")),
    *(way_of(method, "owl", "model") for method in ("wanda", "alps")),
    *(way_of("chita", walk=walk, batch_size=CHITA_BATCH) for walk in ("model", "blocks")),
)


@dataclass(frozen=True)
class Split:
    """The same pairs twice: in batches for retrieval, and in small ones for the loss."""

    of_retrieval: Sequence[Batch]
    of_loss: Sequence[Batch]

    @classmethod
    def read(cls, folder: Path, model: nn.Module) -> Split:
        """Reads an image folder as the model's processor makes it into batches."""
        of_loss = batches(folder, model, batch_size=LOSS_BATCH)
        return cls(
            list(batches(folder, model, batch_size=BATCH_SIZE)), list(islice(of_loss, LOSSES))
        )

    def measure(self, model: nn.Module, adapter: Adapter) -> dict[str, list[float]]:
        """By name a value for each pair, mean R@1 of both ways, or for each batch of the loss."""
        found = retrieval(model, adapter, self.of_retrieval, ks=(1,)).final
        by_image, by_text = found.by_image(range(sum(map(_rows, self.of_retrieval))))
        probe = LossProbe(model, adapter, WeightMap.of(model, adapter))
        losses = []
        for index, batch in enumerate(self.of_loss):
            with probe.attached(()):  # for each, so that queue and momentum copies are the model's
                losses.append(round(probe.loss(batch, index), 4))
        recall = [(image + text) / 200 for image, text in zip(by_image, by_text, strict=True)]
        return {"recall": recall, "losses": losses}


def _rows(batch: Batch) -> int:
    return len(batch["input_ids"])


@dataclass(frozen=True)
class Bench:
    """A model, the folder of its calibration data, and what it is measured on."""

    model: nn.Module
    adapter: Adapter
    data: Path
    splits: Mapping[str, Split]

    @classmethod
    def of(cls, world: Path, model: str) -> Bench:
        """Makes the data in a folder if it is not there yet."""
        data = world.absolute() / f"pairs-{VERSION}"
        if not data.exists():
            with atomic_folder(data) as target:
                write_folder(calibration_sample(POOL), target / "calibration")
                write_folder(validation_sample(PAIRS), target / "dev")
                write_folder(unseen_sample(PAIRS), target / "test")
        loaded, adapter = load_model(str(MODELS / model), device="cpu")
        splits = {name: Split.read(data / name, loaded) for name in ("dev", "test")}
        return cls(loaded, adapter, data, splits)

    def batches(self, way: Way, seed: int) -> list[Batch]:
        """The calibration pairs of a seed."""
        size, count = way.batch_size, way.samples // way.batch_size
        folder = self.data / "calibration"
        return list(batches(folder, self.model, batch_size=size, count=count, seed=seed))

    def measure(self) -> dict[str, dict[str, list[float]]]:
        """By split and name what the model does with each pair, as it is now."""
        return {name: each.measure(self.model, self.adapter) for name, each in self.splits.items()}


@dataclass(frozen=True)
class Cell(chat_cells.Cell):
    """One model, way, sparsity (or pattern) and seed; without a way the dense model."""

    @property
    def folder(self) -> str:
        """Of the files of its model."""
        return f"{self.model}/one-shot"

    @property
    def measured(self) -> list[int]:
        """How much of a split is measured."""
        return [PAIRS, LOSSES, LOSS_BATCH]


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, in the order in which they are run: the slowest method comes last."""
    found = [
        Cell(way, sparsity, seed, model)
        for seed in seeds
        for sparsity in (0.0, *SPARSITIES)
        for model in TABLE.models
        for way in (WAYS if sparsity else (None,))
        if not (sparsity == PATTERN and way and "owl" in way.name)  # a pattern leaves no budgets
        if not ((way is None or way.name in NO_DATA) and seed != seeds[0])
    ]
    return sorted(found, key=lambda cell: cell.way is not None and cell.way.name == "chita-model")


TABLE = Comparison(
    "pretraining",
    "Two pre-training models: walks, tokens and solvers",
    "The demo's BLIP and X-VLM (`benchmarks/demo/models`), pruned in one shot and not fine-tuned. "
    f"Calibration: {SAMPLES} pairs, drawn for each seed from {POOL}, in batches of {BATCH}, of "
    f"{CHITA_BATCH} for CHITA, which makes a row of gradients of each. Measured on {PAIRS} pairs "
    "with handwriting and combinations that training never showed: R@1 by features, mean of both "
    f"ways (%), and the pre-training loss of {LOSSES} batches of {LOSS_BATCH} of them (nats). "
    f"{ERRORS.format(samples='pairs, or over batches of the loss')} With a single seed the errors "
    "are of the test alone: other calibration pairs would change the figures, too. "
    "`omp`, `lamp` and `chita-model` are global; `omp` and `lamp` read no data. `multiflow` prunes "
    "each modality, `alps`, `alps+`, `chita-blocks` and `sparsegpt` each layer, the others each "
    "row equally. No block of these models has image and text tokens in one sequence, so that "
    "`atv` and `tamp` have no tokens to choose: `atv` is Wanda by blocks, `tamp` that with budgets "
    f"(`das`), which `{PATTERN}` leaves none of.",
    {"recall": "Mean R@1", "losses": "Pre-training loss"},
    (
        (
            "Block by block, minus the whole-model pass",
            [(f"{m}-blocks", f"{m}-model") for m in ("wanda", "sparsegpt", "alps")],
            True,
        ),
        (
            "Token selections, minus all tokens in the same walk",
            [(way, "wanda-blocks") for way in ("atv", "tamp")],
            False,
        ),
        (
            "Budgets of blocks, minus the same sparsity in every layer or row",
            [(f"{m}-owl-model", f"{m}-model") for m in ("wanda", "alps")],
            False,
        ),
        (
            "Other methods, minus ALPS",
            [
                (way, ALPS)
                for way in ("chita-blocks", "chita-model", "sparsegpt-model", "alps+-model")
            ],
            False,
        ),
        (
            "Masks alone, minus MULTIFLOW",
            [(way, MULTIFLOW) for way in ("omp", "lamp", "wanda-model")],
            False,
        ),
    ),
    {"blip": "BLIP", "xvlm": "X-VLM"},
    cells,
    Bench.of,
    WAYS,
    (1,),
)
