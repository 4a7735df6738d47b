"""Methods compared at equal sparsity: scores with their errors, and which can be told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.jobs.facts import SPEED, size_tile
from vlp_plugins.jobs.metrics import TaskMetrics, shown, title_of
from vlp_plugins.jobs.preparation import Loaded
from vlp_plugins.masks.masks import Masks
from vlp_plugins.report.drawing import Axis, Chart, line_chart
from vlp_plugins.report.layers import csv_text
from vlp_plugins.report.page import Page, Section, Step, Table, Tile, span
from vlp_plugins.runtime.numbers import count, percent

DENSE = "dense"
_Z = 1.96
"""Standard errors that a difference must exceed: 95% confidence, if errors are normal."""


@dataclass(frozen=True)
class Score:
    """A figure with its standard error.

    Attributes:
        value: the mean of `runs`.
        error: its standard error over test samples and, if there are several, over runs; NaN of a
            single sample.
        runs: float64 `[runs, samples]`; row i was pruned with calibration samples i.
    """

    value: float
    error: float
    runs: torch.Tensor

    @classmethod
    def of(cls, runs: torch.Tensor) -> Score:
        """The score of values by run and sample."""
        samples = runs.mean(dim=0)
        variance = float(samples.var() / len(samples)) if len(samples) > 1 else math.nan
        if len(runs) > 1:
            variance += float(runs.mean(dim=1).var() / len(runs))
        return cls(float(samples.mean()), math.sqrt(variance), runs)

    def minus(self, other: Score) -> Score:
        """The difference, sample by sample: its error is smaller than that of either score."""
        return Score.of(self.runs - other.runs)

    def differs_from(self, other: Score) -> bool:
        """Whether chance alone would hardly explain the difference."""
        if not (math.isfinite(self.value) and math.isfinite(other.value)):
            return math.isfinite(self.value) != math.isfinite(other.value)
        difference = self.minus(other)
        return abs(difference.value) > _Z * difference.error


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity with one set of calibration samples, measured.

    Attributes:
        sparsity: what was asked for, as text (`0.75`).
        seed: of the calibration samples and of random scores.
        pruning_seconds: of the method at all sparsities, without the pass over the data that
            several methods share.
    """

    method: str
    sparsity: str
    seed: int
    measured: TaskMetrics
    removed: int
    total: int
    by_modality: Mapping[str, float]
    pruning_seconds: float
    measuring_seconds: float
    masks: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells cells apart."""
        return self.method, self.sparsity, self.seed


@dataclass(frozen=True)
class Verdict:
    """The best method at one sparsity, and those that cannot be told apart from it."""

    sparsity: str
    best: str
    as_good: tuple[str, ...]

    def of(self, method: str) -> str:
        """`best`, `as good` or nothing."""
        if method == self.best:
            return "best"
        return "as good" if method in self.as_good else ""


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        score: the metrics whose mean ranks the methods.
        cells: in order of sparsity, method and seed.
    """

    task: str
    score: tuple[str, ...]
    lower_is_better: bool
    model_elements: int
    dense: TaskMetrics
    cells: tuple[Cell, ...]
    left_out: Mapping[str, str]

    @property
    def sparsities(self) -> list[str]:
        """As text, in order."""
        return list(dict.fromkeys(cell.sparsity for cell in self.cells))

    @property
    def score_title(self) -> str:
        """What the methods are ranked by."""
        if self.task == "retrieval":
            return "mean R@1"
        return title_of(self.score[0])

    def of(self, sparsity: str, method: str) -> list[Cell]:
        """The cells of one method at one sparsity, by seed."""
        return [c for c in self.cells if (c.sparsity, c.method) == (sparsity, method)]

    def methods(self, sparsity: str) -> list[str]:
        """The methods that were measured at a sparsity, in order."""
        return list(dict.fromkeys(c.method for c in self.cells if c.sparsity == sparsity))

    def score_of(self, measured: Sequence[TaskMetrics]) -> Score:
        """The score of runs that were measured on the same samples."""
        values = [[each.by_sample[name] for name in self.score] for each in measured]
        return Score.of(torch.tensor(values, dtype=torch.float64, device="cpu").mean(dim=1))

    @cached_property
    def scores(self) -> Mapping[tuple[str, str], Score]:
        """By sparsity and method."""
        return {
            (sparsity, method): self.score_of([c.measured for c in self.of(sparsity, method)])
            for sparsity in self.sparsities
            for method in self.methods(sparsity)
        }

    def verdict(self, sparsity: str) -> Verdict:
        """Which method is the best at a sparsity, and which are as good as far as one can tell."""
        scores = {method: self.scores[sparsity, method] for method in self.methods(sparsity)}

        def rank(method: str) -> float:
            value = scores[method].value
            if not math.isfinite(value):
                return -math.inf
            return -value if self.lower_is_better else value

        best = max(scores, key=rank)
        others = (method for method in sorted(scores, key=rank, reverse=True) if method != best)
        as_good = [m for m in others if not scores[m].differs_from(scores[best])]
        return Verdict(sparsity, best, tuple(as_good))

    @property
    def verdicts(self) -> list[Verdict]:
        """One per sparsity."""
        return [self.verdict(sparsity) for sparsity in self.sparsities]

    def winner(self, sparsity: str) -> Cell:
        """The first cell of the best method at a sparsity."""
        return self.of(sparsity, self.verdict(sparsity).best)[0]


def titled(sparsity: str) -> str:
    """`0.75` as `75%`; budgets by modality stay as they are."""
    try:
        return f"{100 * float(sparsity):.4g}%"
    except ValueError:
        return sparsity


def scored(score: Score, task: str) -> str:
    """A score with its error, with as many digits as the task's figures have."""
    if not math.isfinite(score.value):
        return _digits(score.value, task)
    error = "?" if math.isnan(score.error) else _digits(score.error, task)
    return f"{_digits(score.value, task)} ± {error}"


_SHORT = {"image_to_text_r1": "image->text", "text_to_image_r1": "text->image"}


def comparison_table(found: Comparison) -> Table:
    """One row per sparsity and method, the dense model first; at most 80 columns wide."""
    parts = found.score if len(found.score) > 1 else ()
    header = ["sparsity", "method", *(_SHORT.get(n, title_of(n)) for n in parts)]
    header += [found.score_title, "verdict"]
    dense = scored(found.score_of([found.dense]), found.task)
    rows = [["", DENSE, *(f"{found.dense.metrics[name]:.1f}" for name in parts), dense, ""]]
    for verdict in found.verdicts:
        title = titled(verdict.sparsity)
        for method in found.methods(verdict.sparsity):
            cells = found.of(verdict.sparsity, method)
            means = (sum(c.measured.metrics[name] for c in cells) / len(cells) for name in parts)
            score = scored(found.scores[verdict.sparsity, method], found.task)
            row = [title, method, *(f"{mean:.1f}" for mean in means), score, verdict.of(method)]
            rows.append(row)
            title = ""
    width = max(len(row[-2]) for row in (header, *rows))
    header, *rows = ([*row[:-2], row[-2].rjust(width), row[-1]] for row in (header, *rows))
    unit = {"retrieval": "R@1 in percent", "loss": "pre-training loss, lower is better"}
    title = unit.get(found.task, found.score_title)
    return Table(f"{found.task}: {title}", header, rows, _NOTE)


_NOTE = (
    "± is one standard error. A method is as good as the best one if chance alone may explain the "
    "difference (95% confidence), compared sample by sample."
)


def sentences(found: Comparison) -> list[str]:
    """The answer at every sparsity, and what its noise is."""
    texts = []
    dense = found.score_of([found.dense])
    for verdict in found.verdicts:
        best, title = found.scores[verdict.sparsity, verdict.best], titled(verdict.sparsity)
        if not math.isfinite(best.value):
            texts.append(f"At {title} no method has a finite {found.score_title}.")
            continue
        text = (
            f"At {title} {verdict.best} has the best {found.score_title}: "
            f"{scored(best, found.task)}; the dense model has {scored(dense, found.task)}"
        )
        if not best.differs_from(dense):
            text += ": the difference may be chance"
        elif not found.lower_is_better and best.value < dense.value / 2:
            text += ": more than half is lost, so remove less, or fine-tune"
        if verdict.as_good:
            text += f". {_listed(verdict.as_good)} cannot be told apart from it with this data"
        elif runner_up := _runner_up(found, verdict):
            text += f". Next is {runner_up[0]}, {scored(runner_up[1], found.task)} worse"
        texts.append(f"{text}.")
    runs, samples = next(iter(found.scores.values())).runs.shape
    unit = "batches" if found.task == "loss" else "test samples"
    noise = f"± is one standard error over {samples:,} {unit}"
    if runs > 1:
        noise += f" and {runs} sets of calibration samples."
    else:
        noise += ". What other calibration samples would change is not in it: --seeds 3 adds that."
    return [*texts, noise]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _runner_up(found: Comparison, verdict: Verdict) -> tuple[str, Score] | None:
    """The method after the best one, and by how much it is worse."""
    best = found.scores[verdict.sparsity, verdict.best]
    gaps = []
    for method in found.methods(verdict.sparsity):
        other = found.scores[verdict.sparsity, method]
        if method == verdict.best or not math.isfinite(other.value):
            continue
        gaps.append((method, other.minus(best) if found.lower_is_better else best.minus(other)))
    return min(gaps, key=lambda gap: gap[1].value, default=None)


def page_of(
    found: Comparison,
    loaded: Loaded,
    winners: Sequence[Masks],
    steps: Sequence[Step],
    facts: Mapping[str, str],
    command: str,
) -> Page:
    """The page; `winners` are the masks of the best method at each sparsity."""
    name = Path(loaded.source.model).name
    dense, title = found.score_of([found.dense]), found.score_title
    elements = found.model_elements
    sparsities = [titled(each) for each in found.sparsities]
    methods = len({cell.method for cell in found.cells})
    tiles = []
    for verdict in found.verdicts:
        score = scored(found.scores[verdict.sparsity, verdict.best], found.task)
        note = f"{title} {score}"
        if verdict.as_good:
            note += f"; {_listed(verdict.as_good)} cannot be told apart from it"
        tiles.append(Tile(f"Best at {titled(verdict.sparsity)}", verdict.best, note))
    tiles += [
        Tile("Dense", scored(dense, found.task), title),
        Tile("Model", name, f"{count(elements)} parameters"),
        Tile(
            "Sparsity of the whole model",
            span([percent(each.removed / elements) for each in winners]),
            "what is not pruned counts as well",
        ),
        size_tile(loaded.model, loaded.weights, winners),
        SPEED,
    ]
    return Page(
        f"{methods} methods compared on {name}",
        command,
        f"{methods} methods pruned {name} to {_listed(sparsities)} sparsity, in one shot and "
        f"without fine-tuning; {found.task} was measured on {facts['measured on']}.",
        tiles,
        [f"{method} is left out: {why}" for method, why in found.left_out.items()],
        sentences(found),
        steps,
        [
            Section("Quality against sparsity", _NOTE, charts=_charts(found)),
            Section("All figures", tables=[_figures_table(found)]),
        ],
        facts,
    )


def _charts(found: Comparison) -> list[Chart]:
    """The score against the sparsity of the prunable part, and the metrics that it is made of."""
    charts = []
    for names in [found.score, *((name,) for name in found.score if len(found.score) > 1)]:
        part = replace(found, score=names)
        title = found.score_title if names == found.score else title_of(names[0])
        series: dict[str, list[tuple[float, float, float | None]]] = {}
        for (sparsity, method), score in part.scores.items():
            cell = part.of(sparsity, method)[0]
            point = (cell.removed / cell.total, score.value, score.error)
            series.setdefault(method, []).append(point)
        dense = part.score_of([part.dense]).value
        low, unit = (None, "loss") if found.task == "loss" else (0.0, "percent")
        charts.append(line_chart(title, series, y=Axis(unit, low=low), reference=(dense, DENSE)))
    return charts


def _figures_table(found: Comparison) -> Table:
    """One row per cell."""
    parts = found.score if len(found.score) > 1 else ()
    modalities = list(found.cells[0].by_modality)
    seeds = ["seed"] if len({cell.seed for cell in found.cells}) > 1 else []
    header = ["sparsity", "method", "verdict", *seeds, *(_SHORT[name] for name in parts)]
    header += [found.score_title, "whole model", *modalities, "pruned in"]
    rows = []
    for cell in found.cells:
        rows.append(
            [
                titled(cell.sparsity),
                cell.method,
                found.verdict(cell.sparsity).of(cell.method),
                *(str(cell.seed) for _ in seeds),
                *(_digits(cell.measured.metrics[name], found.task) for name in parts),
                scored(found.score_of([cell.measured]), found.task),
                percent(cell.removed / found.model_elements),
                *map(percent, cell.by_modality.values()),
                f"{cell.pruning_seconds:.1f} s",
            ]
        )
    note = (
        "Whole model, and the modalities after it: the fraction of their weights that is removed. "
        "A click on a heading sorts."
    )
    return Table("", header, rows, note)


def _digits(value: float, task: str) -> str:
    return shown(value, 4 if task == "loss" else 1)


def to_csv(found: Comparison) -> str:
    """One row per cell, the dense model first."""
    metrics, modalities = list(found.dense.metrics), list(found.cells[0].by_modality)
    dense = found.score_of([found.dense])
    rows: list[list[object]] = [
        [
            *("sparsity", "method", "seed", *metrics, "score", "standard_error", "removed"),
            *("sparsity_of_prunable", "sparsity_of_model"),
            *(f"sparsity_{modality}" for modality in modalities),
            *("pruning_seconds", "measuring_seconds", "masks"),
        ],
        [
            *("0", DENSE, "", *found.dense.metrics.values(), dense.value, dense.error, 0, 0, 0),
            *(0 for _ in modalities),
            *("", "", ""),
        ],
    ]
    for cell in found.cells:
        score = found.score_of([cell.measured])
        rows.append(
            [
                *(cell.sparsity, cell.method, cell.seed),
                *(cell.measured.metrics.get(name, "") for name in metrics),
                *(score.value, score.error, cell.removed, cell.removed / cell.total),
                *(cell.removed / found.model_elements, *cell.by_modality.values()),
                *(f"{cell.pruning_seconds:.2f}", f"{cell.measuring_seconds:.2f}", cell.masks),
            ]
        )
    return csv_text(rows)


def record_of(found: Comparison) -> dict[str, Any]:
    """What compare.json says about the figures."""
    dense = found.score_of([found.dense])
    return {
        "task": found.task,
        "score": {
            "name": found.score_title,
            "mean_of": list(found.score),
            "lower_is_better": found.lower_is_better,
        },
        "dense": {"metrics": _finite(found.dense.metrics), **_score_record(dense)},
        "verdicts": [
            {
                "sparsity": verdict.sparsity,
                "best": verdict.best,
                "as_good": list(verdict.as_good),
                "masks": found.winner(verdict.sparsity).masks,
            }
            for verdict in found.verdicts
        ],
        "methods": [
            {"sparsity": sparsity, "method": method, **_score_record(score)}
            for (sparsity, method), score in found.scores.items()
        ],
        "cells": [
            {
                "sparsity": cell.sparsity,
                "method": cell.method,
                "seed": cell.seed,
                "metrics": _finite(cell.measured.metrics),
                **_score_record(found.score_of([cell.measured])),
                "removed": cell.removed,
                "sparsity_of_prunable": cell.removed / cell.total,
                "sparsity_of_model": cell.removed / found.model_elements,
                "by_modality": dict(cell.by_modality),
                "pruning_seconds": round(cell.pruning_seconds, 2),
                "measuring_seconds": round(cell.measuring_seconds, 2),
                "masks": cell.masks,
            }
            for cell in found.cells
        ],
        "left_out": dict(found.left_out),
    }


def _score_record(score: Score) -> dict[str, float | None]:
    return _finite({"score": score.value, "standard_error": score.error})


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
