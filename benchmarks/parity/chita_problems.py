"""python -m benchmarks.parity.chita_problems DIR: our solvers on the stored problems of CHITA.

DIR holds `problem.safetensors`, `solutions.json` and `best_known.json`. Every stored case runs at
each effort. `published` gets the block bounds of the case; `fast` and `best` treat the whole
problem whatever the case, because they do not need the block-diagonal approximation, and so share
one run among the cases that differ in it alone. All objectives are F of the full problem, in
float64, of the returned weights.

Exit code 1 if an objective is above the published one by more than 1e-5 of it, or if the number of
kept weights is wrong. `published` with blocks is judged by the block-diagonal objective, which is
what it minimises: F of the full problem can be far away from it, and the float32 errors of the
published weights then move F up or down by chance. Both are printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file

from benchmarks.results import add_record_options, recorded
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.solve import Effort, solve

TOLERANCE = 1e-5
"""Of the published objective, relative."""
TIGHT = 1e-3
"""Cases with a smaller relative gap between magnitude and best known say little about a search."""


_WIDTH = 1 << 14  # columns in work at a time: a part in float64 may not fit


def objective(problem: Problem, values: torch.Tensor) -> float:
    """F of the full problem; one sweep over the rows.

    Args:
        problem: see `Problem`; its blocks play no part.
        values: `[p]`.
    """
    change = values.double() - problem.weights.double()
    moved = change.new_zeros(problem.rows.n)
    linear = change.new_zeros(())
    for first, part in problem.rows.parts():
        for start in range(0, part.shape[1], _WIDTH):
            exact = part[:, start : start + _WIDTH].double()
            columns = slice(first + start, first + start + exact.shape[1])
            moved += exact @ change[columns]
            if problem.first_order:
                linear += (exact @ values[columns].double()).sum()
    moved, linear = problem.rows.add_up(moved), problem.rows.add_up(linear)
    ridge = problem.rows.n * problem.ridge
    quadratic = moved @ moved / 2 + ridge / 2 * (change @ change)
    return float(quadratic + problem.first_order * linear)


@dataclass(frozen=True)
class Run:
    """One effort on one problem; `seconds` and `sweeps` are the solver's alone.

    `block_diagonal` is the objective without the products across blocks, None without blocks.
    """

    objective: float
    block_diagonal: float | None
    kept: int
    seconds: float
    sweeps: int


@dataclass(frozen=True)
class Line:
    """One case at one effort beside what is known about it."""

    case: str
    effort: str
    keep: int
    run: Run
    published: float
    published_block_diagonal: float | None
    magnitude: float
    best_known: float

    @property
    def share(self) -> float:
        """How much of the gap between magnitude and the best known objective is closed."""
        return (self.magnitude - self.run.objective) / (self.magnitude - self.best_known)

    @property
    def wide(self) -> bool:
        """Whether the gap is worth closing."""
        return self.magnitude - self.best_known > TIGHT * abs(self.magnitude)

    @property
    def complaint(self) -> str:
        """What is wrong, empty if nothing is."""
        if self.run.kept != self.keep:
            return f"KEEPS {self.run.kept} OF {self.keep}"
        ours, theirs = self.run.objective, self.published
        if self.run.block_diagonal is not None and self.published_block_diagonal is not None:
            ours, theirs = self.run.block_diagonal, self.published_block_diagonal
        return "" if ours <= theirs + TOLERANCE * abs(theirs) else "ABOVE PUBLISHED"

    @property
    def _remark(self) -> str:
        if self.run.block_diagonal is None:
            return ""
        theirs = self.published_block_diagonal
        return f" (block-diagonal: {self.run.block_diagonal:.6g}, published {theirs:.6g})"

    def __str__(self) -> str:
        figures = (self.run.objective, self.published, self.magnitude, self.best_known)
        numbers = " ".join(f"{figure:12.6g}" for figure in figures)
        return (
            f"{self.case:42} {self.effort:9} {numbers} {100 * self.share:9.2f}% "
            f"{self.run.kept:6} {self.run.seconds:6.2f} {self.complaint or 'ok'}{self._remark}"
        )


class Problems:
    """The stored cases, and our runs on them."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "problem.safetensors")
        stored = json.loads((folder / "solutions.json").read_text())
        best = json.loads((folder / "best_known.json").read_text())["cases"]
        self.cases: list[dict[str, Any]] = stored["cases"]
        self._first_order = float(stored["alpha_scale"])
        self._rows, self._weights = tensors["A"], tensors["w"]
        self._bounds = {
            name: tuple(tensors[name].tolist()) for name in tensors if name.startswith("blocks_")
        }
        self._best = {
            (case["first_order"], case["lambda"], case["sparsity"]): case["objective_best_known"]
            for case in best
        }
        self._runs: dict[Any, Run] = {}

    def lines(self) -> Iterator[Line]:
        """Every case at every effort, as soon as it is done."""
        for case in self.cases:
            for effort in get_args(Effort):
                yield Line(
                    case["key"],
                    effort,
                    case["k"],
                    self._run(case, effort),
                    case["objective"],
                    case.get("objective_block_diagonal"),
                    case["objective_magnitude_refit"],
                    self._best[case["first_order"], case["lambda"], case["sparsity"]],
                )

    def _run(self, case: dict[str, Any], effort: Effort) -> Run:
        block = case["block_size"] if effort == "published" else None
        key = (case["first_order"], case["lambda"], case["k"], block, effort)
        if key not in self._runs:
            bounds = self._bounds[f"blocks_{block}"] if block else None
            self._runs[key] = self._solved(case, effort, bounds)
        return self._runs[key]

    def _solved(self, case: dict[str, Any], effort: Effort, bounds: tuple[int, ...] | None) -> Run:
        rows = MemoryRows(self._rows, bounds)
        first_order = self._first_order if case["first_order"] else 0.0
        problem = Problem(self._weights, rows, case["lambda"], case["k"], first_order, bounds)
        begin = time.perf_counter()
        found = solve(problem, effort)
        seconds, sweeps = time.perf_counter() - begin, rows.sweeps
        outside = int(found.values[~found.support].count_nonzero())
        kept = int(found.support.count_nonzero()) + outside
        diagonal = block_diagonal(problem, found.values) if bounds else None
        return Run(objective(problem, found.values), diagonal, kept, seconds, sweeps)


def block_diagonal(problem: Problem, values: torch.Tensor) -> float:
    """The objective without the products across blocks: the sum of F of every block alone."""
    ((_, matrix),) = problem.rows.parts()
    total = 0.0
    for start, stop in pairwise(problem.bounds or ()):
        rows = MemoryRows(matrix[:, start:stop])
        block = Problem(problem.weights[start:stop], rows, problem.ridge, 0, problem.first_order)
        total += objective(block, values[start:stop])
    return total


def summary(lines: list[Line]) -> dict[str, dict[str, float]]:
    """By effort: the smallest share closed where the gap is wide, seconds and sweeps of a run."""
    figures = {}
    for effort in get_args(Effort):
        runs = [line for line in lines if line.effort == effort]
        distinct = {id(line.run): line.run for line in runs}.values()
        figures[effort] = {
            "smallest_share": min(line.share for line in runs if line.wide and searched(line)),
            "mean_seconds": sum(run.seconds for run in distinct) / len(distinct),
            "most_sweeps": max(run.sweeps for run in distinct),
            "complaints": sum(bool(line.complaint) for line in runs),
        }
    return figures


def searched(line: Line) -> bool:
    """Whether the case is solved on the whole problem: shares of block solutions mean nothing."""
    return line.effort != "published" or not line.case.startswith("block")


def main() -> int:
    """Command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity.chita_problems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of the stored problems")
    add_record_options(parser, "--results")
    args = parser.parse_args()
    print(
        "fast and best solve the whole problem in block cases too: they do without the "
        "approximation; iht cases: ours at the same k against its objective"
    )
    heads = " ".join(f"{head:>12}" for head in ("ours", "published", "magnitude", "best known"))
    print(f"{'case':42} {'effort':9} {heads} {'gap closed':>10} {'kept':>6} {'s':>6}")
    lines = []
    for line in Problems(args.folder).lines():
        print(line, flush=True)
        lines.append(line)
    figures = summary(lines)
    for effort, found in figures.items():
        print(
            f"{effort}: at least {100 * found['smallest_share']:.2f}% of the gap closed where it "
            f"is above {TIGHT:g} of the objective; {found['mean_seconds']:.2f} s and at most "
            f"{found['most_sweeps']} sweeps over the rows; {found['complaints']} complaints"
        )
    record = [{**asdict(line), "share": line.share} for line in lines]
    print(recorded("chita_problems", {"summary": figures, "lines": record}, args.out))
    return int(any(line.complaint for line in lines))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    raise SystemExit(main())
