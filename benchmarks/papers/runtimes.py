"""How long a data-driven method takes beside MULTIFLOW, at full size, in one process.

Every method has a process of its own, which measures MULTIFLOW right before and right after it: the
ratio is that of the method to the mean of the two. So both sides saw the same machine within the
same minutes, and what is measured can stop after any method and go on later.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.memory import peak_memory
from benchmarks.papers import kept
from benchmarks.papers.stopwatch import Others, TimedBatches
from benchmarks.papers.ways import LAMBDA
from benchmarks.results import machine
from benchmarks.speed.workload import full_size, random_batches
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.files import write_text

BATCHES = 12
PAIRS = 4  # of a batch
SPARSITY = 0.75
BUDGET = "8GiB"
"""Of gradients: the 12 rows of CHITA go to disk, the 3 of a round of CHITA++ stay in memory."""
THREADS = os.cpu_count() or 1

METHODS: Mapping[str, Mapping[str, Any]] = {
    "multiflow": {},
    "snip": {},
    "itersnip": {"rounds": 4, "batches_per_round": 3},
    "chita": {"lambda": LAMBDA, "rows": BATCHES},
    "chita++": {"lambda": LAMBDA, "rounds": 4, "rows": 3},
}
"""Parameters by name; all methods read as many batches."""

Build = Callable[[str], tuple[nn.Module, list[Batch]]]


def full_size_problem(model: str) -> tuple[nn.Module, list[Batch]]:
    """A model of published size with random weights, and noise for data: time is the same."""
    device = torch.device("cpu")
    return full_size(model, device), list(random_batches(BATCHES, PAIRS, device))


@dataclass(frozen=True)
class Measurement:
    """Of one method, once.

    Attributes:
        masks: what it found.
        seconds: whole.
        data: seconds of them in batches.
        peak: bytes of the process.
        extra: bytes of them above those at the start.
    """

    masks: Masks
    seconds: float
    data: float
    peak: int
    extra: int

    def figures(self) -> dict[str, Any]:
        """As JSON keeps them; `rest` is scores, thresholds, masks, or the solver."""
        return {
            "seconds": round(self.seconds, 3),
            "data": round(self.data, 3),
            "rest": round(self.seconds - self.data, 3),
            "peak_bytes": self.peak,
            "extra_peak_bytes": self.extra,
        }


def measured(model: nn.Module, batches: Sequence[Batch], method: str) -> Measurement:
    """Prunes once; masks are made and thrown away, the model stays as it is."""
    adapter = registry().adapter_for(model)
    timed = TimedBatches(batches)
    gc.collect()
    with peak_memory(interval=0.02) as meter:
        begin = time.perf_counter()
        masks = prune(
            model,
            timed,
            adapter=adapter,
            method=method,
            sparsity=SPARSITY,
            memory_budget=BUDGET,
            progress=timed.done,
            **METHODS[method],
        )
        seconds = time.perf_counter() - begin
    return Measurement(masks, seconds, timed.seconds, meter.peak, meter.extra)


@dataclass(frozen=True)
class Runtime:
    """A method on a model.

    Attributes:
        model: `blip` or `xvlm`.
        method: a key of `METHODS`.
    """

    model: str
    method: str

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.model}-base/runtime/{self.method}"

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.name}.json"

    def identity(self) -> dict[str, Any]:
        """What decides its figures, but for the machine."""
        return {
            "model": self.model,
            "method": self.method,
            "parameters": dict(METHODS[self.method]),
            "sparsity": SPARSITY,
            "dtype": "float32",
            "batches": BATCHES,
            "batch_size": PAIRS,
            "pixels": 224,
            "memory_budget": BUDGET,
        }

    def content(self, out: Path) -> dict[str, Any] | None:
        """What its file says; None if there is none.

        Raises:
            OutputError: if the file was made with other settings, or is no JSON.
        """
        return kept.read(self.path(out), self.identity())

    def run(self, out: Path, build: Build = full_size_problem) -> None:
        """Measures, and writes the file whole or not at all."""
        torch.set_num_threads(THREADS)
        model, batches = build(self.model)
        measured(model, batches[:1], "multiflow")  # the first pass of a process is slow
        others = Others()
        before, own, after = (
            measured(model, batches, method) for method in ("multiflow", self.method, "multiflow")
        )
        found = own.masks.manifest.parameters
        content = {
            **self.identity(),
            "machine": machine(),
            "others": others.cores(),
            "elements": own.masks.total,
            "kept": own.masks.kept,
            "rows_kept_in": found.get("rows_kept_in"),
            "effort": found.get("effort"),
            "multiflow": [before.figures(), after.figures()],
            "measured": own.figures(),
            "ratio": round(2 * own.seconds / (before.seconds + after.seconds), 3),
        }
        write_text(self.path(out), json.dumps(content, indent=1) + "\n", overwrite=True)
