"""One importance on one model at one ratio with one seed: cut, measured, tuned, measured again."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.demo.compare import Subject
from benchmarks.demo.measure import measure
from benchmarks.structured.tuning import Tuning, fine_tune
from benchmarks.structured.ways import Way
from vlp_plugins.adapter import Batch
from vlp_plugins.atomic import write_text
from vlp_plugins.data import CaptionedBatches, load_processor, open_source
from vlp_plugins.errors import OutputError
from vlp_plugins.hosts.torch_pruning.result import parameters_of

Content = dict[str, Any]


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


@dataclass
class Bench:
    """A model and its data.

    Attributes:
        subject: the model, which stays as it is.
        data: folder with the image folder `calibration`.
        settings: of the comparison.
        out: folder of the cells.
    """

    subject: Subject
    data: Path
    settings: Settings
    out: Path

    def batches(self, seed: int, way: Way) -> list[Batch]:
        """The calibration pairs of a seed, or the first ones of them."""
        source = open_source(str(self.data / "calibration"))
        processor = load_processor(str(self.subject.source))
        count = min(self.settings.samples, way.samples or self.settings.samples) // way.batch_size
        return list(
            CaptionedBatches(
                source,
                processor,
                self.subject.adapter,
                way.batch_size,
                limit=count,
                shuffle_seed=seed,
            )
        )


@dataclass(frozen=True)
class Cell:
    """An importance at a ratio with a seed, on the model of a bench."""

    model: str
    seed: int
    ratio: float
    way: Way

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.model}-{100 * self.ratio:.0f}-{self.way.name}-seed{self.seed}.json"

    def record(self, settings: Settings) -> Content:
        """What tells whether a file holds the same comparison."""
        return json.loads(json.dumps({"settings": asdict(settings), "way": asdict(self.way)}))

    def load(self, out: Path, settings: Settings) -> Content | None:
        """The content of its file; None if there is none.

        Raises:
            OutputError: if it was made with other settings.
        """
        path = self.path(out)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        if any(found[key] != value for key, value in self.record(settings).items()):
            raise OutputError(
                f"{path} was made with other settings; move the folder away, or give another --out"
            )
        return found

    def run(self, bench: Bench) -> Content:
        """Cuts a copy of the model, measures before and after tuning, writes its file whole."""
        subject, settings = bench.subject, bench.settings
        begin = time.perf_counter()
        model = copy.deepcopy(subject.model)
        before = parameters_of(model)
        batches = bench.batches(self.seed, self.way)
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
        content = {
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
        write_text(self.path(bench.out), json.dumps(content, indent=1) + "\n", overwrite=True)
        return content
