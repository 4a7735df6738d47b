"""What the cells say together: means over seeds, and where dimensions help beyond the spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from benchmarks.papers.id_gain.ways import ARMS, PLAIN

LEAST_GAIN = 0.5
"""Points of R@1 below which nothing is called a gain or a loss: few test pairs decide them."""
LEVEL = 0.05
"""Of the test of a gain; of 84 gains that are none about four are below it."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Gain:
    """What an arm brings a method over its plain arm, in points of R@1, mean of both ways.

    Attributes:
        mean: over seeds, each compared with the same seed.
        spread: standard deviation over seeds; None for a single one.
        seeds: how many.
    """

    mean: float
    spread: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `equal`: the last unless the gain is beyond its spread."""
        if abs(self.mean) <= max(LEAST_GAIN, self.spread or 0.0):
            return "equal"
        return "helps" if self.mean > 0 else "hurts"

    @property
    def significant(self) -> bool:
        """Whether a paired t-test says p < `LEVEL`, of a gain that is more than a few pairs."""
        if abs(self.mean) <= LEAST_GAIN or self.spread is None:
            return False
        error = self.spread / sqrt(self.seeds)
        return error == 0 or bool(2 * t.sf(abs(self.mean) / error, self.seeds - 1) < LEVEL)


def flat(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of all cells with their model, seed and method."""
    return [
        {"model": cell["model"], "seed": cell["seed"], "method": cell["method"], **row}
        for cell in cells
        for row in cell["rows"]
    ]


def recall(row: Row) -> float:
    """Mean of the two R@1."""
    return (row["image_to_text"] + row["text_to_image"]) / 2


def gain(rows: Sequence[Row], arm: str) -> Gain:
    """Of an arm over the plain one.

    Args:
        rows: of one model, method and sparsity.
        arm: which.
    """
    plain = {row["seed"]: recall(row) for row in rows if row["arm"] == PLAIN}
    gains = [recall(row) - plain[row["seed"]] for row in rows if row["arm"] == arm]
    return Gain(fmean(gains), stdev(gains) if len(gains) > 1 else None, len(gains))


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Rows by model, sparsity and method, in the order of their first appearance."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["sparsity"])):
        groups.setdefault((row["model"], row["sparsity"], row["method"]), []).append(row)
    return groups


def table(rows: Sequence[Row]) -> list[str]:
    """A line per model, sparsity and method: figures of each arm and the gains."""
    lines = [
        f"{'':5} {'':4} {'method':16} "
        + " ".join(f"{arm:^26}" for arm in ARMS)
        + "  gain of either"
    ]
    for (model, sparsity, method), some in grouped(rows).items():
        figures = " ".join(
            f"{_figures([row for row in some if row['arm'] == arm]):26}" for arm in ARMS
        )
        gains = ", ".join(_gain_text(gain(some, arm)) for arm in ARMS[1:])
        lines.append(f"{model:5} {sparsity:4.0%} {method:16} {figures}  {gains}")
    return lines


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line per model and sparsity: in how many methods dimensions help beyond the spread."""
    by_model: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for (model, sparsity, method), some in grouped(rows).items():
        by_model.setdefault((model, sparsity), {})[method] = some
    lines = []
    for (model, sparsity), methods in by_model.items():
        parts = []
        for arm in ARMS[1:]:
            found = {method: gain(some, arm).verdict for method, some in methods.items()}
            named = {
                verdict: [method for method, its in found.items() if its == verdict]
                for verdict in ("helps", "hurts")
            }
            parts.append(
                f"{arm} helps {len(named['helps'])} of {len(found)}{_listed(named['helps'])}, "
                f"hurts {len(named['hurts'])}{_listed(named['hurts'])}"
            )
        lines.append(f"{model} at {sparsity:.0%}, beyond the spread over seeds: {'; '.join(parts)}")
    return lines


def significant_gains(rows: Sequence[Row]) -> list[str]:
    """A line per arm: in how many of all cases a test finds that it helps or hurts, in which."""
    groups = grouped(rows)
    lines = []
    for arm in ARMS[1:]:
        found = {case: gain(some, arm) for case, some in groups.items()}
        parts = []
        for word, sign in (("helps", 1), ("hurts", -1)):
            methods = [
                method
                for (_, _, method), its in found.items()
                if its.significant and sign * its.mean > 0
            ]
            parts.append(f"{word} {len(methods)}{_listed([*dict.fromkeys(methods)])}")
        lines.append(
            f"{arm}, of {len(found)} cases beyond {LEAST_GAIN:g} points and p < {LEVEL:g} "
            f"(t-test paired by seed, not corrected for the number of tests): {', '.join(parts)}"
        )
    return lines


def _figures(rows: Sequence[Row]) -> str:
    parts = [_mean_text([row[key] for row in rows]) for key in ("image_to_text", "text_to_image")]
    text = "/".join(parts)
    if rows[0]["captions"] is not None:
        text += f", {_mean_text([row['captions'] for row in rows])}"
    return text


def _mean_text(values: Sequence[float]) -> str:
    spread = f"±{stdev(values):.0f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def _gain_text(found: Gain) -> str:
    spread = "" if found.spread is None else f"±{found.spread:.1f}"
    return f"{found.mean:+.1f}{spread} {found.verdict}"


def _listed(methods: Sequence[str]) -> str:
    return f" ({', '.join(methods)})" if methods else ""
