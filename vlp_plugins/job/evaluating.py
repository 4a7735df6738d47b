"""`vlp evaluate` from end to end: load, measure, apply masks, measure again, write a folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp_plugins.job.evaluation_page import findings_of
from vlp_plugins.job.facts import StopWatch, memory_facts
from vlp_plugins.job.loaded import Loaded
from vlp_plugins.job.task_kinds import TASKS
from vlp_plugins.job.tasks import Measured, Task, TaskRequest
from vlp_plugins.job.workplace import claimed
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.report.page import check_can_render, render_findings
from vlp_plugins.runtime.artifacts import made_by, versions
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.files import atomic_folder

_log = logging.getLogger(__name__)

SCHEMA = 1
"""Of evaluation.json; a change that old code cannot read adds 1."""

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        task: its name.
        data: what was measured on.
        before: figures of the model as it was loaded.
        after: figures with the masks; None without masks.
        masks: about the masks: method, sparsity, note, whether their new weights were written (None
            if they have none); None without masks.
        settings: what decides the figures beside model and data.
        facts: time and memory.
        out: the folder; None if nothing was written.
    """

    task: str
    data: str
    before: Measured
    after: Measured | None
    masks: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    facts: Mapping[str, str]
    out: Path | None


def evaluate(
    load: Callable[[], Loaded],
    request: TaskRequest,
    *,
    masks: Path | None = None,
    new_weights: bool | None = None,
    out: Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a model on a task, before and after masks.

    Args:
        load: gives the model, after the folder of results was found to be free.
        request: what to measure on.
        masks: a mask file; None measures the model as it is.
        new_weights: whether those that the masks bring are written; None: if they were computed
            from the weights of this model, as what a model has learned since is to be measured.
        out: new folder for evaluation.json, report.html and, where models say something,
            said.jsonl; None writes nothing.
        command: repeats the run, for the report.
        progress: is told how many batches are done, and of how many.

    Raises:
        VlpError: with one line that says what to do; nothing is written then.
    """
    folder = None if out is None else Path(os.path.abspath(out))  # noqa: PTH100  keeps links
    with nullcontext() if folder is None else claimed(folder, writes=True):
        return _evaluated(
            load, request, folder, masks=masks, new_weights=new_weights, command=command,
            progress=progress,
        )  # fmt: skip


def _evaluated(
    load: Callable[[], Loaded],
    request: TaskRequest,
    folder: Path | None,
    *,
    masks: Path | None,
    new_weights: bool | None,
    command: str,
    progress: Progress | None,
) -> Evaluation:
    request.check()
    chosen = None if masks is None else Masks.load(masks)
    watch = StopWatch()
    loaded = load()
    if chosen is not None:
        chosen.match(loaded.weights)  # masks that do not fit show before the model is measured
    task = TASKS[request.task](loaded, request)
    if request.split is None and task.description.endswith("(train)"):
        _log.warning("measured on %s; --split takes another part of the data", task.description)
    watch.lap("loading")
    counting = _Counting(progress, passes=1 if chosen is None else 2)
    before = task.measure(counting)
    watch.lap("measuring")
    after = None
    if chosen is not None:
        if chosen.new_values is not None and new_weights is None:
            new_weights = chosen.made_from(loaded.weights)
        chosen.apply(loaded.model, loaded.adapter, values=new_weights is not False)
        after = task.measure(counting)
        watch.lap("measuring with masks")
    device = next(loaded.model.parameters()).device
    result = Evaluation(
        request.task,
        task.description,
        before,
        after,
        None if chosen is None else {"file": str(masks), **_about(chosen, new_weights)},
        task.settings(),
        {**watch.texts(), **memory_facts(device)},
        folder,
    )
    if folder is not None:
        _write(result, task, loaded, folder, command)
    return result


class _Counting:
    """Tells how many batches of all passes are done."""

    def __init__(self, progress: Progress | None, passes: int) -> None:
        self._progress, self._passes, self._done = progress, passes, 0

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        total = self._passes * len(batches)  # type: ignore[arg-type]
        for batch in batches:
            yield batch
            self._done += 1
            if self._progress is not None:
                self._progress(min(self._done, total), total)


def _about(masks: Masks, new_weights: bool | None) -> dict[str, Any]:
    manifest = masks.manifest
    counts = masks.counts()
    return {
        "method": manifest.method,
        "sparsity": counts.all.sparsity,
        "by modality": {name: count.sparsity for name, count in counts.by_modality.items()},
        "note": manifest.note,
        "new weights": None if masks.new_values is None else new_weights,
    }


def _write(result: Evaluation, task: Task, loaded: Loaded, out: Path, command: str) -> None:
    record = {
        "schema": SCHEMA,
        "made_by": made_by(),
        "versions": versions(),
        "command": command,
        "model": loaded.source.model,
        "adapter": loaded.adapter.name,
        "task": result.task,
        "data": result.data,
        "settings": dict(result.settings),
        "masks": result.masks,
        "before": _figures(result.before),
        "after": None if result.after is None else _figures(result.after),
    }
    with atomic_folder(out) as folder:
        (folder / "evaluation.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if task.truth:
            (folder / "said.jsonl").write_text(_said(result, task), encoding="utf-8")
        try:
            check_can_render()
        except UnsupportedError as error:  # the packages of an extra are missing
            _log.warning("%s", error)
            return
        page = render_findings(findings_of(result, loaded.source.model, command))
        (folder / "report.html").write_text(page, encoding="utf-8")


def _figures(found: Measured) -> dict[str, Any]:
    return {"metrics": dict(found.metrics), "absent": dict(found.absent)}


def _said(result: Evaluation, task: Task) -> str:
    """One JSON object a line: the place, what people said, what the model said before and after."""
    rows = []
    for number, (place, truth) in enumerate(task.truth):
        row: dict[str, Any] = {
            "place": place,
            "people": truth,
            "before": result.before.said[number],
        }
        if result.after is not None:
            row["after"] = result.after.said[number]
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(rows)
