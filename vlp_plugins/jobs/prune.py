"""`vlp prune` from end to end: from a recipe to a folder of results, whole or not at all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vlp_plugins.calibration.checkpoint import FORM
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.jobs.dimensions import PROFILE
from vlp_plugins.jobs.facts import (
    StopWatch,
    agreement,
    data_facts,
    dimension_facts,
    keeps_statistics,
    memory_facts,
    size_facts,
)
from vlp_plugins.jobs.preparation import Prepared, prepare, title_of
from vlp_plugins.jobs.recipes import Recipe, command_of, need
from vlp_plugins.jobs.work_dir import claimed, delete_work, work_left, working
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import composed
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Procedure
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.saving import check_can_save, restored, write_model
from vlp_plugins.report.layers import collapse_warnings, layer_rows, to_csv
from vlp_plugins.report.page import Run, Table, check_can_render, render
from vlp_plugins.runtime.artifacts import is_of
from vlp_plugins.runtime.distributed import rank_and_size, wait_for_all
from vlp_plugins.runtime.errors import DataError, UnsupportedError, VlpError, no_exit
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.version import __version__

_log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]


def statistics_of(
    job: Prepared,
    known: Statistics | None,
    batches: CaptionedBatches | None,
    out: Path,
    *,
    progress: Progress | None,
    resume: bool,
) -> Statistics | None:
    """What a composition reads, from an earlier pass or from data; None if it reads nothing.

    Args:
        job: what is run.
        known: of an earlier pass.
        batches: None if there are known statistics.
        out: the folder of results, beside which the checkpoint lies.
        progress: called with (batches done, batches in all or None).
        resume: continue from the checkpoint.

    Raises:
        VlpError: see `calibrate`; or if the known statistics are of another model.
    """
    method = composed(job.method)
    if not method.needs:
        return None
    if batches is None:
        assert known is not None
        known.check(job.weights, published=job.published)
        return known
    context = job.context(batches, checkpoint=checkpoint_of(out), resume=resume, progress=progress)
    with _checkpoints_kept_if_useful(out, batches, resumed=resume):
        return method.gather(replace(context, limit=None))  # the batches end by themselves


def checkpoint_of(out: Path) -> Path:
    """Where the data pass of a run keeps its state; each of several processes adds its mark."""
    return out.with_name(f"{out.name}.checkpoint")


def checkpoints(out: Path) -> list[Path]:
    """The files that are there, of one process or of several; none that is someone else's."""
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


@contextmanager
def _checkpoints_kept_if_useful(
    out: Path, batches: CaptionedBatches, *, resumed: bool
) -> Iterator[None]:
    """Leaves no checkpoint of a pass that was rejected and would be rejected again (NaN).

    That of data that broke off stays, and so does that of an earlier run.
    """
    try:
        yield
    except Exception as error:
        if not resumed:
            if not _can_go_on(error, batches):
                delete_checkpoints(out)
            elif found := checkpoints(out):
                _log.warning("%s keeps what was read; --resume goes on from there", found[0])
        raise


def _can_go_on(error: Exception, batches: CaptionedBatches) -> bool:
    if not isinstance(error, DataError):
        return not isinstance(error, VlpError)
    try:
        batches.source.check()
    except DataError:  # too many images do not decode; without them the batches are others
        return False
    return True


def run_procedure(
    job: Prepared,
    method: Procedure,
    batches: Iterable[Batch] | None,
    out: Path,
    *,
    progress: Callable[[int, int | None], None] | None,
    resume: bool,
    keep: bool = False,
) -> list[Masks]:
    """Masks for every target.

    Args:
        job: what is run.
        method: its method.
        batches: None for a method that reads none.
        out: the folder of results.
        progress: called with (batches done, batches in all or None).
        resume: go on from what an interrupted run left in the folder of work.
        keep: leave what is in the folder, which this run has used already.

    Raises:
        OutputError: if there is no place to work.
        VlpError: whatever the method says.
    """
    with working(out, resume=resume or keep) as work:
        context = job.context(
            () if batches is None else batches, workplace=work, resume=resume, progress=progress
        )
        with no_exit(f"method {method.name!r}"):
            return method.run(context)


def measure_profile(
    job: Prepared,
    method: IdGuided,
    batches: Iterable[Batch],
    out: Path,
    *,
    progress: Callable[[int, int | None], None] | None,
    resume: bool,
) -> IdProfile:
    """The intrinsic dimensions that a method needs; the folder of work keeps what is known.

    Args:
        job: what is run.
        method: its method.
        batches: of the calibration data.
        out: the folder of results.
        progress: called with (batches done, batches in all or None).
        resume: go on from what an interrupted run left in the folder of work.

    Raises:
        OutputError: if there is no place to work.
        VlpError: see `IdGuided.measured`.
    """
    with working(out, resume=resume) as work:
        context = job.context(batches, workplace=work, resume=resume, progress=progress)
        return method.measured(context)


Finish = Callable[[Prepared, Mapping[str, Masks], Path], None]
"""Adds to a folder of results before it gets its name."""


def write_results(
    job: Prepared,
    out: Path,
    masks: Mapping[str, Masks],
    statistics: Statistics | None,
    tables: Sequence[Table],
    watch: StopWatch,
    facts: Callable[[], Mapping[str, str]],
    profile: IdProfile | None = None,
    finish: Finish | None = None,
) -> None:
    """Fills the folder; the report comes after the rest, so that it knows what that took.

    Args:
        job: what was run.
        out: the folder, new or empty.
        masks: by title.
        statistics: None for a method that gathers none.
        tables: for the report.
        watch: gets the lap of writing.
        facts: what the report shows at its end.
        profile: intrinsic dimensions that the run measured; None if it measured none.
        finish: called at the end with the job, the masks and the folder; may change the model.

    Raises:
        OutputError: if it exists or cannot be written; nothing of it is left then.
    """
    rows = layer_rows(job.weights, list(masks.values()))
    with atomic_folder(out) as folder:
        for title, each in masks.items():
            each.save(folder / f"masks-{title}.safetensors")
        (folder / "layers.csv").write_text(to_csv(rows, list(masks)), encoding="utf-8")
        (folder / "recipe.yaml").write_text(recipe_text(job.recipe), encoding="utf-8")
        if statistics is not None and keeps_statistics(job, statistics):
            statistics.save(folder / "statistics.safetensors")
        if profile is not None:
            profile.save(folder / PROFILE)
        if job.recipe.save_model:
            _write_models(job, folder, masks)
        watch.lap("writing")
        _write_report(job, folder, masks, tables, facts)
        if finish is not None:
            finish(job, masks, folder)


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


def _write_report(
    job: Prepared,
    folder: Path,
    masks: Mapping[str, Masks],
    tables: Sequence[Table],
    facts: Callable[[], Mapping[str, str]],
) -> None:
    try:
        check_can_render()
    except UnsupportedError as error:  # the packages of an extra are missing
        _log.warning("%s", error)
        return
    page = render(f"vlp prune: {job.recipe.method}", [_section(job, masks, tables, facts())])
    (folder / "report.html").write_text(page, encoding="utf-8")


def _section(
    job: Prepared, masks: Mapping[str, Masks], tables: Sequence[Table], facts: Mapping[str, str]
) -> Run:
    return Run(
        f"{job.recipe.method} on {Path(str(job.recipe.model)).name}",
        command_of(job.recipe),
        inspect_model(job.model, job.adapter),
        masks,
        facts,
        tables,
    )


def _write_models(job: Prepared, folder: Path, masks: Mapping[str, Masks]) -> None:
    """One pruned model per mask set; the dense weights are back afterwards."""
    for title, each in masks.items():
        with restored(job.weights):
            each.apply(job.model, job.adapter)
            write_model(job.model, folder / f"model-{title}", source=job.recipe.model)


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        out: the folder; process 0 of several wrote it.
        masks: by title of their sparsity.
        facts: time, memory and data, as the report has them.
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
    finish: Finish | None = None,
) -> Result:
    """Prunes as the recipe says and writes `recipe.out` whole or not at all.

    The folder holds `masks-SPARSITY.safetensors`, `layers.csv`, `report.html`, `recipe.yaml`,
    `statistics.safetensors` if one pass over the data gathered some, `id-profile.json` if the
    intrinsic dimensions were measured, and with `save_model` a folder `model-SPARSITY`. While data
    is read, a checkpoint lies beside the folder as `OUT.checkpoint`, and the folder `OUT.work` of
    methods that run the model as they go and of measuring.

    In a process group (`torchrun`) all processes read the data and share the work on it; process 0
    writes.

    Args:
        recipe: what to do.
        progress: called with (batches done, batches in all or None).
        resume: continue from the checkpoint of an interrupted run.
        finish: called in process 0 with the job, the masks by title, and the folder before it gets
            its name: what it adds is there with the rest, or nothing is. It may change the model.

    Raises:
        VlpError: with one line that says what to do; nothing is written then.
    """
    need(recipe, "model", "out")
    out = Path(os.path.abspath(str(recipe.out)))  # noqa: PTH100  resolve() would follow links
    writes = rank_and_size()[0] == 0
    with claimed(out, writes=writes):
        return _run(recipe, out, writes, progress=progress, resume=resume, finish=finish)


def _run(
    recipe: Recipe,
    out: Path,
    writes: bool,
    *,
    progress: Progress | None,
    resume: bool,
    finish: Finish | None,
) -> Result:
    known = Statistics.load(recipe.statistics) if recipe.statistics is not None else None
    watch = StopWatch()
    job = prepare(recipe)
    if recipe.save_model:
        check_can_save(job.model)
    batches = job.batches() if job.method.reads_data and known is None else None
    watch.lap("loading")
    profile = None
    if isinstance(job.method, IdGuided):
        assert batches is not None
        profile = measure_profile(job, job.method, batches, out, progress=progress, resume=resume)
        job = job.guided(profile)
        watch.lap("intrinsic dimensions")
    statistics = None
    if isinstance(job.method, Procedure):
        keep = profile is not None
        made = run_procedure(
            job, job.method, batches, out, progress=progress, resume=resume, keep=keep
        )
        watch.lap("pruning")
    else:
        statistics = statistics_of(job, known, batches, out, progress=progress, resume=resume)
        if batches is not None:
            watch.lap("data pass")
        made = job.masks(statistics)
        watch.lap("masks")
    masks = dict(zip(map(title_of, job.targets), made, strict=True))
    tables = agreement(job, statistics, masks) if writes else []
    if any(table.rows for table in tables):
        watch.lap("masks of either half of the data")

    def facts() -> dict[str, str]:
        return {
            **watch.texts(),
            **memory_facts(next(job.model.parameters()).device),
            **data_facts(made[0], batches),
            **dimension_facts(profile),
            **size_facts(job, statistics, masks),
        }

    if writes:
        write_results(job, out, masks, statistics, tables, watch, facts, profile, finish)
    wait_for_all()
    delete_checkpoints(out)
    delete_work(out)
    rows = layer_rows(job.weights, list(masks.values()))
    return Result(out, masks, facts(), collapse_warnings(rows, list(masks), list(masks.values())))


def leftovers(out: Path) -> list[Path]:
    """What an interrupted run left beside its folder to go on from."""
    return [*checkpoints(out), *work_left(out)]
