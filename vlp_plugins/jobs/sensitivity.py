"""`vlp sensitivity` from end to end: load, prune and measure part by part, write a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vlp_plugins.calibration.batches import batch_size
from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.jobs.facts import StopWatch, memory_facts, part, step, write_report
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.jobs.recipes import DataRecipe, sparsity_text
from vlp_plugins.jobs.work_dir import claimed, working
from vlp_plugins.methods.composition import composed
from vlp_plugins.methods.guided import Guided
from vlp_plugins.methods.method import Method
from vlp_plugins.models.adapter import Batch
from vlp_plugins.report.drawing import Chart
from vlp_plugins.report.page import Page, Table, Tile, value_text
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import DataError, RecipeError
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.numbers import count, percent
from vlp_plugins.tasks.sensitivity.analysis import Analysis, analyse, curves_charts, relation_chart
from vlp_plugins.tasks.sensitivity.curves import Point
from vlp_plugins.tasks.sensitivity.files import to_csv, write_analysis
from vlp_plugins.tasks.sensitivity.measure import sensitivity
from vlp_plugins.tasks.sensitivity.relations import dimensions_of

_CURVES = "Sparsity is a fraction of the group's own weights; all others are dense."


def summary_table(analysis: Analysis, level: str) -> Table:
    """One row per group of a level: prunability, tolerated sparsity, ID."""
    shown: dict[str, str] = {}
    if analysis.dimensions is not None:
        groups = [p.group for p in analysis.prunabilities if p.group.level == level]
        known = dimensions_of(groups, analysis.dimensions)
        if known:
            shown = {g.title: f"{known[g]:.2f}" if g in known else "-" for g in groups}
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
                *([shown[each.group.title]] if shown else []),
            ]
        )
    header = [level, "elements", "prunability, loss", "prunability, R@1",
              f"up to (loss +{analysis.tolerance:.0%})"]  # fmt: skip
    if shown:
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


def _relation_charts(analysis: Analysis) -> Sequence[Chart]:
    charts = []
    for level in dict.fromkeys(relation.level for relation in analysis.relations):
        members = [p for p in analysis.prunabilities if p.group.level == level]
        dimensions = dimensions_of([p.group for p in members], analysis.dimensions or {})
        charts.append(relation_chart(members, dimensions, f"{level}s"))
    return charts


def _cell(point: Point) -> str:
    loss = f"{point.loss:.4g}" if math.isfinite(point.loss) else "not finite"
    if point.image_to_text is None or point.text_to_image is None:
        return loss
    return f"{loss}, {point.image_to_text:.1f} / {point.text_to_image:.1f}"


RECORD = "sensitivity.json"


@dataclass(frozen=True)
class SensitivityRequest:
    """What is asked for of a model.

    Attributes:
        data: for calibration; without `test` also for measuring.
        test: where the pairs come from that are measured on; None: from `data`.
        pairs: how many of them, in whole batches.
        tolerance: rise of the loss, as a fraction of the dense one, that is taken for harmless.
        options: of `sensitivity`: sparsity, groups, modalities, variant, seed.
    """

    data: DataRecipe
    test: str | None
    pairs: int
    id_profile: Path | None
    tolerance: float
    method: Method
    options: Mapping[str, Any]


@dataclass(frozen=True)
class SensitivityResult:
    """What a run found."""

    analysis: Analysis
    facts: Mapping[str, str]
    out: Path


def page_of(
    analysis: Analysis,
    source: ModelSource,
    request: SensitivityRequest,
    command: str,
    facts: Mapping[str, str],
) -> Page:
    """The page."""
    found, name = analysis.found, Path(source.model).name
    sections = []
    for level in found.levels:
        curves = found.of(level)
        charts: list[Chart] = []
        if level == "modality":
            charts += curves_charts(found, curves, "By modality")
        elif level == "block":
            for modality in dict.fromkeys(curve.group.modality for curve in curves):
                here = [curve for curve in curves if curve.group.modality == modality]
                charts += curves_charts(found, here, f"Blocks of {modality}")
        summary = part(summary_table(analysis, level), f"By {level}", folded=level == "weight")
        sections += [
            replace(summary, note=_CURVES if charts else "", charts=charts),
            part(points_table(analysis, level), f"Every point, by {level}", folded=True),
        ]
    if analysis.dimensions is not None and analysis.relations:
        title = "Does the intrinsic dimension tell what can be pruned?"
        related = part(relation_table(analysis), title)
        sections.append(replace(related, charts=_relation_charts(analysis)))
    by_modality = [p for p in analysis.prunabilities if p.group.level == "modality"]
    budgets = {p.group.modality: math.floor(100 * p.tolerated) / 100 for p in by_modality}
    tiles = [
        Tile(
            f"{p.group.modality}: removed at little loss",
            percent(budgets[p.group.modality], 0),
            f"of {count(p.group.elements)} weights, with the loss at most "
            f"{percent(analysis.tolerance, 0)} higher",
        )
        for p in by_modality
    ]
    tiles += [Tile("Model", name), Tile("Method", request.method.name)]
    reads = request.method.reads_data
    following = step(
        "Prune each modality as far as it takes by itself.",
        *("prune", "--model", source.model, "--method", request.method.name),
        *("--sparsity", sparsity_text(budgets), "--out", "pruned"),
        *(("--data", request.data.source or "TRAINING_DATA") if reads else ()),
    )
    return Page(
        f"How much of {name} can be pruned where",
        command,
        f"One part of the model at a time was pruned by {request.method.name} at rising sparsity, "
        "and the loss was measured.",
        tiles,
        [],
        analysis.sentences,
        [following] if any(budgets.values()) else [],
        sections,
        facts,
    )


def measure_sensitivity(
    load: Callable[[], Loaded],
    request: SensitivityRequest,
    out: Path,
    *,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SensitivityResult:
    """Measures and writes `out` whole or not at all; process 0 of several writes.

    While it works, the folder `OUT.work` next to it keeps every point that is measured. For the
    arguments see `vlp_plugins.jobs`.

    Raises:
        VlpError: if model, method or data do not fit, or `out` is taken.
    """
    writes = rank_and_size()[0] == 0
    with claimed(out, writes=writes, mark=RECORD, overwrite=overwrite) as results:
        profile = None if request.id_profile is None else IdProfile.load(request.id_profile)
        watch = StopWatch()
        loaded = load()
        dimensions = None
        if profile is not None:
            factors = profile.factors(loaded.weights, "all")
            dimensions = {n: value for n, value in factors.items() if n not in profile.without}
        calibration, measured = _batches(loaded, request)
        watch.lap("loading")
        with working(results, resume=resume) as work:
            found = sensitivity(
                loaded.model,
                measured,
                calibration=calibration,
                adapter=loaded.adapter,
                method=request.method,
                id_profile=profile,
                workplace=work,
                resume=resume,
                progress=progress,
                **request.options,
            )
        watch.lap("measuring")
        layers = () if profile is None else profile.layers
        analysis = analyse(found, dimensions, layers, tolerance=request.tolerance)
        pairs = f"{sum(map(batch_size, measured)):,} of at most {request.pairs:,}"
        facts = {
            **watch.texts(),
            **memory_facts(loaded.device),
            "pairs measured on": pairs,
            **{name: value_text(value) for name, value in found.settings.items() if value},
        }
        if writes:
            with atomic_folder(results, mark=RECORD, overwrite=overwrite) as folder:
                write_analysis(folder / RECORD, analysis)
                (folder / "points.csv").write_text(to_csv(analysis.found), encoding="utf-8")
                write_report(
                    folder, lambda: page_of(analysis, loaded.source, request, command, facts)
                )
        return SensitivityResult(analysis, facts, results)


def _batches(
    loaded: Loaded, request: SensitivityRequest
) -> tuple[Iterable[Batch] | None, Sequence[Batch]]:
    """What the method reads, and what is measured on; never the same pairs.

    Without data to test on, a method that reads data gets every other batch.
    """
    data = request.data
    method = request.method
    reads = bool(composed(method.method if isinstance(method, Guided) else method).needs)
    wanted = -(-request.pairs // data.batch_size)
    if request.test is not None:
        measured = _first(loaded, replace(data, source=request.test), wanted)
        if reads and data.source is None:
            raise RecipeError(
                f"method {request.method.name!r} reads calibration data: give --data FOLDER "
                "(images with metadata.jsonl) together with --test"
            )
        return (loaded.batches(data) if reads else None), measured
    if not reads:
        return None, _first(loaded, data, wanted)
    both = _first(loaded, data, 2 * min(data.batches or wanted, wanted))
    if len(both) < 2:
        raise DataError(
            f"{data.source} has a single batch of {data.batch_size}, but method "
            f"{request.method.name!r} reads data, and what it reads is not measured on: give "
            "--test FOLDER, or a smaller --batch-size"
        )
    return both[0::2], both[1::2]


def _first(loaded: Loaded, data: DataRecipe, count: int) -> list[Batch]:
    """The first batches, at most so many; `--pairs` has a default that small data lack."""
    batches = loaded.batches(replace(data, batches=None))
    found = list(islice(batches, count))
    batches.source.check()  # the source itself judges only at its end
    return found
