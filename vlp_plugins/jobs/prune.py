"""`vlp prune` from end to end: from a recipe to a folder of results, whole or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vlp_plugins.calibration.checkpoint import FORM
from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.jobs.dimensions import PROFILE
from vlp_plugins.jobs.facts import (
    LACKING,
    SPEED,
    Forecast,
    StopWatch,
    agreement,
    data_facts,
    dimension_facts,
    keeps_halves,
    keeps_statistics,
    mask_steps,
    memory_facts,
    part,
    size_facts,
    size_tile,
    write_report,
)
from vlp_plugins.jobs.preparation import ModelSource, Prepared, prepare, title_of
from vlp_plugins.jobs.recipes import Recipe, command_of, need
from vlp_plugins.jobs.work_dir import claimed, work_left, working
from vlp_plugins.masks.apply import write_pruned
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import composed
from vlp_plugins.methods.guided import IdGuided, Measuring
from vlp_plugins.methods.method import Procedure
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.saving import check_can_save
from vlp_plugins.report.layers import (
    collapse_warnings,
    layer_rows,
    parameters_table,
    pruned_sections,
    to_csv,
    whole_sparsity,
)
from vlp_plugins.report.page import Page, Section, Table, Tile, span
from vlp_plugins.runtime.artifacts import is_of
from vlp_plugins.runtime.distributed import rank_and_size, wait_for_all
from vlp_plugins.runtime.errors import DataError, VlpError, no_exit
from vlp_plugins.runtime.files import atomic_folder, check_outside, check_space
from vlp_plugins.runtime.numbers import count, duration, percent
from vlp_plugins.runtime.version import __version__

_log = logging.getLogger(__name__)
RECIPE = "recipe.yaml"


def _gathered(
    job: Prepared,
    batches: CaptionedBatches,
    out: Path,
    *,
    progress: Progress | None,
    resume: bool,
) -> Statistics | None:
    """What a composition reads of the data, with a checkpoint next to the folder of results."""
    context = job.context(batches, checkpoint=checkpoint_of(out), resume=resume, progress=progress)
    try:
        # The batches end by themselves.
        method = composed(job.method)
        return method.gather(replace(context, limit=None, halves=keeps_halves(job, method)))
    except Exception as error:
        # No checkpoint of a pass that would be rejected again (NaN) is left. That of data that
        # broke off stays, and so does that of an earlier run.
        if not resume:
            if not _can_resume(error, batches):
                delete_checkpoints(out)
            elif found := checkpoints(out):
                _log.warning("%s keeps what was read; --resume continues from there", found[0])
        raise


def _can_resume(error: Exception, batches: CaptionedBatches) -> bool:
    if not isinstance(error, DataError):
        return not isinstance(error, VlpError)
    try:
        batches.source.check()
    except DataError:  # too many images do not decode; without them the batches are others
        return False
    return True


def checkpoint_of(out: Path) -> Path:
    """Where the data pass of a run keeps its state; each of several processes adds its mark."""
    return out.with_name(f"{out.name}.checkpoint")


def checkpoints(out: Path) -> list[Path]:
    """The files that are there, of one process or of several; no file of another kind."""
    base = checkpoint_of(out)
    pattern = re.compile(re.escape(base.name) + r"(\.rank\d+of\d+)?")
    if not base.parent.is_dir():
        return []
    named = (path for path in base.parent.iterdir() if pattern.fullmatch(path.name))
    return sorted(path for path in named if is_of(path, FORM))


def delete_checkpoints(out: Path) -> None:
    """Deletes those files."""
    for path in checkpoints(out):
        path.unlink(missing_ok=True)


Finish = Callable[[Prepared, Mapping[str, Masks], Path], Sequence[Tile]]
"""Adds to a folder of results before it gets its name; gives the quality that it has measured."""


def recipe_text(recipe: Recipe) -> str:
    """The recipe as `vlp prune` reads it; what has its standard value is left out.

    The method is always named, so that it does not depend on what the standard is.
    """
    standard = asdict(Recipe()) | {"method": None}
    filled = _filled(asdict(recipe), standard)
    head = f"# Written by vlp_plugins {__version__}. To run it again: "
    text = yaml.safe_dump(filled, sort_keys=False, allow_unicode=True)
    return f"{head}vlp prune recipe.yaml --out NEW_FOLDER\n{text}"


def _filled(values: Mapping[str, Any], standard: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the standard, with lists for tuples, which YAML does not know."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if value == standard[key]:
            continue
        if key == "data":
            found[key] = _filled(value, standard[key])
        else:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        out: the folder; process 0 of several wrote it.
        warnings: about layers that lost (nearly) everything.
    """

    out: Path
    masks: Mapping[str, Masks]
    facts: Mapping[str, str]
    warnings: Sequence[str]


def run(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Result:
    """Prunes as the recipe says and writes `recipe.out` whole or not at all.

    The folder holds `masks-SPARSITY.safetensors`, `layers.csv`, `report.html`, `recipe.yaml`,
    `statistics.safetensors` if one pass over the data gathered some, `id-profile.json` if the
    intrinsic dimensions were measured, and with `save_model` a folder `model-SPARSITY`. While data
    is read, a checkpoint is next to the folder as `OUT.checkpoint`, and the folder `OUT.work` of
    methods that run the model as they go and of measuring.

    In a process group (`torchrun`) all processes read the data and share the work on it; process 0
    writes. It calls `finish` with the job, the masks by title, and the folder before that gets its
    name: what is added is there with the rest, or nothing is. It may change the model. For the
    other arguments see `vlp_plugins.jobs`.

    Raises:
        VlpError: if what the recipe names does not fit, is missing, or `out` is taken.
    """
    need(recipe, "model", "out")
    writes = rank_and_size()[0] == 0
    if overwrite:
        files = (recipe.statistics, recipe.id_profile)
        check_outside(str(recipe.out), (recipe.model, recipe.data.source, recipe.processor, *files))

    with claimed(Path(str(recipe.out)), writes=writes, mark=RECIPE, overwrite=overwrite) as out:
        known = Statistics.load(recipe.statistics) if recipe.statistics is not None else None
        watch = StopWatch()
        job = prepare(recipe)
        if recipe.save_model:
            check_can_save(job.model)
        _check_room(job, out, resume=resume)
        batches = job.batches() if job.method.reads_data and known is None else None
        read = () if batches is None else batches
        watch.lap("loading")
        profile = None
        if isinstance(job.method, IdGuided):
            with working(out, resume=resume) as work:
                rest = " to measure dimensions; the search for neighbours comes on top"
                shown = Forecast(progress, rest, resumed=resume)
                profile = job.method.measured(
                    job.context(read, workplace=work, resume=resume, progress=shown)
                )
            job = job.guided(profile)
            watch.lap("measuring intrinsic dimensions")
        if isinstance(job.method, Measuring):
            rest = " to measure for the allocation; pruning comes on top"
            shown = Forecast(progress, rest, resumed=resume)
            ready = job.method.ready(job.context(read, progress=shown))
            job = replace(job, method=ready)
            watch.lap("measuring for the allocation")
        statistics = None
        if isinstance(job.method, Procedure) or job.by_blocks:
            # What measuring has left in the folder of work stays for a resumed run.
            with working(out, resume=resume or profile is not None) as work:
                made = _run(job, batches, work, progress, resume=resume)
            watch.lap("pruning")
        else:
            if batches is not None:
                shown = Forecast(progress, "; making masks comes on top", resumed=resume)
                statistics = _gathered(job, batches, out, progress=shown, resume=resume)
                watch.lap("data pass")
            elif known is not None and composed(job.method).needs:
                known.check(job.weights, published=job.published)
                statistics = known
            made = job.masks(statistics)
            watch.lap("masks")
        masks = dict(zip(map(title_of, job.targets), made, strict=True))
        tables = agreement(job, statistics, masks) if writes else []
        if any(table.rows for table in tables):
            watch.lap("masks of either half of the data")
        rows = layer_rows(job.weights, made)

        def facts() -> dict[str, str]:
            return {
                **watch.texts(),
                **memory_facts(job.device),
                **data_facts(made[0], batches),
                **dimension_facts(profile),
                **size_facts(job, statistics, masks),
            }

        if writes:
            with atomic_folder(out, mark=RECIPE, overwrite=overwrite) as folder:
                _write_masks(job, masks, folder)
                (folder / "layers.csv").write_text(to_csv(rows, list(masks)), encoding="utf-8")
                if statistics is not None and keeps_statistics(job, statistics):
                    statistics.save(folder / "statistics.safetensors")
                if profile is not None:
                    profile.save(folder / PROFILE)
                watch.lap("writing")
                quality = [] if finish is None else finish(job, masks, folder)
                # After the rest, so that it knows what that took.
                write_report(folder, lambda: page_of(job, masks, facts(), tables, quality))
        wait_for_all()
        delete_checkpoints(out)
        return Result(out, masks, facts(), collapse_warnings(rows, list(masks), made))


def _check_room(job: Prepared, out: Path, *, resume: bool) -> None:
    """Raises `OutputError` if the disk cannot hold what is written, and the work until then."""
    needed = 0
    if job.recipe.save_model:
        needed += len(job.targets) * sum(each.nbytes for each in job.model.parameters())
    # Those of blocks stay in the folder of work until the masks have theirs.
    needed += (2 if job.by_blocks else 1) * job.new_values_bytes
    if resume:
        needed -= sum(path.stat().st_size for path in work_left(out))
    check_space(out, needed)


def _run(
    job: Prepared,
    batches: CaptionedBatches | None,
    work: Path,
    progress: Progress | None,
    *,
    resume: bool,
) -> list[Masks]:
    """Of a method that runs the model as it goes."""
    method = job.method
    rest, solving = ", each through one of the blocks", 0.0
    if batches is not None and isinstance(method, Procedure):
        solving = _solving_seconds(job, method, batches, work)
        rest = f", {duration(solving)} of it to solve" if solving >= 1 else ""
    shown = None if batches is None else Forecast(progress, rest, solving, resumed=resume)
    read = () if batches is None else batches
    with no_exit(f"method {method.name!r}"):
        return method.run(job.context(read, workplace=work, resume=resume, progress=shown))


def _solving_seconds(
    job: Prepared, method: Procedure, batches: CaptionedBatches, work: Path
) -> float:
    """Seconds that the method takes in addition to its batches, as far as it can say."""
    number = job.recipe.data.batches
    if number is None and batches.source.length is not None:
        number = len(batches)
    if number is None:
        return 0.0
    with suppress(VlpError):  # running the method will say it
        return method.cost(replace(job.context(workplace=work), limit=number)).seconds
    return 0.0


_UNMEASURED = Tile("Quality", "not measured", "vlp evaluate measures it: the first step below")


def page_of(
    job: Prepared,
    masks: Mapping[str, Masks],
    facts: Mapping[str, str],
    agreement: Sequence[Table],
    quality: Sequence[Tile] = (),
) -> Page:
    """The page."""
    recipe, name = job.recipe, Path(str(job.recipe.model)).name
    inspection = inspect_model(job.model, job.adapter)
    sets = list(masks.values())
    prunable = span([percent(each.sparsity) for each in sets])
    whole = span([percent(whole_sparsity(job.model, job.weights, each)) for each in sets])
    new = any(each.new_values is not None for each in sets)
    values = "gives the weights that stay new values" if new else "leaves what stays as it is"
    variant = "as published; " if job.published else ""
    rows = layer_rows(inspection.weights, sets)
    first = f"masks-{next(iter(masks))}.safetensors"
    source = ModelSource(str(recipe.model), recipe.adapter, recipe.processor, recipe.dtype)
    steps = mask_steps(source, f"{recipe.out}/{first}", job.adapter)
    if len(sets) > 1:
        text = f"{steps[0].text} Here for {first}; it is the same for the others."
        steps[0] = replace(steps[0], text=text)
    made = f"made {len(sets)} sets of masks, which remove" if len(sets) > 1 else "removed"
    read = facts["calibration data"].partition(" in ")[0]
    return Page(
        f"{recipe.method} on {name}",
        command_of(recipe),
        f"{recipe.method} {made} {prunable} of the prunable weights of {name}, or {whole} of the "
        "whole model.",
        [
            Tile(
                "Model",
                name,
                f"{inspection.model}, {count(inspection.parameters)} parameters, "
                f"{percent(inspection.prunable / inspection.parameters)} of them prunable",
            ),
            Tile("Method", recipe.method, f"{variant}{values}"),
            Tile("Sparsity of the prunable part", prunable, f"asked for: {span(list(masks))}"),
            Tile("Sparsity of the whole model", whole, "what is not pruned counts as well"),
            Tile("Calibration", read, facts.get("data", "")),
            *(quality or [_UNMEASURED]),
            size_tile(job.model, inspection.weights, sets),
            SPEED,
        ],
        [
            *collapse_warnings(rows, list(masks), sets),
            *([f"less data than asked for: {facts[LACKING]}"] if LACKING in facts else []),
        ],
        [],
        steps,
        [
            *pruned_sections(inspection, masks),
            *map(part, agreement),
            Section("Method", tables=[parameters_table(masks)]),
        ],
        facts,
    )


def _write_masks(job: Prepared, masks: Mapping[str, Masks], folder: Path) -> None:
    """The masks, the recipe, and pruned models if asked for; the dense weights are back then."""
    for title, each in masks.items():
        each.save(folder / f"masks-{title}.safetensors")
        if job.recipe.save_model:
            place = folder / f"model-{title}"
            place.mkdir()
            write_pruned(each, job.model, job.adapter, place, source=job.recipe.model)
    (folder / RECIPE).write_text(recipe_text(job.recipe), encoding="utf-8")


def leftovers(out: Path) -> list[Path]:
    """What an interrupted run left next to its folder to resume from."""
    return [*checkpoints(out), *work_left(out)]
