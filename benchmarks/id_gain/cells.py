"""One method on one model with one seed: pruned in all arms, measured, kept in a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.demo.compare import Subject
from benchmarks.demo.measure import Figures
from benchmarks.id_gain.ways import ARMS, PLAIN, Way
from vlp_plugins import IdProfile, Masks, measure_id, prune
from vlp_plugins.adapter import Batch
from vlp_plugins.atomic import write_text
from vlp_plugins.data import CaptionedBatches, load_processor, open_source
from vlp_plugins.errors import OutputError

BUDGET = "6GiB"
ID_BATCH = 32

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison share.

    Attributes:
        sparsities: fractions removed.
        samples: calibration pairs of each seed, drawn from `pool`.
        pool: calibration pairs that there are.
        pairs: unseen pairs to measure with.
    """

    sparsities: tuple[float, ...] = (0.63, 0.75, 0.9)
    samples: int = 512
    pool: int = 2048
    pairs: int = 400


@dataclass
class Bench:
    """A model and its data.

    Attributes:
        subject: the model.
        data: folder with the image folder `calibration`.
        settings: of the comparison.
        out: folder of the cells.
        known: figures by hash of the masks: a method without data has the same for every seed.
    """

    subject: Subject
    data: Path
    settings: Settings
    out: Path
    known: dict[str, Figures] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.subject.source.name

    def batches(self, seed: int, size: int, samples: int | None = None) -> list[Batch]:
        """The calibration pairs of a seed, or the first ones of them."""
        source = open_source(str(self.data / "calibration"))
        processor = load_processor(str(self.subject.source))
        count = min(self.settings.samples, samples or self.settings.samples) // size
        return list(
            CaptionedBatches(
                source, processor, self.subject.adapter, size, limit=count, shuffle_seed=seed
            )
        )

    def profile(self, seed: int) -> IdProfile:
        """The dimensions measured from the pairs of a seed; from their file if there is one."""
        path = self.out / f"{self.model}-seed{seed}-profile.json"
        if path.exists():
            return IdProfile.load(path)
        profile = measure_id(
            self.subject.model,
            self.batches(seed, ID_BATCH),
            adapter=self.subject.adapter,
            memory_budget=BUDGET,
        )
        profile.save(path)
        return profile

    def figures(self, masks: Masks) -> Figures:
        """What the model can do under masks."""
        if masks.values_bytes:
            return self.subject.measure_under(masks)
        digest = hashlib.sha256()
        for bits in masks.packed.values():
            digest.update(bits.numpy().tobytes())
        key = digest.hexdigest()
        if key not in self.known:
            self.known[key] = self.subject.measure_under(masks)
        return self.known[key]


@dataclass(frozen=True)
class Cell:
    """A method with a seed, on the model of a bench."""

    model: str
    seed: int
    way: Way

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.model}-seed{self.seed}-{self.way.method}.json"

    def record(self, settings: Settings) -> dict[str, Any]:
        """What tells whether a file holds the same comparison."""
        return json.loads(json.dumps({"settings": asdict(settings), "way": asdict(self.way)}))

    def load(self, out: Path, settings: Settings) -> dict[str, Any] | None:
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

    def run(self, bench: Bench) -> dict[str, Any]:
        """Prunes in all arms, measures, and writes its file whole or not at all."""
        start = time.perf_counter()
        profile = bench.profile(self.seed)
        batches = bench.batches(self.seed, self.way.batch_size, self.way.samples)
        rows = [row for arm in ARMS for row in self._rows(bench, profile, batches, arm)]
        content = {
            "model": self.model,
            "seed": self.seed,
            "method": self.way.method,
            **self.record(bench.settings),
            "seconds": round(time.perf_counter() - start, 1),
            "rows": rows,
        }
        write_text(self.path(bench.out), json.dumps(content, indent=1) + "\n", overwrite=True)
        return content

    def _rows(
        self, bench: Bench, profile: IdProfile, batches: list[Batch], arm: str
    ) -> Iterator[Row]:
        start = time.perf_counter()
        found = prune(
            bench.subject.model,
            batches,
            adapter=bench.subject.adapter,
            sparsity=list(bench.settings.sparsities),
            seed=self.seed,
            memory_budget=BUDGET,
            id_profile=None if arm == PLAIN else profile,
            **self.way.options(arm),
            **self.way.parameters,
        )
        seconds = round(time.perf_counter() - start, 1)
        for sparsity, masks in zip(bench.settings.sparsities, found, strict=True):
            yield {
                "arm": arm,
                "sparsity": sparsity,
                **bench.figures(masks).as_dict(),
                "removed": masks.removed,
                "pruning_seconds": seconds,
            }


def seconds_left(done: list[dict[str, Any]], todo: list[Cell]) -> float | None:
    """How long the other cells will take, by what cells of the same method took; None: unknown."""
    if not done:
        return None
    usual = fmean(content["seconds"] for content in done)
    total = 0.0
    for cell in todo:
        alike = [c["seconds"] for c in done if c["method"] == cell.way.method]
        total += fmean(alike) if alike else usual
    return total
