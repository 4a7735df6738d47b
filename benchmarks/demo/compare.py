"""One model, every method, every sparsity: prune once per method, measure each mask set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.demo.measure import Figures, Pairs, measure
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.processors import load_processor
from vlp_plugins.data.sources import open_source
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.inspection import Inspection, inspect_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune

METHODS = ("random", "omp", "lamp", "l2", "multiflow")
SPARSITIES = (0.63, 0.75, 0.9)
CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Outcome:
    """A mask set and what the model can do under it, without fine-tuning."""

    method: str
    sparsity: float
    masks: Masks
    figures: Figures


@dataclass(frozen=True)
class Comparison:
    """All that was found out about one model.

    Attributes:
        name: of the model's folder.
        source: the folder.
        inspection: what the model is to the pruner.
        dense: figures of the model as it was trained.
        outcomes: by method, then by sparsity.
        pruning_seconds: by method, all sparsities together.
        seconds: the whole comparison.
    """

    name: str
    source: Path
    inspection: Inspection
    dense: Figures
    outcomes: Sequence[Outcome]
    pruning_seconds: Mapping[str, float]
    seconds: float

    def of(self, method: str) -> list[Outcome]:
        """The outcomes of one method."""
        return [outcome for outcome in self.outcomes if outcome.method == method]


@dataclass(frozen=True)
class Subject:
    """A demo model with what pruning and measuring it takes."""

    source: Path
    model: nn.Module
    adapter: Adapter
    calibration: Iterable[Batch]
    pairs: Pairs

    @classmethod
    def load(cls, source: Path, data: Path) -> Subject:
        """Loads a model and the data, as its own processor makes them into batches.

        Args:
            source: the model's folder.
            data: with the image folders `calibration` and `test`.

        Raises:
            VlpError: if one of them cannot be read.
        """
        model, adapter = load_model(str(source), device="cpu")
        processor = load_processor(str(source))
        pictures = open_source(str(data / "calibration"))
        batches = CaptionedBatches(pictures, processor, adapter, CALIBRATION_BATCH)
        return cls(source, model, adapter, batches, Pairs.read(data / "test", processor, adapter))

    def measure(self) -> Figures:
        """What the model can do as it is now."""
        return measure(self.model, self.adapter, self.pairs)

    def measure_under(self, masks: Masks) -> Figures:
        """What the model can do with the masks applied; it has its weights back afterwards."""
        with restoring(WeightMap.of(self.model, self.adapter)):
            masks.apply(self.model, self.adapter)
            return self.measure()


def compare(
    subject: Subject,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    tell: Callable[[str], object] | None = None,
) -> Comparison:
    """Prunes with every method at every sparsity and measures before and after.

    Args:
        subject: what is pruned; as before afterwards.
        methods: registered names.
        sparsities: fractions removed; the masks of all come from one pass over the data.
        tell: called with a line about each step that is done; None: silence.
    """
    begin = time.perf_counter()
    dense = subject.measure()
    say = tell or (lambda _: None)
    say(f"{subject.source.name}: dense model measured in {time.perf_counter() - begin:.1f} s")
    outcomes, pruning = [], {}
    for method in methods:
        start = time.perf_counter()
        found = prune(
            subject.model,
            subject.calibration,
            adapter=subject.adapter,
            method=method,
            sparsity=list(sparsities),
        )
        pruning[method] = time.perf_counter() - start
        for sparsity, masks in zip(sparsities, found, strict=True):
            outcomes.append(Outcome(method, sparsity, masks, subject.measure_under(masks)))
        spent = time.perf_counter() - start - pruning[method]
        say(
            f"{subject.source.name}: {method} pruned in {pruning[method]:.1f} s, "
            f"{len(found)} mask sets measured in {spent:.1f} s"
        )
    inspection = inspect_model(subject.model, subject.adapter)
    seconds = time.perf_counter() - begin
    return Comparison(
        subject.source.name, subject.source, inspection, dense, outcomes, pruning, seconds
    )


@contextmanager
def restoring(weights: WeightMap) -> Iterator[None]:
    """Gives prunable weights their values back at the end. Copies those and nothing else."""
    dense: dict[str, Tensor] = {
        name: weight.parameter.detach().clone() for name, weight in weights.items()
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.parameter.copy_(dense[name])
