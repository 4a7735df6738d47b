"""python -m benchmarks.speed chita: what solving CHITA's problem costs beside its arithmetic.

Synthetic rows, blocks of 10 000, a quarter of the weights kept. The floor is what nobody avoids:

- the Gram products n x k_b x n and the solves of the kept columns, at the rate of matrix products
  of these shapes;
- the passes over the rows that the method needs (its sweeps), at the rate of reading these rows.

Both rates are measured in this process, in turns with the solver, with as many threads; every time
is the best of the rounds, because other work on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import torch

from benchmarks.results import recorded
from benchmarks.speed.workload import seconds
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.solve import solve
from vlp_plugins.runtime.parallel import over_tensors

BLOCK = 10_000
DENSITY = 0.25
TARGET = 1.5
LENGTH = 10.0
"""Of a row, as of a gradient: with the ridge it decides how exact products have to be."""


def measure(
    n: int, p: int, first_order: float, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """All figures of one size."""
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(n, p, generator=generator, device=device).mul_(LENGTH / p**0.5)
    weights = torch.randn(p, generator=generator, device=device)
    bounds = (*range(0, p, BLOCK), p)
    rows = MemoryRows(matrix, bounds)
    problem = Problem(weights, rows, options.ridge, int(DENSITY * p), first_order, bounds)
    packed = torch.randn(n, int(DENSITY * min(BLOCK, p)), generator=generator, device=device)

    def multiply(_: tuple[int, int]) -> None:
        torch.mm(packed, packed.T)

    def read(block: tuple[int, int]) -> None:
        matrix[:, slice(*block)].sum()

    blocks = list(pairwise(bounds))
    runs: dict[str, Callable[[], object]] = {
        "solve": lambda: solve(problem, options.effort),
        "products": lambda: over_tensors(multiply, blocks, device),
        "read": lambda: over_tensors(read, blocks, device),
    }
    seconds(runs["solve"], device)  # the first call loads libraries
    sweeps = rows.sweeps
    best = dict.fromkeys(runs, math.inf)
    for _ in range(options.rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, device))
    floor = best["products"] * (1 + share_of_solves(n, p)) + sweeps * best["read"]
    return {
        "n": n,
        "p": p,
        "first_order": first_order,
        "sweeps": sweeps,
        "seconds": best,
        "gflops": 2 * n**2 * packed.shape[1] * len(blocks) / best["products"] / 1e9,
        "gigabytes_per_second": 4 * n * p / best["read"] / 1e9,
        "floor": floor,
        "over_floor": best["solve"] / floor,
    }


def share_of_solves(n: int, p: int) -> float:
    """Arithmetic of the factorisations and of A_S'u, in units of that of the Gram products."""
    blocks, kept = -(-p // BLOCK), DENSITY * p
    return (blocks * (n**3 / 3 + 2 * n**2) + 2 * n * kept) / (2 * n**2 * kept)


def growth(figures: list[dict[str, Any]], along: str, fixed: str) -> list[str]:
    """How the time of a solve grows with one size, from each measured value to the next."""
    lines = []
    groups = {(f["first_order"], f[fixed]): f for f in figures}
    for c, value in groups:
        same = [f for f in figures if (f["first_order"], f[fixed]) == (c, value)]
        for one, other in pairwise(sorted(same, key=lambda f: int(f[along]))):
            times = other["seconds"]["solve"] / one["seconds"]["solve"]
            exponent = math.log(times) / math.log(other[along] / one[along])
            lines.append(
                f"{fixed} = {value:,}, c = {c:g}: {along} from {one[along]:,} to {other[along]:,} "
                f"takes {times:.2f} times as long ({along}^{exponent:.2f})"
            )
    return lines


def run(options: argparse.Namespace) -> None:
    """Measures, prints and records."""
    device: torch.device = options.device
    print(f"effort {options.effort}, lambda {options.ridge:g}, blocks of {BLOCK:,}, "
          f"{DENSITY:.0%} kept, {device}, {torch.get_num_threads()} threads, "
          f"best of {options.rounds}")  # fmt: skip
    print(f"{'n':>4} {'p':>9} {'c':>5} {'sweeps':>6} {'solve s':>8} {'products':>8} {'read':>7} "
          f"{'floor':>7} {'over':>6}  GFLOP/s  GB/s")  # fmt: skip
    figures, skipped = [], []
    for n, p, c in product(options.n, map(int, options.p), options.first_order):
        if 4e-9 * n * p > options.memory:
            skipped.append({"n": n, "p": p, "gigabytes": 4e-9 * n * p})
            print(f"{n:4} {p:9,} {c:5g} skipped: {4e-9 * n * p:.1f} GB of rows exceed --memory")
            continue
        figures.append(f := measure(n, p, c, options, device))
        s = f["seconds"]
        verdict = ""
        if c == 0 and options.effort == "published":
            verdict = "ok" if f["over_floor"] <= TARGET else f"ABOVE {TARGET}"
        print(f"{n:4} {p:9,} {c:5g} {f['sweeps']:6} {s['solve']:8.3f} {s['products']:8.3f} "
              f"{s['read']:7.3f} {f['floor']:7.3f} {f['over_floor']:6.2f}  {f['gflops']:7.0f} "
              f"{f['gigabytes_per_second']:5.1f}  {verdict}")  # fmt: skip
    for line in (*growth(figures, "p", "n"), *growth(figures, "n", "p")):
        print(line)
    suffix = "" if options.effort == "published" else f"-{options.effort}"
    record = {"effort": options.effort, "ridge": options.ridge, "sizes": figures}
    name = f"chita-speed-{device.type}{suffix}"
    print(recorded(name, record | {"skipped": skipped}, options.out))
