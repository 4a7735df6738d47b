"""One method on one model with one seed: pruned in all arms, measured, kept in a file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.demo.cells import Bench, KeptCell
from benchmarks.demo.measure import Figures
from benchmarks.papers.id_gain.ways import ARMS, PLAIN, Way
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.pruning import measure_id, prune

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
class IdBench(Bench):
    """A model and its data, and the dimensions of the model.

    Attributes:
        known: figures by hash of the masks: a method without data has the same for every seed.
    """

    known: dict[str, Figures] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.subject.source.name

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
class Cell(KeptCell):
    """A method with a seed, on the model of a bench."""

    model: str
    seed: int
    way: Way

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.model}-seed{self.seed}-{self.way.method}.json"

    def run(self, bench: IdBench) -> dict[str, Any]:
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
        return self.keep(bench.out, content)

    def _rows(
        self, bench: IdBench, profile: IdProfile, batches: list[Batch], arm: str
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
