"""python -m benchmarks.speed snip: SNIP whole beside the gradients that nobody can avoid.

Full-size models with random weights. Both sides are measured in this process, in turns, and the
best of the rounds counts, because other work on the machine only ever adds time.

- SNIP whole: gradients, their accumulation in float64, scores, masks at three sparsities;
- the floor: forward and backward of the same losses, with gradients for the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.results import recorded
from benchmarks.speed.workload import best_in_turns, full_size, print_costs, random_batches
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune

TARGET = 1.10
SPARSITIES = (0.63, 0.75, 0.9)


def bare_gradients(model: nn.Module, adapter: Adapter, batches: list[Batch]) -> None:
    """Forward and backward of every batch, and nothing else; gradients are thrown away."""
    for batch in batches:
        torch.stack([*adapter.losses(model, batch).values()]).sum().backward()
        model.zero_grad(set_to_none=True)


def measure(
    family: str, device: torch.device, batches: int, size: int, rounds: int
) -> dict[str, Any]:
    """Seconds and extra peak bytes of both sides."""
    model = full_size(family, device)
    adapter = registry().adapter_for(model)
    data: list[Batch] = list(random_batches(batches, size, device))
    weights = WeightMap.of(model, adapter)
    model.requires_grad_(False)
    for weight in weights.values():
        weight.parameter.requires_grad_(True)
    runs: dict[str, Callable[[], Any]] = {
        "gradients": lambda: bare_gradients(model, adapter, data),
        "snip": lambda: prune(model, data, method="snip", adapter=adapter, sparsity=SPARSITIES),
    }
    best = best_in_turns(model, runs, rounds, device)
    seconds = {name: found[0] for name, found in best.items()}
    return {
        "elements": weights.numel,
        "batches": batches,
        "batch_size": size,
        "seconds": seconds,
        "extra_peak_bytes": {name: found[1] for name, found in best.items()},
        "snip_over_gradients": seconds["snip"] / seconds["gradients"],
    }


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    if options.quick:
        options.batches, options.batch_size, options.rounds = 2, 2, 1
    device: torch.device = options.device
    figures = {}
    for family in options.models:
        f = measure(family, device, options.batches, options.batch_size, options.rounds)
        figures[family] = f
        print_costs(family, f, options)
        ratio = f["snip_over_gradients"]
        verdict = "ok" if ratio <= TARGET else "ABOVE"
        print(f"  snip_over_gradients {ratio:.3f}  target {TARGET:g}  {verdict}", flush=True)
    print(recorded(f"snip_speed-{device.type}", figures, options.out))
