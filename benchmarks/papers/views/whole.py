"""Everything that was measured: a table per model, a row per sparsity and method."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.papers.findings import DENSE, Found
from benchmarks.papers.layout import markdown, percent, title_of, with_best
from benchmarks.papers.measures import AVERAGE_FEATURES, COLUMNS, DRAWN, Measure
from benchmarks.papers.plots import over_sparsity
from benchmarks.papers.views.view import Rendered

_RANDOM = "random"


def whole(found: Found) -> Rendered:
    """For any table of cells: all figures of all tasks, the best of each sparsity bold."""
    columns, absent = _there(
        found, [each for task in found.tasks for each in _columns(found, task)]
    )
    lines: list[str] = []
    for model in found.models:
        lines += [f"## {title_of(model)}", "", *_table(found, model, columns), ""]
        lines += _below_random(found, model, columns)
    drawn = [
        measure
        for task in found.tasks
        for measure in (DRAWN.get(task) or _columns(found, task)[:1])
    ]
    return Rendered([*lines, *absent], over_sparsity(found, drawn) if drawn else None)


def _table(found: Found, model: str, columns: Sequence[Measure]) -> list[str]:
    rows = []
    for sparsity in (0.0, *found.sparsities):
        ways = found.at(model, sparsity)
        figures = [
            with_best([found.entry(measure, model, way, sparsity) for way in ways])
            for measure in columns
        ]
        rows += [
            [percent(sparsity), way, *(column[i] for column in figures)]
            for i, way in enumerate(ways)
        ]
    return markdown(["Sparsity", "Method", *(each.title for each in columns)], rows)


def _columns(found: Found, task: str) -> tuple[Measure, ...]:
    """What a table shows of a task; of one that is not known here, whatever its files have."""
    if task in COLUMNS:
        return COLUMNS[task]
    names = (
        content["metrics"]
        for cell in found.cells
        if cell.task == task and (content := found.contents.get(cell.name)) is not None
    )
    there = list(dict.fromkeys(name for metrics in names for name in metrics))
    return tuple(Measure(f"{title_of(task)}, {name}", task, (name,)) for name in there) or (
        Measure(title_of(task), task, ()),
    )


def _there(found: Found, columns: Sequence[Measure]) -> tuple[list[Measure], list[str]]:
    """The columns without those that no file has, and why not."""
    kept, reasons = [], []
    for measure in columns:
        contents = [
            found.contents[cell.name]
            for cell in found.cells
            if cell.task == measure.task and cell.name in found.contents
        ]
        without = [each for each in contents if measure.of(each) is None]
        if not contents or len(without) < len(contents):
            kept.append(measure)
        if without and measure.metrics:
            why = {each["absent"].get(measure.metrics[0], "no reason given") for each in without}
            some = "" if len(without) == len(contents) else f" in {len(without)} cells"
            reasons += [f"{measure.title} is absent{some}: {'; '.join(sorted(why))}.", ""]
    return kept, reasons


def _below_random(found: Found, model: str, columns: Sequence[Measure]) -> list[str]:
    """Says which methods are below random pruning, which should not be."""
    chosen = [AVERAGE_FEATURES] if AVERAGE_FEATURES.task in found.tasks else []
    chosen += [measure for measure in columns if measure.task != AVERAGE_FEATURES.task]
    texts = []
    for measure in chosen:
        for sparsity in found.sparsities:
            floor = found.entry(measure, model, _RANDOM, sparsity).mean
            below = [
                way
                for way in found.at(model, sparsity)
                if way not in (_RANDOM, DENSE)
                and floor is not None
                and (mean := found.entry(measure, model, way, sparsity).mean) is not None
                and mean < floor
            ]
            if below:
                texts.append(f"{measure.title} at {percent(sparsity)}: {', '.join(below)}")
    return [f"Below random pruning: {'; '.join(texts)}.", ""] if texts else []
