"""The demo's results as rows, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.demo.compare import CALIBRATION_BATCH, Comparison, Outcome
from benchmarks.demo.measure import Figures
from vlp_plugins.jobs.recipes import DataRecipe, Recipe, command_of
from vlp_plugins.report.drawing import Axis, line_chart
from vlp_plugins.report.layers import collapse_warnings, heat_maps, layer_rows, parameters_table
from vlp_plugins.report.page import Page, Section, Table

_NOTE = (
    "Pruned in one shot, not fine-tuned. R@1 (%): how often the own partner ranks first among all "
    "test pairs. Captions (%): those that name every object's colour, digit and position right. "
    "The last columns are the sparsity of each modality."
)


def results_table(comparison: Comparison, pairs: int) -> Table:
    """One row per sparsity and method, the dense model first.

    Args:
        comparison: of one model.
        pairs: number of test pairs.
    """
    modalities = [group.modality for group in comparison.inspection.groups]
    header = ["sparsity", "method", "R@1 image->text", "R@1 text->image", "captions", *modalities]
    rows = [["dense", "-", *_cells(comparison.dense), *("0.0%" for _ in modalities)]]
    by_sparsity = sorted(comparison.outcomes, key=lambda outcome: outcome.sparsity)  # stable
    for outcome in by_sparsity:
        counts = outcome.masks.counts().by_modality
        shares = [f"{counts[name].sparsity:.1%}" for name in modalities]
        rows.append([f"{outcome.sparsity:.0%}", outcome.method, *_cells(outcome.figures), *shares])
    title = (
        f"{comparison.inspection.model} ({comparison.name}): "
        f"{comparison.inspection.prunable:,} prunable weights, {pairs:,} unseen pairs"
    )
    return Table(title, header, rows, _NOTE)


def text_of(table: Table) -> str:
    """A table as lines of text; a blank line where the first cell changes."""
    lines = [list(table.header), *map(list, table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    text = [table.title, ""]
    previous = table.header[0]
    for line in lines:
        if line[0] != previous:
            text.append("")
        previous = line[0]
        text.append("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    return "\n".join(text)


def page_of(comparisons: Sequence[Comparison], tables: Sequence[Table], data: Path) -> Page:
    """The report: a picture and a table of each model, then a section per method.

    Args:
        comparisons: one per model.
        tables: their results.
        data: the calibration folder, as the commands name it.
    """
    sections = []
    for comparison, table in zip(comparisons, tables, strict=True):
        chart = line_chart(
            "",
            {
                method: [(o.sparsity, o.figures.recall) for o in comparison.of(method)]
                for method in dict.fromkeys(o.method for o in comparison.outcomes)
            },
            y=Axis("R@1, mean of both ways (%)", low=0.0),
            reference=(comparison.dense.recall, "dense"),
        )
        sections.append(Section(table.title, charts=[chart], tables=[replace(table, title="")]))
    for comparison in comparisons:
        for method in dict.fromkeys(outcome.method for outcome in comparison.outcomes):
            sections += _run(comparison, method, data)
    return Page(
        "Demo: pruning two small vision-language models",
        "python -m benchmarks.demo",
        "Two small models were pruned in one shot by several methods, and measured.",
        sections=sections,
    )


def _run(comparison: Comparison, method: str, data: Path) -> list[Section]:
    """What one method did to one model, and the command that repeats it."""
    outcomes = comparison.of(method)
    masks = {f"{outcome.sparsity:.0%}": outcome.masks for outcome in outcomes}
    rows = layer_rows(comparison.inspection.weights, list(masks.values()))
    facts = {
        "command": command_of(recipe_of(comparison, outcomes, data)),
        "pruning, all sparsities": f"{comparison.pruning_seconds[method]:.1f} s",
        **_data_facts(outcomes[0]),
    }
    highest = len(masks) - 1
    title = f"{method} on {comparison.name}"
    return [
        Section(
            f"{title}: sparsity per layer at {list(masks)[highest]}",
            " ".join(collapse_warnings(rows, list(masks), list(masks.values()))),
            maps=heat_maps(rows, highest),
            tables=[
                parameters_table(masks),
                Table("", ("fact", "value"), [list(item) for item in facts.items()]),
            ],
            folded=True,
        )
    ]


def recipe_of(comparison: Comparison, outcomes: Sequence[Outcome], data: Path) -> Recipe:
    """The run of `vlp prune` that makes the same masks."""
    method = outcomes[0].method
    here, source = Path.cwd(), comparison.source
    recipe = Recipe(
        model=str(source.relative_to(here) if source.is_relative_to(here) else source),
        method=method,
        sparsity=tuple(outcome.sparsity for outcome in outcomes),
        out=f"pruned-{comparison.name}-{method}",
        device="cpu",
    )
    if outcomes[0].masks.manifest.calibration is None:
        return recipe
    return replace(recipe, data=DataRecipe(source=str(data), batch_size=CALIBRATION_BATCH))


def _cells(figures: Figures) -> list[str]:
    values = (figures.image_to_text, figures.text_to_image, figures.captions)
    return ["-" if value is None else f"{value:.1f}" for value in values]


def _data_facts(outcome: Outcome) -> dict[str, str]:
    calibration = outcome.masks.manifest.calibration
    if calibration is None:
        return {"calibration data": "none needed"}
    return {
        "calibration data": f"{calibration['samples']} samples in {calibration['batches']} batches",
        "fingerprint of the data": str(calibration["fingerprint"]),
    }
