"""python -m benchmarks.speed multiflow: what pruning costs beside the work that nobody can avoid.

Full-size models with random weights. Every ratio has both sides measured in this process, in
turns, and takes the best of the rounds, because other work on the machine only ever adds time.

- MULTIFLOW whole (data pass, scores, masks) over the bare forward passes of the same batches;
- extra peak memory over that of the bare forward;
- magnitude and LAMP whole over one `torch.kthvalue` of as many elements.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.results import recorded
from benchmarks.speed.workload import (
    bare_forward,
    best_in_turns,
    full_size,
    print_costs,
    random_batches,
)
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune


def measure(
    family: str, device: torch.device, batches: int, size: int, rounds: int
) -> dict[str, Any]:
    """All figures of one model."""
    model = full_size(family, device)
    adapter = registry().adapter_for(model)
    data: list[Batch] = list(random_batches(batches, size, device))
    elements = WeightMap.of(model, adapter).numel
    scores = torch.rand(elements, device=device)
    runs: dict[str, Callable[[], Any]] = {
        "kthvalue": lambda: torch.kthvalue(scores, int(0.75 * elements)),
        "magnitude": lambda: prune(model, method="omp", adapter=adapter, sparsity=0.75),
        "lamp": lambda: prune(model, method="lamp", adapter=adapter, sparsity=0.75),
    }
    best = best_in_turns(model, runs, rounds, device)
    runs.clear()  # and with it the scores
    scores = torch.empty(0)
    three = (0.63, 0.75, 0.9)
    passes = best_in_turns(
        model,
        {
            "forward": lambda: bare_forward(model, adapter, data),
            "multiflow": lambda: prune(model, data, adapter=adapter, sparsity=0.75),
            "multiflow_3": lambda: prune(model, data, adapter=adapter, sparsity=three),
        },
        rounds,
        device,
    )
    best |= passes
    seconds = {name: value[0] for name, value in best.items()}
    extra = {name: value[1] for name, value in best.items()}
    return {
        "elements": elements,
        "batches": batches,
        "batch_size": size,
        "seconds": seconds,
        "extra_peak_bytes": extra,
        "multiflow_over_forward": seconds["multiflow"] / seconds["forward"],
        "multiflow_3_over_forward": seconds["multiflow_3"] / seconds["forward"],
        "multiflow_extra_bytes_over_forward": extra["multiflow"] - extra["forward"],
        "magnitude_over_kthvalue": seconds["magnitude"] / seconds["kthvalue"],
        "lamp_over_kthvalue": seconds["lamp"] / seconds["kthvalue"],
    }


TARGETS = {
    "multiflow_over_forward": 1.10,
    "magnitude_over_kthvalue": 0.5,
    "lamp_over_kthvalue": 2.0,
    "multiflow_extra_bytes_over_forward": 1e9,
}


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    device: torch.device = options.device
    figures = {}
    for family in options.models:
        f = measure(family, device, options.batches, options.batch_size, options.rounds)
        figures[family] = f
        print_costs(family, f, options)
        for name, target in TARGETS.items():
            verdict = "ok" if f[name] <= target else "ABOVE"
            print(f"  {name:36} {f[name]:12.4g}  target {target:g}  {verdict}")
        print(f"  {'multiflow_3_over_forward':36} {f['multiflow_3_over_forward']:12.4g}")
    print(recorded(f"speed-{device.type}", figures, options.out))
