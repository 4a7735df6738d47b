"""What a report says about a run: time, memory, data, and whether the data was enough."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.jobs.preparation import ModelSource, Prepared
from vlp_plugins.jobs.tasks import able_tasks
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.report.layers import sparse_bytes
from vlp_plugins.report.page import (
    Page,
    Section,
    Step,
    Table,
    Tile,
    check_can_render,
    span,
    write_page,
)
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.memory import peak_device_bytes, peak_resident_bytes, text_of
from vlp_plugins.runtime.model_state import arithmetic_of
from vlp_plugins.runtime.numbers import duration, percent, size

_log = logging.getLogger(__name__)
_steps = logging.getLogger("vlp_plugins.methods")
"""Where methods say what they are at; the command shows it."""

LARGE_STATISTICS = 10**9
"""Bytes beyond which statistics are written on request only."""
LACKING = "data that is lacking"
_ENOUGH = "Was that enough data?"
_OVERLAPS = ("sparsity", "modality", "equal elements", "kept by both / by either")


def write_report(folder: Path, page: Callable[[], Page]) -> None:
    """Writes report.html; without the package of the extra `report` it warns instead."""
    try:
        check_can_render()
    except UnsupportedError as error:
        _log.warning("%s", error)
        return
    write_page(page(), folder)


def step(text: str, *words: str) -> Step:
    """Something to do next, by the words after `vlp`."""
    return Step(text, shlex.join(("vlp", *words)))


def mask_steps(
    source: ModelSource, masks: str, adapter: Adapter, *, measured: str = "", stem: str = ""
) -> list[Step]:
    """What can be done with a mask file: measured (unless it was, on a task), applied, fine-tuned.

    Names of new folders begin with `stem`; without it they are named after the file.
    """
    file = Path(masks)
    named = f"{file.parent}-{file.stem.removeprefix('masks-')}" if file.parent.name else file.stem
    stem = stem or named
    adapted = [] if source.adapter is None else ["--adapter", source.adapter]
    processed = [] if source.processor is None else ["--processor", source.processor]
    typed = [] if source.dtype == ModelSource("").dtype else ["--dtype", source.dtype]
    steps = []
    tasks = able_tasks(adapter)
    if tasks and not measured:
        steps.append(
            step(
                "Measure what was lost, before and after. TEST_DATA is a folder that the pruning "
                "has not seen.",
                *("evaluate", source.model, "--task", tasks[0], "--data", "TEST_DATA"),
                *("--masks", masks, *adapted, *processed, *typed, "--out", f"{stem}-evaluated"),
            )
        )
    steps.append(
        step(
            "Save the pruned model, with zeros in place. Add --sparse to take less space.",
            *("masks", "apply", masks, source.model, *adapted, *typed, "--out", f"{stem}-model"),
        )
    )
    if tasks and type(adapter).downstream_model is not Adapter.downstream_model:
        task = measured if measured in tasks else tasks[0]  # no model is fine-tuned for a loss
        steps.append(
            step(
                "Fine-tune it with the zeros kept, to win back what was lost. One epoch, which is "
                "standard, is seldom enough: papers take 5 to 10 at 1e-5 to 5e-5, so begin with "
                "--epochs 10 --learning-rate 3e-5, and raise both on small data.",
                *("finetune", source.model, "--task", task, "--data", "TRAINING_DATA"),
                *("--masks", masks, *adapted, *processed, "--out", f"{stem}-tuned"),
            )
        )
    return steps


def part(table: Table, title: str = "", *, folded: bool = False) -> Section:
    """A table as a part of a page, under its own title or another one."""
    tables = [replace(table, title="")]
    return Section(title or table.title, tables=tables, folded=folded)


def size_tile(model: nn.Module, weights: WeightMap, masks: Sequence[Masks]) -> Tile:
    """What a model takes on a disk with each of some mask sets, dense and sparse."""
    dense = sum(each.numel() * each.element_size() for each in model.parameters())
    sparse = span([size(sparse_bytes(weights, each, dense)) for each in masks])
    note = f"saved with --sparse; {size(dense)} dense, or with zeros in place"
    return Tile("Size on disk", sparse, note)


SPEED = Tile("Speed", "as before", "zeros alone save space, not time, on usual hardware")


class StopWatch:
    """Seconds between laps, by what was done meanwhile."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, done: str) -> None:
        """Ends a lap."""
        now = time.perf_counter()
        self.laps[done] = now - self._last
        self._last = now

    def texts(self) -> dict[str, str]:
        """The laps in seconds."""
        return {name: f"{seconds:.1f} s" for name, seconds in self.laps.items()}


LONG = 60.0
"""Seconds from which a run says in advance how long it takes."""
_SAMPLE = 1.0
"""Seconds that batches are timed for, after the first, which is slower."""


class Forecast:
    """Progress that says once, after the first batches, how long all of them take if that is long.

    Of several processes each runs its share of the batches, so all take part in the sample. What a
    resumed run has seen already passes fast and foretells nothing.
    """

    def __init__(
        self,
        progress: Progress | None,
        rest: str = "",
        other_seconds: float = 0.0,
        *,
        resumed: bool = False,
    ) -> None:
        """Passes on to `progress`; `other_seconds` are seconds that are no batch's.

        `rest` ends the sentence: what the time is without, or what else it is for.
        """
        self._progress = progress
        self._rest = rest
        self._besides = other_seconds
        self._first: tuple[int, float] | None = None
        self._said = resumed

    def __call__(self, done: int, total: int | None) -> None:
        """Notes that so many batches are done, of so many in all."""
        if self._progress is not None:
            self._progress(done, total)
        if self._said or total is None:
            return
        now = time.perf_counter()
        first, start = self._first = self._first or (done, now)
        if now - start < _SAMPLE or done - first < rank_and_size()[1]:
            return
        self._said = True
        seconds = (now - start) / (done - first) * total + self._besides
        if seconds > LONG:
            _steps.info("about %s for %s batches%s", duration(seconds), f"{total:,}", self._rest)


def memory_facts(device: torch.device) -> dict[str, str]:
    """Peak memory until now."""
    facts = {"peak memory of the process": text_of(peak_resident_bytes())}
    if (on_device := peak_device_bytes(device)) is not None:
        facts["peak memory of the GPU"] = text_of(on_device)
    if device.type != "cpu":
        arithmetic = arithmetic_of(device).items()
        facts["arithmetic"] = ", ".join(f"{name}: {value}" for name, value in arithmetic)
    return facts


def source_facts(batches: CaptionedBatches) -> dict[str, str]:
    """Where batches came from, and what was left out or is missing."""
    source = batches.source
    facts = {
        "data": source.description,
        "images that could not be used": f"{source.skipped:,} of {source.seen:,}",
    }
    if batches.shortfalls:
        facts[LACKING] = "; ".join(batches.shortfalls)
    return facts


def data_facts(masks: Masks, batches: CaptionedBatches | None) -> dict[str, str]:
    """What was read, as the manifest of a mask set says; without batches, in an earlier run."""
    read = masks.manifest.calibration
    if read is None:
        if batches is None:
            return {"calibration data": "none needed"}
        return {"calibration data": "read by the allocation alone", **source_facts(batches)}
    if not {"samples", "batches", "fingerprint"} <= read.keys():  # of an outsider's method
        return {"calibration data": ", ".join(f"{name} {value}" for name, value in read.items())}
    facts = {
        "calibration data": f"{read['samples']:,} samples in {read['batches']:,} batches"
        + ("" if batches is not None else ", read in an earlier run"),
        "fingerprint of the data": str(read["fingerprint"]),
    }
    if batches is not None:
        facts |= source_facts(batches)
    if (world := rank_and_size()[1]) > 1:
        facts["processes"] = str(world)
    return facts


def dimension_facts(profile: IdProfile | None) -> dict[str, str]:
    """What intrinsic dimensions were measured from; nothing if none were."""
    if profile is None:
        return {}
    samples = max(layer.points for layer in profile.layers)
    return {"intrinsic dimensions": f"of {len(profile.layers)} layers, from {samples:,} samples"}


def size_facts(
    job: Prepared, statistics: Statistics | None, masks: Mapping[str, Masks]
) -> dict[str, str]:
    """What is large: statistics that are not written, and new weights that are."""
    facts = {}
    if statistics is not None and not keeps_statistics(job, statistics):
        amount = size(bytes_of_statistics(statistics))
        facts["statistics"] = f"{amount}, not written (--keep-statistics writes them)"
    sizes = {title: each.values_bytes for title, each in masks.items() if each.values_bytes}
    if sizes:
        listed = ", ".join(f"{size(amount)} at {title}" for title, amount in sizes.items())
        facts["new weights in the mask files"] = listed
    return facts


def keeps_statistics(job: Prepared, statistics: Statistics) -> bool:
    """Whether statistics are written: those of gradients are as large as the model itself."""
    return job.recipe.keep_statistics or bytes_of_statistics(statistics) <= LARGE_STATISTICS


def keeps_halves(job: Prepared, method: Composition) -> bool:
    """Whether gradients are summed over the even and the odd batches apart.

    That takes twice the memory, so it is left out where the sums would not be written either.
    """
    halves = method.statistics_bytes(job.weights, halves=True)
    return job.recipe.keep_statistics or halves <= LARGE_STATISTICS


def bytes_of_statistics(statistics: Statistics) -> int:
    """Bytes that they take, in memory and in a file."""
    return sum(sums.numel() * sums.element_size() for sums in statistics.sums.values())


def agreement(
    job: Prepared, statistics: Statistics | None, masks: Mapping[str, Masks]
) -> list[Table]:
    """How alike the masks from either half of the batches are: was that enough data?

    No table for a method without data, and one that says why for a procedure.
    """
    if not job.method.reads_data:
        return []
    if statistics is None:
        return [Table(_ENOUGH, _OVERLAPS, [], f"{job.method.name} {_AS_IT_GOES}")]
    if not statistics.has_halves:
        return [Table(_ENOUGH, _OVERLAPS, [], _TOGETHER)]
    rows = []
    if min(statistics.samples) > 0:
        halves = [job.masks(statistics, half=half) for half in (0, 1)]
        for title, one, other in zip(masks, *halves, strict=True):
            overlaps = one.compare(other)
            rows += [
                [title, name, percent(o.agreement), f"{o.iou:.3f}"] for name, o in overlaps.items()
            ]
    note = (
        "Masks from the even and the odd batches alone, compared: the split-half agreement. The "
        "closer to 100%, the less more data would change."
        if rows
        else "There was a single batch, so there are no two halves to compare. Give more batches."
    )
    return [Table(_ENOUGH, _OVERLAPS, rows, note)]


_TOGETHER = (
    "Gradients are summed over all batches, which takes half of the memory: there are no two "
    "halves to compare. With --keep-statistics they are kept, and compared here."
)
_AS_IT_GOES = (
    "runs the model as it goes: there are no statistics of either half of the data that two mask "
    "sets could be made from. To see what other data would change, run it again with another "
    "--shuffle-seed and compare the masks by `vlp masks diff`."
)
