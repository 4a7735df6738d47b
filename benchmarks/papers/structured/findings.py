"""What the cells say together: means over seeds, and which importance is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.papers.structured.ways import DENSE, RANDOM

Content = dict[str, Any]
Row = dict[str, Any]
STAGES = ("cut", "tuned")


def recall(figures: dict[str, float]) -> float:
    """Mean of the two R@1."""
    return (figures["image_to_text"] + figures["text_to_image"]) / 2


def rows_of(cells: Sequence[Content]) -> list[Row]:
    """A row per model, ratio and importance: mean and spread over seeds, before and after tuning.

    Returns:
        In the order of models, ratios and importances; `spread` is None for a single seed.
    """
    groups: dict[tuple[str, float, str], list[Content]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["model"], cell["ratio"])):
        groups.setdefault((cell["model"], cell["ratio"], cell["importance"]), []).append(cell)
    return [
        {
            "model": model,
            "ratio": ratio,
            "importance": importance,
            "seeds": len(some),
            "left": round(some[0]["parameters"][1] / some[0]["parameters"][0], 3),
            **{stage: _summary([recall(cell[stage]) for cell in some]) for stage in STAGES},
        }
        for (model, ratio, importance), some in groups.items()
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """A line per row."""
    lines = [f"{'model':5} {'cut':>4} {'importance':19} {'left':>5} {'R@1 cut':>12} {'tuned':>12}"]
    return lines + [
        f"{row['model']:5} {row['ratio']:>4.0%} {row['importance']:19} {row['left']:>5.0%} "
        f"{_text(row['cut']):>12} {_text(row['tuned']):>12}"
        for row in rows
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line per model and ratio: the order of the importances after tuning."""
    lines = []
    for model, ratio in dict.fromkeys((row["model"], row["ratio"]) for row in rows):
        some = [
            row
            for row in rows
            if (row["model"], row["ratio"]) == (model, ratio) and row["importance"] != DENSE
        ]
        order = sorted(some, key=lambda row: -row["tuned"]["mean"])
        named = ", ".join(f"{row['importance']} {row['tuned']['mean']:.1f}" for row in order)
        if order:
            lines.append(f"{model} at {ratio:.0%} after tuning: {named}")
    return lines


def worse_than_random(rows: Sequence[Row]) -> list[str]:
    """Importances that are below random cutting after tuning, which should not be."""
    floor = {
        (row["model"], row["ratio"]): row["tuned"]["mean"]
        for row in rows
        if row["importance"] == RANDOM
    }
    return [
        f"{row['importance']} on {row['model']} at {row['ratio']:.0%}"
        for row in rows
        if row["tuned"]["mean"] < floor.get((row["model"], row["ratio"]), 0.0)
    ]


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    # Digits enough that rounding once more, to print one of them, changes nothing.
    spread = round(stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(fmean(values), 4), "spread": spread}


def _text(summary: dict[str, float | None]) -> str:
    spread = "" if summary["spread"] is None else f" ±{summary['spread']:.1f}"
    return f"{summary['mean']:.1f}{spread}"
