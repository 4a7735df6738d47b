"""One importance on one model at one ratio with one seed: cut, measured, tuned, measured again."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.demo.cells import Bench, Content, KeptCell
from benchmarks.demo.measure import measure
from benchmarks.papers.structured.tuning import Tuning, fine_tune
from benchmarks.papers.structured.ways import Way
from vlp_plugins.hosts.torch_pruning.structured import parameters_of


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison share.

    Attributes:
        cut: what goes; see `prune_structured`.
        scope: see `prune_structured`.
        samples: calibration pairs of each seed, drawn from `pool`.
        pool: calibration pairs that there are.
        pairs: unseen pairs to measure with.
        tuning: the fine-tuning.
    """

    cut: tuple[str, ...] = ("heads", "ffn")
    scope: str = "layer"
    samples: int = 512
    pool: int = 2048
    pairs: int = 400
    tuning: Tuning = field(default_factory=Tuning)


@dataclass(frozen=True)
class Cell(KeptCell):
    """An importance at a ratio with a seed, on the model of a bench."""

    model: str
    seed: int
    ratio: float
    way: Way

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.model}-{100 * self.ratio:.0f}-{self.way.name}-seed{self.seed}.json"

    def run(self, bench: Bench) -> Content:
        """Cuts a copy of the model, measures before and after tuning, writes its file whole."""
        subject, settings = bench.subject, bench.settings
        begin = time.perf_counter()
        model = copy.deepcopy(subject.model)
        before = parameters_of(model)
        batches = bench.batches(self.seed, self.way.batch_size, self.way.samples)
        self.way.cut(
            model,
            subject.adapter,
            batches,
            self.seed,
            ratio=self.ratio,
            cut=settings.cut,
            scope=settings.scope,
        )
        cutting = time.perf_counter() - begin
        cut = measure(model, subject.adapter, subject.pairs)
        processor = subject.pairs.tokenizer
        tokenizer = getattr(processor, "tokenizer", processor)
        fine_tune(model, subject.adapter.name, tokenizer, settings.tuning, self.seed)  # type: ignore[arg-type]
        tuned = measure(model, subject.adapter, subject.pairs)
        content: Content = {
            "model": self.model,
            "seed": self.seed,
            "ratio": self.ratio,
            "importance": self.way.name,
            **self.record(settings),
            "parameters": [before, parameters_of(model)],
            "cut": cut.as_dict(),
            "tuned": tuned.as_dict(),
            "cutting_seconds": round(cutting, 1),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        return self.keep(bench.out, content)
