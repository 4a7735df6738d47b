"""Runs a recipe: from its names to a folder of results, whole or not at all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlp_plugins.atomic import check_new_folder
from vlp_plugins.calibration import calibrate
from vlp_plugins.calibration.processes import place
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.errors import DataError, VlpError
from vlp_plugins.job.facts import StopWatch, agreement, data_facts, memory_facts
from vlp_plugins.job.prepared import Prepared, prepare, title_of
from vlp_plugins.job.writing import write_results
from vlp_plugins.launch import wait_for_all
from vlp_plugins.masks import Masks
from vlp_plugins.recipes import Recipe, need
from vlp_plugins.report.layers import collapse_warnings, layer_rows
from vlp_plugins.saving import check_can_save
from vlp_plugins.statistics.store import Statistics

_log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]


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


def run(recipe: Recipe, *, progress: Progress | None = None, resume: bool = False) -> Result:
    """Prunes as the recipe says and writes `recipe.out` whole or not at all.

    The folder holds `masks-SPARSITY.safetensors`, `layers.csv`, `report.html`, `recipe.yaml`,
    `statistics.safetensors` if data was read, and with `save_model` a folder `model-SPARSITY`.
    While data is read, a checkpoint lies beside the folder as `OUT.checkpoint`.

    In a process group (`torchrun`) all processes read the data and share the work on it; process 0
    writes.

    Args:
        recipe: what to do.
        progress: called with (batches done, batches in all or None).
        resume: continue from the checkpoint of an interrupted run.

    Raises:
        VlpError: with one line that says what to do; nothing is written then.
    """
    need(recipe, "model", "out")
    out = Path(os.path.abspath(str(recipe.out)))  # noqa: PTH100  resolve() would follow links
    writes = place()[0] == 0
    if writes:
        check_new_folder(out)
    known = Statistics.load(recipe.statistics) if recipe.statistics is not None else None
    watch = StopWatch()
    job = prepare(recipe)
    if recipe.save_model:
        check_can_save(job.model)
    batches = job.batches() if job.method.needs and known is None else None
    watch.lap("loading")
    statistics = _statistics(job, known, batches, out, progress=progress, resume=resume)
    if batches is not None:
        watch.lap("data pass")
    masks = dict(zip(map(title_of, job.targets), job.masks(statistics), strict=True))
    watch.lap("masks")
    tables = agreement(job, statistics, masks) if writes else []
    if any(table.rows for table in tables):
        watch.lap("masks of either half of the data")

    def facts() -> dict[str, str]:
        return {
            **watch.texts(),
            **memory_facts(next(job.model.parameters()).device),
            **data_facts(statistics, batches.source if batches is not None else None),
        }

    if writes:
        write_results(job, out, masks, statistics, tables, watch, facts)
    wait_for_all()
    _delete_checkpoints(out)
    rows = layer_rows(job.weights, list(masks.values()))
    return Result(out, masks, facts(), collapse_warnings(rows, list(masks)))


def checkpoint_of(out: Path) -> Path:
    """Where the data pass of a run keeps its state; each of several processes adds its mark."""
    return out.with_name(f"{out.name}.checkpoint")


def checkpoints(out: Path) -> list[Path]:
    """The files that are there, of one process or of several."""
    base = checkpoint_of(out)
    pattern = re.compile(re.escape(base.name) + r"(\.rank\d+of\d+)?")
    if not base.parent.is_dir():
        return []
    return sorted(path for path in base.parent.iterdir() if pattern.fullmatch(path.name))


def _statistics(
    job: Prepared,
    known: Statistics | None,
    batches: CaptionedBatches | None,
    out: Path,
    *,
    progress: Progress | None,
    resume: bool,
) -> Statistics | None:
    if not job.method.needs:
        return None
    if batches is None:
        assert known is not None
        known.check(job.weights, published=job.published)
        return known
    with _checkpoints_kept_if_useful(out, batches, resumed=resume):
        return calibrate(
            job.model,
            job.adapter,
            job.weights,
            batches,
            job.method.needs,
            published=job.published,
            checkpoint=checkpoint_of(out),
            checkpoint_every=job.recipe.checkpoint_every,
            resume=resume,
            progress=progress,
        )


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
                _delete_checkpoints(out)
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


def _delete_checkpoints(out: Path) -> None:
    for path in checkpoints(out):
        path.unlink(missing_ok=True)
