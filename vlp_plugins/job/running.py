"""Runs a recipe: from its names to a folder of results, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.job.data_pass import Progress, checkpoints, delete_checkpoints, statistics_of
from vlp_plugins.job.facts import (
    StopWatch,
    agreement,
    data_facts,
    dimension_facts,
    memory_facts,
    size_facts,
)
from vlp_plugins.job.prepared import prepare, title_of
from vlp_plugins.job.procedure import measure_profile, run_procedure
from vlp_plugins.job.workplace import claimed, delete_work, work_left
from vlp_plugins.job.writing import Finish, write_results
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Procedure
from vlp_plugins.models.saving import check_can_save
from vlp_plugins.recipes.command import need
from vlp_plugins.recipes.recipe import Recipe
from vlp_plugins.report.layers import collapse_warnings, layer_rows
from vlp_plugins.runtime.distributed import rank_and_size, wait_for_all


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
