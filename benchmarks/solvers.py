"""python -m benchmarks.solvers DIR: layer-wise solvers on recorded layers.

For every recorded layer and sparsity the relative error of each solver at the same number of
elements; `optimum` is that of the least squares on ALPS's support. Held-out: the Gram matrix is
that of 6 of the 8 sequences, the error that on the other 2. Times are the best of some rounds in
this process, of one thread. The exit code is 1 if `alps+` is above `alps` anywhere, less than 3%
below it in the median, or takes more than twice its time in all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import add_record_options, recorded

ROUNDS = 3
LEAST_GAIN, MOST_TIME = 0.03, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="has layers/problems.safetensors and the like")
    add_record_options(parser)
    options = parser.parse_args()
    # After --help, which does not wait for torch.
    import torch

    torch.set_num_threads(1)
    rows = measure(options.folder / "layers")
    print(f"{'case':15} {'sparsegpt':>10} {'refit':>9} {'alps':>9} {'optimum':>9} {'alps+':>9}"
          f" {'ratio':>7} {'held-out':>9} {'time':>6}")  # fmt: skip
    for row in rows:
        errors = row["errors"]
        print(
            f"{row['case']:15} {errors['sparsegpt']:10.5f} {errors['refit']:9.5f} "
            f"{errors['alps']:9.5f} {row['optimum']:9.5f} {errors['alps+']:9.5f} "
            f"{row['ratio']:7.3f} {row['held_out']:9.3f} {row['time']:6.2f}"
        )
    ratios, held = ([row[key] for row in rows] for key in ("ratio", "held_out"))
    spent = sum(row["seconds"]["alps+"] for row in rows) / sum(
        row["seconds"]["alps"] for row in rows
    )
    print(f"alps+ / alps: error {median(ratios):.3f} in the median, {max(ratios):.3f} at most; "
          f"held-out {median(held):.3f}, {max(held):.3f}; time {spent:.2f}")  # fmt: skip
    print(recorded("solvers", rows, options.out))
    fine = max(ratios) < 1 and median(ratios) <= 1 - LEAST_GAIN and max(held) <= 1
    return 0 if fine and spent <= MOST_TIME else 1


def measure(folder: Path) -> list[dict[str, Any]]:
    """One row per recorded case.

    Args:
        folder: see `benchmarks.parity.layers.cases`.
    """
    from safetensors.torch import load_file

    from benchmarks.parity.layers import cases, held_out, rule
    from vlp_plugins.methods.reconstruction.alps import Alps, AlpsPlus
    from vlp_plugins.methods.reconstruction.layer import Layer, Refit
    from vlp_plugins.methods.reconstruction.sparsegpt import SparseGpt

    inputs = load_file(folder / "problems.safetensors")
    solvers = {each.name: each for each in (SparseGpt(), Alps(), AlpsPlus(), Refit())}
    rows = []
    for name, sparsity, layer, removed in cases(folder):
        selection = rule(sparsity, layer, removed)
        scores = layer.weight.abs() * layer.gram.diagonal().sqrt()  # Wanda's, for the refit
        errors, seconds, supports = {}, {}, {}
        for method, solver in solvers.items():
            taken = []
            for _ in range(ROUNDS):
                start = time.process_time()
                support, found = solver.solve(layer, scores, [selection])[0]
                taken.append(time.process_time() - start)
            errors[method], seconds[method] = layer.error(found), min(taken)
            supports[method] = support
        # Nearly undamped: what least squares on the support of ALPS could reach.
        best = layer.scaled(1e-9).refitted(
            supports["alps"], layer.weight.double(), tolerance=1e-8, steps=2000
        )
        seen, unseen = held_out(inputs[f"{name}.X"], 6, 8)
        few, others = (Layer(layer.weight, each.T @ each) for each in (seen, unseen))
        outside = {
            method: others.error(solver.solve(few, scores, [selection])[0][1])
            for method, solver in solvers.items()
        }
        rows.append(
            {
                "case": f"{name} {sparsity}",
                "errors": errors,
                "optimum": layer.error(best),
                "ratio": errors["alps+"] / errors["alps"],
                "held_out": outside["alps+"] / outside["alps"],
                "seconds": seconds,
                "time": seconds["alps+"] / seconds["alps"],
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
