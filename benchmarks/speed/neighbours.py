"""python -m benchmarks.speed neighbours: the search for neighbours beside bare matrix products.

Points of dimension 20 in a space as large as the outputs of a layer. A search counts as 2 n^2 D
floating-point operations, the product of all pairs; its rate is set beside that of float32 matrix
products in this process, the better of the same product and of square ones. They run in turns, and
every time is the best of the rounds, because other work on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.results import recorded
from benchmarks.speed.workload import seconds
from vlp_plugins.dimension.neighbours import nearest_in_blocks

TARGET = 0.5
SQUARE = 2048
DIMENSION = 20


def neighbour_rate(
    n: int, coordinates: int, device: torch.device, rounds: int = 5, dtype: str = "float32"
) -> dict[str, Any]:
    """Rates of one size, and their share; operations per second."""
    points = curved(n, coordinates, device)
    stored = points.to(getattr(torch, dtype))
    square = torch.randn(SQUARE, SQUARE, device=device)
    everything = torch.arange(n, device=device).unsqueeze(0)
    operations = 2 * n**2 * coordinates
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "search": (operations, lambda: nearest_in_blocks(stored, [everything])),
        "same product": (operations, lambda: points @ points.T),
        "square product": (2 * SQUARE**3, lambda: square @ square),
    }
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds + 1):  # the first warms up
        for name, (_, run) in runs.items():
            best[name] = min(best[name], seconds(run, device))
    rates = {name: count / best[name] for name, (count, _) in runs.items()}
    sgemm = max(rates["same product"], rates["square product"])
    return {
        "n": n,
        "coordinates": coordinates,
        "dtype": dtype,
        "seconds": best["search"],
        "rate": rates["search"],
        "sgemm": sgemm,
        "share": rates["search"] / sgemm,
    }


def curved(n: int, coordinates: int, device: torch.device) -> torch.Tensor:
    """Points `[n, coordinates]` on a curved manifold of 20 dimensions."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = torch.tanh(normal(n, DIMENSION) @ normal(DIMENSION, 64) / DIMENSION**0.5)
    return hidden @ normal(64, coordinates)


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    device: torch.device = options.device
    print(f"{device}, {torch.get_num_threads()} threads, best of {options.rounds}")
    print(f"{'n':>5} {'D':>8} {'stored as':9} {'seconds':>8} {'GFLOP/s':>8} {'sgemm':>7} share")
    figures = []
    for n, coordinates in options.sizes:
        for dtype in options.dtypes:
            figures.append(f := neighbour_rate(n, coordinates, device, options.rounds, dtype))
            verdict = "ok" if f["share"] >= TARGET else f"BELOW {TARGET:.0%}"
            print(f"{n:5} {coordinates:8,} {dtype:9} {f['seconds']:8.3f} {f['rate'] / 1e9:8.0f} "
                  f"{f['sgemm'] / 1e9:7.0f} {f['share']:5.0%}  {verdict}")  # fmt: skip
    print(recorded(f"id-neighbours-{device.type}", figures, options.out))
