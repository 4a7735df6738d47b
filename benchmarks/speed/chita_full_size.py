"""python -m benchmarks.speed chita-full-size: CHITA on a full-size model within a memory budget.

BLIP base or X-VLM base with random weights, 224 px: what is planned, how long the gradients and the
solver take, and the peak memory of the process. The rows are larger than the budget, so they go to
disk or are gathered in several passes, as `--keep-in` says.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_memory
from benchmarks.results import recorded
from benchmarks.speed.workload import full_size, random_batches
from vlp_plugins.methods.chita.method import chita
from vlp_plugins.methods.method import Context
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.memory import bytes_of, text_of


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """All figures of one run."""
    model = full_size(options.model, device)
    adapter = registry().adapter_for(model)
    batches = random_batches(options.rows, options.batch_size, device)
    weights = WeightMap.of(model, adapter)
    method = chita(lambda_=options.ridge, effort=options.effort, keep_in=options.keep_in)
    budget = bytes_of(options.memory_budget)
    context = Context(
        model, adapter, weights, batches, [options.sparsity], memory_budget=budget, workplace=folder
    )
    cost = method.cost(context)
    print(
        f"{options.model}: {weights.numel:,} prunable weights", *cost.notes, sep="\n  ", flush=True
    )
    ends: list[float] = []

    def tick(done: int, total: int | None) -> None:
        ends.append(time.perf_counter())
        if done % 8 == 0:
            print(f"  batch {done} of {total}: {ends[-1] - begin:.0f} s", flush=True)

    begin = time.perf_counter()
    with peak_memory(device) as meter:
        masks = prune(
            model,
            batches,
            adapter=adapter,
            method=method,
            sparsity=options.sparsity,
            memory_budget=budget,
            workplace=folder,
            progress=tick,
        )
    whole = time.perf_counter() - begin
    gradients = ends[-1] - begin
    return {
        "model": options.model,
        "elements": weights.numel,
        "rows": options.rows,
        "batch_size": options.batch_size,
        "budget_bytes": budget,
        "kept": masks.kept,
        "parameters": masks.manifest.parameters,
        "planned_ram_bytes": cost.ram_bytes,
        "planned_disk_bytes": cost.disk_bytes,
        "peak_bytes": meter.peak,
        "extra_peak_bytes": meter.extra,
        "seconds": whole,
        "seconds_of_gradients": gradients,
        "seconds_of_the_rest": whole - gradients,
    }


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    logging.basicConfig(level=logging.INFO)
    device: torch.device = options.device
    with tempfile.TemporaryDirectory() as folder:
        f = measure(options, device, Path(folder))
    print(f"kept {f['kept']:,}; {f['seconds_of_gradients']:.0f} s of gradients, "
          f"{f['seconds_of_the_rest']:.0f} s of solving")  # fmt: skip
    print(
        f"peak memory {text_of(f['peak_bytes'])}, {text_of(f['extra_peak_bytes'])} above the model"
    )
    planned = (
        f"{text_of(f['planned_ram_bytes'])} in RAM, {text_of(f['planned_disk_bytes'])} on disk"
    )
    print(f"budget of the rows {options.memory_budget}; planned {planned}")
    print(recorded(f"chita_full_size-{device.type}", f, options.out))
