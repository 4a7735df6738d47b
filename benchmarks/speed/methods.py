"""python -m benchmarks.speed methods: methods without gradients, next to MULTIFLOW.

The two small models and calibration batches of the demo; three sparsities in one run each. CPU time
of one thread, so that other work on the machine counts little; the best of some rounds, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import vlp_plugins as vlp
from benchmarks.demo import MODELS, SPARSITIES
from benchmarks.demo.build_data import build
from benchmarks.results import recorded

BASE = "multiflow"


def measure(family: str, data: Path, methods: list[str], rounds: int) -> dict[str, Any]:
    """CPU seconds of each method, and over those of MULTIFLOW."""
    model = vlp.load(str(MODELS / family), device="cpu")
    batches = list(vlp.batches(data, model, batch_size=32))
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        for method in dict.fromkeys([BASE, *methods]):
            start = time.process_time()
            vlp.prune(model, batches, method=method, sparsity=list(SPARSITIES))
            taken = time.process_time() - start
            seconds[method] = min(taken, seconds.get(method, taken))
    return {
        "batches": len(batches),
        "seconds": seconds,
        "over_multiflow": {name: each / seconds[BASE] for name, each in seconds.items()},
    }


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    torch.set_num_threads(1)
    figures = {}
    with tempfile.TemporaryDirectory() as place:
        build(Path(place), calibration=options.pairs, downstream=0, test=0)
        for family in options.models:
            f = measure(family, Path(place) / "calibration", options.methods, options.rounds)
            figures[family] = f
            print(f"{family}: {f['batches']} batches of 32")
            for name, seconds in f["seconds"].items():
                print(
                    f"  {name:12} {seconds:8.2f} s   {f['over_multiflow'][name]:6.2f}", flush=True
                )
    print(recorded("methods_speed", figures, options.out))
