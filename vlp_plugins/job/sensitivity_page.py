"""The tables and the page of `vlp sensitivity`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlp_plugins.report.page import Chart, Findings, Table
from vlp_plugins.tasks.sensitivity.analysis import Analysis, curves_chart, relation_chart
from vlp_plugins.tasks.sensitivity.curves import Point
from vlp_plugins.tasks.sensitivity.relations import dimensions_of

_CURVES = (
    "Left: loss over the dense loss (log scale), with standard errors over the batches. "
    "Right: R@1. Sparsity is a fraction of the group's own weights; all others are dense."
)


def summary_table(analysis: Analysis, level: str) -> Table:
    """One row per group of a level: prunability, tolerated sparsity, ID."""
    by_title = {}
    if analysis.dimensions is not None:
        groups = [p.group for p in analysis.prunabilities if p.group.level == level]
        by_title = {g.title: v for g, v in dimensions_of(groups, analysis.dimensions).items()}
    rows = []
    for each in analysis.prunabilities:
        if each.group.level != level:
            continue
        error = "" if each.error is None else f" ± {each.error:.3f}"
        rows.append(
            [
                each.group.title,
                f"{each.group.elements:,}",
                f"{each.loss:.3f}{error}",
                "" if each.recall is None else f"{each.recall:.3f}",
                f"{each.tolerated:.0%}",
                *([f"{by_title[each.group.title]:.2f}"] if by_title else []),
            ]
        )
    header = [level, "elements", "prunability, loss", "prunability, R@1",
              f"up to (loss +{analysis.tolerance:.0%})"]  # fmt: skip
    if by_title:
        header.append("ID")
    note = (
        "Prunability: mean of dense loss / loss over all sparsities up to the highest (1: pruning "
        "changes nothing). Up to: the sparsity at which the loss has risen by the tolerance."
    )
    return Table(f"Prunability by {level}", header, rows, note)


def points_table(analysis: Analysis, level: str) -> Table:
    """One row per group of a level, one column per sparsity: loss, and R@1 both ways."""
    curves = analysis.found.of(level)
    sparsities = [f"{point.sparsity:.0%}" for point in curves[0].points]
    dense = analysis.found.dense
    rows = [["dense", _cell(dense), *[""] * (len(sparsities) - 1)]]
    rows += [[curve.group.title, *map(_cell, curve.points)] for curve in curves]
    what = "loss, R@1 image->text / text->image" if dense.recall is not None else "loss"
    return Table(f"{level}: {what}", [level, *sparsities], rows)


def relation_table(analysis: Analysis) -> Table:
    """The rank correlations."""
    rows = []
    for each in analysis.relations:
        found = each.found
        interval = ""
        if found.low is not None and found.high is not None:
            interval = f"{found.low:+.2f} to {found.high:+.2f}"
        rows.append(
            [
                f"{each.by}, {each.level}s, {each.scope}",
                each.measure,
                str(found.count),
                "none" if found.rho is None else f"{found.rho:+.2f}",
                interval,
                "" if found.p is None else f"{found.p:.3f}",
            ]
        )
    note = (
        "Spearman's rank correlation with prunability; negative: the higher, the less prunable. "
        "Interval: 95%, bootstrap over groups. p: permutation test. `elements` is how large a "
        "group is, for comparison."
    )
    header = ["what ranks the groups", "prunability by", "groups", "rho", "interval", "p"]
    return Table("Rank correlation with prunability", header, rows, note)


def findings_of(analysis: Analysis, command: str, facts: Mapping[str, str]) -> Findings:
    """The page."""
    found = analysis.found
    charts: list[Chart] = []
    tables: list[Table] = []
    long_tables: list[Table] = []
    for level in found.levels:
        curves = found.of(level)
        if level == "modality":
            charts.append(Chart("By modality", curves_chart(found, curves), _CURVES))
        elif level == "block":
            for modality in dict.fromkeys(curve.group.modality for curve in curves):
                here = [curve for curve in curves if curve.group.modality == modality]
                charts.append(Chart(f"Blocks of {modality}", curves_chart(found, here), _CURVES))
        (long_tables if level == "weight" else tables).append(summary_table(analysis, level))
        long_tables.append(points_table(analysis, level))
    if analysis.dimensions is not None and analysis.relations:
        charts += _relation_charts(analysis)
        tables.append(relation_table(analysis))
    return Findings(
        "vlp sensitivity: how much to prune where",
        command,
        analysis.sentences,
        charts,
        tables,
        long_tables,
        facts,
    )


def _relation_charts(analysis: Analysis) -> Sequence[Chart]:
    charts = []
    for level in dict.fromkeys(relation.level for relation in analysis.relations):
        members = [p for p in analysis.prunabilities if p.group.level == level]
        dimensions = dimensions_of([p.group for p in members], analysis.dimensions or {})
        charts.append(
            Chart(
                f"ID and prunability of {level}s",
                relation_chart(members, dimensions),
                "If a higher ID meant less prunable, the dots would fall from left to right.",
            )
        )
    return charts


def _cell(point: Point) -> str:
    loss = f"{point.loss:.4g}" if math.isfinite(point.loss) else "not finite"
    if point.image_to_text is None or point.text_to_image is None:
        return loss
    return f"{loss}, {point.image_to_text:.1f} / {point.text_to_image:.1f}"
