"""`vlp evaluate` from end to end: load, measure, apply masks, measure again, write a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.jobs.comparison import Score
from vlp_plugins.jobs.facts import (
    SPEED,
    StopWatch,
    mask_steps,
    memory_facts,
    part,
    size_tile,
    step,
    write_report,
)
from vlp_plugins.jobs.metrics import TaskMetrics, shown, title_of, titles_of
from vlp_plugins.jobs.preparation import Loaded
from vlp_plugins.jobs.tasks import Task, TaskRequest, Tracker, open_task
from vlp_plugins.jobs.work_dir import claimed
from vlp_plugins.masks.masks import Masks
from vlp_plugins.report.layers import whole_sparsity
from vlp_plugins.report.page import Page, Table, Tile
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.numbers import count, percent
from vlp_plugins.tasks import LOSS

_NOTES = {
    "retrieval": "Percent of queries that find a partner among the first k.",
    "captioning": "Times 100. Higher is better.",
    "vqa": "Percent: an answer is right if three people gave it, min(n/3, 1) over all but one.",
    "classification": "Percent of images whose class is among the first k.",
    LOSS: "Mean over the batches, of a chat model over the tokens of answers. Lower is better.",
    "nlvr2": "Percent of statements judged rightly; guessing gives about 50.",
}
_LEADING = ("image_to_text_r1", "text_to_image_r1", "accuracy", "top1", "cider", "bleu4")
_SHOWN_EXAMPLES, _SHOWN_TILES = 20, 3


def metrics_table(found: Evaluation) -> Table:
    """One row per metric: before, after, the difference."""
    header = ["metric", "model"] if found.after is None else ["metric", "before", "after", "change"]
    rows = []
    for name, title in titles_of(found.before.metrics).items():
        value = found.before.metrics[name]
        row = [title, shown(value)]
        if found.after is not None:
            pruned = found.after.metrics.get(name, math.nan)
            row += [shown(pruned), f"{pruned - value:+.2f}"]
        rows.append(row)
    return Table(f"{found.task} on {found.data}", header, rows, _NOTES.get(found.task, ""))


def sentences(found: Evaluation) -> list[str]:
    """What is worth saying: what the masks are, and which metrics are absent."""
    texts = []
    if found.masks is not None:
        texts.append(
            f"After: with masks of {found.masks['method']} at {found.masks['sparsity']:.2%} "
            f"sparsity ({_by_modality(found.masks['by modality'])})."
        )
        if found.masks["new weights"] is False:
            texts.append(
                "The new weights of the masks were left out, so that what the model has learned "
                "since they were computed stays."
            )
    absent = dict(found.before.absent) | dict(found.after.absent if found.after else {})
    texts += [f"{title_of(name)} is absent: {reason}." for name, reason in absent.items()]
    return texts


def page_of(found: Evaluation, loaded: Loaded, masks: Masks | None, command: str) -> Page:
    """The page."""
    source = loaded.source.model
    name, task = Path(source).name, found.task
    if task in ("vqa", "nlvr2"):
        task = task.upper()
    sections = [part(metrics_table(found), "All metrics")]
    if found.before.texts:
        after = found.after.texts if found.after is not None else None
        rows = [
            [text] if after is None else [text, after[number]]
            for number, text in enumerate(found.before.texts[:_SHOWN_EXAMPLES])
        ]
        header = ["model"] if after is None else ["before", "after"]
        note = "The first examples; all of them are in said.jsonl."
        sections.append(part(Table("What the model says", header, rows, note)))
    elements = sum(each.numel() for each in loaded.model.parameters())
    tiles = [
        *_metric_tiles(found),
        Tile("Model", name, f"{count(elements)} parameters"),
    ]
    pruned = ""
    if masks is None or found.masks is None:
        text = "Find out which method prunes it best. TRAINING_DATA is a folder of its data."
        data = ("--data", "TRAINING_DATA", "--out", "compared")
        steps = [step(text, "compare", source, "--task", found.task, *data)]
    else:
        pruned = f", before and after pruning by {masks.manifest.method}"
        by_modality = _by_modality(found.masks["by modality"])
        whole = percent(found.masks["sparsity of the whole model"])
        tiles += [
            Tile("Method", masks.manifest.method),
            Tile("Sparsity of the prunable part", percent(masks.sparsity), by_modality),
            Tile("Sparsity of the whole model", whole, "what is not pruned counts as well"),
            size_tile(loaded.model, loaded.weights, [masks]),
            SPEED,
        ]
        file = str(found.masks["file"])
        steps = mask_steps(loaded.source, file, loaded.adapter, measured=found.task)
    said = sentences(found)[found.masks is not None :]  # the tiles say what the masks are
    if found.before.by_sample:
        samples = len(next(iter(found.before.by_sample.values())))
        said.append(f"\u00b1 is one standard error over {samples:,} samples.")
    return Page(
        f"{name}: {task}{pruned}",
        command,
        f"{name} was measured by {task} on {found.data}{pruned}.",
        tiles,
        [],
        said,
        steps,
        sections,
        {**{key: str(value) for key, value in found.settings.items()}, **found.facts},
    )


def _metric_tiles(found: Evaluation) -> list[Tile]:
    """The metrics that matter most, before and after."""
    titles, tiles = titles_of(found.before.metrics), []
    for name in [each for each in titles if each in _LEADING] or list(titles)[:_SHOWN_TILES]:
        value = found.before.metrics[name]
        text, before = _short(found.task, value), _score(found.before, name)
        note = "" if before is None else f"\u00b1 {before.error:.1f}"
        if found.after is not None:
            pruned, after = found.after.metrics.get(name, math.nan), _score(found.after, name)
            text += f" \u2192 {_short(found.task, pruned)}"
            digits = 2 if found.task == LOSS else 1
            change = f"{pruned - value:+.{digits}f}"
            if before is not None and after is not None:
                change += f" \u00b1 {after.minus(before).error:.{digits}f}"
            unit = "" if found.task == LOSS else " points"
            note = f"{change}{unit} by pruning" if math.isfinite(pruned - value) else ""
            if before is not None and after is not None and not after.differs_from(before):
                note += ", which may be chance"
        tiles.append(Tile(titles[name], text, note))
    return tiles


def _score(measured: TaskMetrics, metric: str) -> Score | None:
    """A metric with its standard error over the samples; None if they are not known."""
    values = measured.by_sample.get(metric)
    return None if values is None else Score.of(torch.tensor([list(values)], dtype=torch.float64))


def _short(task: str, value: float) -> str:
    """A metric with one digit; scores of captions are not fractions, and a loss is small."""
    if task == LOSS or not math.isfinite(value):
        return shown(value)
    return f"{value:.1f}" if task == "captioning" else percent(value / 100)


def _by_modality(sparsities: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in sparsities.items())


RECORD = "evaluation.json"
SCHEMA = 1
"""Of `RECORD`; a change that old code cannot read adds 1."""


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        before: figures of the model as it was loaded.
        after: figures with the masks; None without masks.
        masks: about the masks: method, sparsity, note, whether their new weights were written (None
            if they have none); None without masks.
        settings: what else than model and data decides the figures.
        out: the folder; None if nothing was written.
    """

    task: str
    data: str
    before: TaskMetrics
    after: TaskMetrics | None
    masks: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    facts: Mapping[str, str]
    out: Path | None
    record: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    load: Callable[[], Loaded],
    request: TaskRequest,
    *,
    masks: Path | None = None,
    new_weights: bool | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a model on a task, before and after the masks of a file.

    New weights that the masks bring are written if `new_weights` says so, or, where it is None, if
    they were computed from the weights of this model, as what a model has learned since is to be
    measured. The folder has evaluation.json, report.html and, where models say something,
    said.jsonl; without `out` nothing is written. For the other arguments see `vlp_plugins.jobs`.

    Raises:
        VlpError: if an option is not one of the task, or model, masks or data do not fit.
    """
    with (
        nullcontext()
        if out is None
        else claimed(out, writes=True, mark=RECORD, overwrite=overwrite) as results
    ):
        request.check()
        chosen = None if masks is None else Masks.load(masks)
        watch = StopWatch()
        loaded = load()
        if chosen is not None:
            chosen.match(loaded.weights)  # masks that do not fit show before the model is measured
        task = open_task(loaded, request)
        watch.lap("loading")
        track = Tracker(progress, passes=1 if chosen is None else 2)
        before = task.measure(track)
        watch.lap("measuring")
        after = None
        if chosen is not None:
            if chosen.new_values is not None and new_weights is None:
                new_weights = chosen.made_from(loaded.weights)
            chosen.apply(loaded.model, loaded.adapter, values=new_weights is not False)
            after = task.measure(track)
            watch.lap("measuring with masks")
        found = Evaluation(
            task.name,
            task.data.description,
            before,
            after,
            None if chosen is None else {"file": str(masks), **_about(chosen, loaded, new_weights)},
            task.settings(),
            {**watch.texts(), **memory_facts(loaded.device)},
            results,
        )
        found = replace(found, record=_record(found, loaded, command))
        if results is not None:
            with atomic_folder(results, mark=RECORD, overwrite=overwrite) as folder:
                record = json.dumps(found.record, indent=1)
                (folder / RECORD).write_text(record, encoding="utf-8")
                if task.truth:
                    (folder / "said.jsonl").write_text(_texts(found, task), encoding="utf-8")
                write_report(folder, lambda: page_of(found, loaded, chosen, command))
        return found


def _about(masks: Masks, loaded: Loaded, new_weights: bool | None) -> dict[str, Any]:
    manifest = masks.manifest
    counts = masks.counts()
    return {
        "method": manifest.method,
        "sparsity": counts.all.sparsity,
        "sparsity of the whole model": whole_sparsity(loaded.model, loaded.weights, masks),
        "by modality": {name: count.sparsity for name, count in counts.by_modality.items()},
        "note": manifest.note,
        "new weights": None if masks.new_values is None else new_weights,
    }


def _record(found: Evaluation, loaded: Loaded, command: str) -> dict[str, Any]:
    return {
        **loaded.record(SCHEMA, command),
        "task": found.task,
        "data": found.data,
        "settings": dict(found.settings),
        "masks": found.masks,
        "before": _figures(found.before),
        "after": None if found.after is None else _figures(found.after),
    }


def _figures(found: TaskMetrics) -> dict[str, Any]:
    return {"metrics": dict(found.metrics), "absent": dict(found.absent)}


def _texts(found: Evaluation, task: Task) -> str:
    """One JSON object a line: the place, what people wrote, what the model wrote."""
    rows = []
    for number, (place, truth) in enumerate(task.truth):
        row = {"place": place, "people": list(truth), "before": found.before.texts[number]}
        if found.after is not None:
            row["after"] = found.after.texts[number]
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(rows)
