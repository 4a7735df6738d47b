"""python -m benchmarks.speed.snip: SNIP whole beside the gradients that nobody can avoid.

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

from benchmarks.results import add_record_options, recorded
from benchmarks.speed.multiflow import full_size, random_batches, timed
from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.plugins import registry
from vlp_plugins.pruning import prune
from vlp_plugins.weights import WeightMap

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
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(timed(model, run, device))
    seconds = {name: min(s for s, _ in found) for name, found in samples.items()}
    return {
        "elements": weights.numel,
        "batches": batches,
        "batch_size": size,
        "seconds": seconds,
        "extra_peak_bytes": {name: max(b for _, b in found) for name, found in samples.items()},
        "snip_over_gradients": seconds["snip"] / seconds["gradients"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["blip", "xvlm"], choices=["blip", "xvlm"])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two batches of two, one round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_record_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.batches, options.batch_size, options.rounds = 2, 2, 1
    device = torch.device(options.device)
    figures = {}
    for family in options.models:
        f = measure(family, device, options.batches, options.batch_size, options.rounds)
        figures[family] = f
        print(f"{family}: {f['elements']:,} prunable weights, {options.batches} batches of "
              f"{options.batch_size}, best of {options.rounds}, {device}")  # fmt: skip
        for name, seconds in f["seconds"].items():
            extra = f["extra_peak_bytes"][name] / 1e6
            print(f"  {name:12} {seconds:8.2f} s   extra peak {extra:8.0f} MB")
        ratio = f["snip_over_gradients"]
        verdict = "ok" if ratio <= TARGET else "ABOVE"
        print(f"  snip_over_gradients {ratio:.3f}  target {TARGET:g}  {verdict}", flush=True)
    print(recorded(f"snip_speed-{device.type}", figures, options.out))


if __name__ == "__main__":
    main()
