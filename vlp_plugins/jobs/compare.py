"""`vlp compare` from end to end: every method at every sparsity, measured, in a folder."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.calibration.data_pass import Progress
from vlp_plugins.calibration.moments import distinct
from vlp_plugins.data.batches import ExampleBatches
from vlp_plugins.jobs import COMPARED
from vlp_plugins.jobs.comparison import (
    DENSE,
    Cell,
    Comparison,
    page_of,
    record_of,
    titled,
    to_csv,
)
from vlp_plugins.jobs.facts import StopWatch, mask_steps, memory_facts, write_report
from vlp_plugins.jobs.held_out import CompareRequest, in_memory, open_data, task_of
from vlp_plugins.jobs.metrics import TaskMetrics
from vlp_plugins.jobs.plan import timing_by_blocks, timing_of
from vlp_plugins.jobs.preparation import Loaded, title_of
from vlp_plugins.jobs.samples import TaskSamples
from vlp_plugins.jobs.tasks import Task
from vlp_plugins.jobs.work_dir import claimed, working
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition, gather
from vlp_plugins.methods.method import Context, Method, Procedure
from vlp_plugins.methods.resolve import resolve_method, resolve_targets
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.request import Target
from vlp_plugins.models.saving import restored
from vlp_plugins.report.page import Step
from vlp_plugins.runtime.artifacts import Format
from vlp_plugins.runtime.checkpoint import Checkpoint, Content, Tensors
from vlp_plugins.runtime.errors import (
    OutputError,
    RecipeError,
    UnsupportedError,
    VlpError,
    no_exit,
)
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.untrusted import read_as

RECORD = "compare.json"
SCHEMA = 1
"""Of `RECORD`; a change that old code cannot read adds 1."""
BATCHES = 16
"""Calibration batches, if their number is not given."""

_FORM = Format(
    "comparison",
    "vlp_comparison",
    1,
    OutputError,
    "start again without --resume, or give another --out",
)


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison is about to do.

    Attributes:
        left_out: by method, why it cannot be compared, as far as two batches show.
        cells: mask sets to make and to measure.
        done: how many of them an earlier run has measured.
        pruning_seconds: estimated; None if a method cannot say.
    """

    facts: Mapping[str, str]
    left_out: Mapping[str, str]
    cells: int
    done: int
    pruning_seconds: float | None
    measuring_seconds: float


@dataclass(frozen=True)
class CompareResult:
    """What a run found; `apply` has by sparsity the command that applies the best masks."""

    comparison: Comparison
    facts: Mapping[str, str]
    apply: Mapping[str, str]
    record: Mapping[str, Any]
    out: Path


def compare(
    load: Callable[[], Loaded],
    request: CompareRequest,
    out: Path,
    *,
    command: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    begin: Callable[[ComparisonPlan], None] | None = None,
) -> CompareResult:
    """Prunes with every method at every sparsity, measures, and writes `out` whole or not at all.

    The folder has compare.csv, compare.json, report.html and the folder masks. While it works, the
    folder `OUT.work` next to it keeps every mask set that is made and every cell that is measured;
    methods, sparsities and seeds of a resumed run may be others. `begin` is called once the dense
    model is measured. For the other arguments see `vlp_plugins.jobs`.

    Raises:
        VlpError: if data or a method is missing, the model can do no such task, or `out` is taken.
    """
    with claimed(out, writes=True, mark=RECORD, overwrite=overwrite) as results:
        targets, _ = resolve_targets(list(request.sparsity))
        titles = [title_of(target) for target in targets]
        if len(set(titles)) < len(titles):
            raise RecipeError(f"a sparsity is given twice: {', '.join(titles)}")
        methods, left_out = _resolved(request, targets)
        watch = StopWatch()
        loaded = load()
        task, pool = open_data(loaded, request)
        task.batches = in_memory(task.batches)
        watch.lap("loading")
        with working(results, resume=resume) as work:
            run = _Run(
                loaded, request, task, pool, methods, left_out, work=work, resume=resume
            )  # fmt: skip
            found = run.compare(progress, begin)
            watch.lap("pruning and measuring")
            facts = {**run.facts(), **watch.texts(), **memory_facts(loaded.device)}
            files = {s: _relative(results / found.winner(s).masks) for s in found.sparsities}
            then = {
                each: mask_steps(
                    loaded.source, file, loaded.adapter, measured=found.task,
                    stem=f"{_relative(results)}-{Path(file).stem}",
                )
                for each, file in files.items()
            }  # fmt: skip
            apply = {each: steps[0].command for each, steps in then.items()}
            with atomic_folder(results, mark=RECORD, overwrite=overwrite) as folder:
                (folder / MASKS).mkdir()
                for file in {cell.masks for cell in found.cells}:
                    shutil.copy2(work / Path(file).name, folder / file)
                record = {**loaded.record(SCHEMA, command), **record_of(found), "data": run.facts()}
                text = json.dumps(record, indent=1, ensure_ascii=False)
                (folder / RECORD).write_text(text + "\n", encoding="utf-8")
                (folder / "compare.csv").write_text(to_csv(found), encoding="utf-8")
                winners = [Masks.load(folder / found.winner(s).masks) for s in found.sparsities]
                saved = [
                    Step(f"Save the model with the best masks at {titled(each)}.", command)
                    for each, command in apply.items()
                ]
                steps = [*saved, *list(then.values())[-1][1:]]  # and fine-tune the last
                write_report(
                    folder, lambda: page_of(found, loaded, winners, steps, facts, command)
                )  # fmt: skip
        return CompareResult(found, facts, apply, record, results)


MASKS = "masks"
_ODD = r"[^\w.+-]"
"""Characters that names of files should not have, as in `id*omp`."""


def _relative(path: Path) -> str:
    """The path as one would write it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _resolved(
    request: CompareRequest, targets: Sequence[Target]
) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods by name, and why some cannot be made; an unknown name is an error."""
    methods, left_out = {}, {}
    for name in request.methods or COMPARED:
        try:
            methods[name] = resolve_method(name, None, targets, {})
        except UnsupportedError as error:
            left_out[name] = str(error)
    return methods, left_out


class _Run:
    """One comparison at work.

    What is done lies in the folder of work: a file of each mask set, and the state, a checkpoint of
    all cells that are measured.
    """

    def __init__(
        self,
        loaded: Loaded,
        request: CompareRequest,
        task: Task,
        pool: TaskSamples,
        methods: dict[str, Method],
        left_out: dict[str, str],
        *,
        work: Path,
        resume: bool,
    ) -> None:
        self.loaded, self.request, self.task, self.pool = loaded, request, task, pool
        self.targets = {title_of(target): target for target in request.sparsity}
        self.methods, self.left_out = methods, left_out
        self.work, self.resume = work, resume
        self.seeds = [request.seed + index for index in range(request.seeds)]
        size = request.data.batch_size
        # Several sets must differ, so that each has half of the samples at most.
        most = len(pool.samples) // (2 if request.seeds > 1 else 1)
        self.count = min((request.data.batches or BATCHES) * size, most)
        if self.count > size > 1 and self.count % size == 1:
            self.count -= 1  # a single sample in the last batch has no negatives
        self.dense: TaskMetrics | None = None
        self.cells: dict[tuple[str, str, int], Cell] = {}
        self.seconds: dict[str, float] = {}
        file = work / "comparison.safetensors"
        self.state = Checkpoint(file, _FORM, self._identity(), unit="cell")
        if resume and file.exists():
            self.state.load(self._unpack)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for cells to be used again."""
        weights, task = self.loaded.weights, self.task
        samples = [(s.place, *s.texts, *s.answers, s.label)
                   for part in (task.data, self.pool) for s in part.samples]  # fmt: skip
        return {
            "model": [weights.structure, weights.content_hash()],
            "adapter": self.loaded.adapter.name,
            "task": task.name,
            "data": [task.data.description, self.pool.description],
            "samples": hashlib.sha256(repr(samples).encode()).hexdigest()[:16],
            "calibration samples": self.count,
            "batch size": self.request.data.batch_size,
            "max length": self.request.data.max_length,
            "processor": self.loaded.source.processor,
            "seed": self.request.seed,
        }

    def facts(self) -> dict[str, str]:
        """What was calibrated with and measured on."""
        test, pool = self.task.data, self.pool
        what = "questions" if self.task.name == "vqa" else "images"
        several = f", {len(self.seeds)} times other ones" if len(self.seeds) > 1 else ""
        return {
            "task": self.task.name,
            "measured on": f"{len(test.samples):,} {what} of {test.description}",
            "calibrated with": f"{self.count:,} {what} of {pool.description}{several}",
        }

    def compare(
        self, progress: Progress | None, begin: Callable[[ComparisonPlan], None] | None
    ) -> Comparison:
        """Makes and measures what is missing."""
        if self.dense is None:
            start = time.perf_counter()
            self.dense = self._measured()
            self.seconds[DENSE] = time.perf_counter() - start
            self.state.save(self._pack)
        measuring = self.seconds[DENSE]
        pruning = self._try_methods()
        todo = sum(key not in self.cells for key in self._keys())
        if begin is not None:
            cells = len(self._keys())
            begin(
                ComparisonPlan(
                    self.facts(),
                    dict(self.left_out),
                    cells,
                    cells - todo,
                    pruning if todo else 0.0,
                    todo * measuring,
                )
            )
        for seed in self.seeds:
            self._prune_at_once(seed)
            for name in list(self.methods):
                with self._or_left_out(name):
                    self._prune_alone(name, seed)
                    for title in self.targets:
                        self._measure(name, title, seed)
                        if progress is not None:
                            keys = self._keys()
                            progress(sum(key in self.cells for key in keys), len(keys))
        self._check_any()
        return Comparison(
            self.task.name,
            self.task.score,
            self.task.lower_is_better,
            sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            self.dense,
            tuple(self.cells[key] for key in self._keys()),
            dict(self.left_out),
        )

    def _keys(self) -> list[tuple[str, str, int]]:
        """Of all cells, in order of sparsity, method and seed."""
        return [(m, title, s) for title in self.targets for m in self.methods for s in self.seeds]

    def _check_any(self) -> None:
        if not self.methods:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
            raise UnsupportedError(f"no method can be compared: {reasons}")

    @contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        """Leaves a method out, with the reason, if it cannot do what is asked."""
        try:
            with no_exit(f"method {name!r}"):
                yield
        except (OutputError, MemoryError):
            raise
        except Exception as error:  # a plug-in may raise anything
            del self.methods[name]
            known = isinstance(error, VlpError)
            self.left_out[name] = str(error) if known else f"{type(error).__name__}: {error}"

    def _try_methods(self) -> float | None:
        """Seconds of pruning, from two batches; methods that fail on them are left out.

        None if a method cannot say how long it takes.
        """
        two = list(islice(self._batches(self.seeds[0]), 2))
        batches = -(-self.count // self.request.data.batch_size)
        context = self._context(two, self.seeds[0])
        seconds: float | None = 0.0
        for name, method in list(self.methods.items()):
            with self._or_left_out(name):
                method.check(context)
                if name in self._of_one_pass():
                    self._of_one_pass()[name].gather(replace(context, limit=1))
                elif isinstance(method, Composition):
                    walk = timing_by_blocks(method, replace(context, limit=batches), two)
                    seconds = None if seconds is None else seconds + (walk.seconds or 0.0)
                elif isinstance(method, Procedure):
                    cost = method.cost(
                        replace(context, batches=(), limit=batches, workplace=self.work)
                    )
                    needed = timing_of(method, cost, context, two).seconds
                    seconds = None if seconds is None or needed is None else seconds + needed
        self._check_any()
        ends = [time.perf_counter()]
        needs = [need for method in self._of_one_pass().values() for need in method.needs]
        if needs:
            gather(needs, replace(context, progress=lambda *_: ends.append(time.perf_counter())))
            per_batch = min(later - earlier for earlier, later in pairwise(ends))
            seconds = None if seconds is None else seconds + batches * per_batch
        return None if seconds is None else seconds * len(self.seeds)

    def _of_one_pass(self) -> dict[str, Composition]:
        """The methods whose masks are made from statistics of the dense model; others walk."""
        context = self._context((), self.request.seed)
        return {
            name: method
            for name, method in self.methods.items()
            if isinstance(method, Composition) and method.walk_of(context) == "model"
        }

    def _batches(self, seed: int) -> Collection[Batch] | ExampleBatches:
        """The calibration samples of a seed, in stored order, each with one caption."""
        pool = self.pool.samples
        drawn = random.Random(f"calibration {seed}").sample(range(len(pool)), self.count)
        samples = (pool[number] for number in sorted(drawn))
        part = replace(self.pool, samples=tuple(replace(s, texts=s.texts[:1]) for s in samples))
        task = task_of(self.loaded, self.request, self.task.name, part)
        return in_memory(task.calibration())

    def _context(self, batches: Iterable[Batch], seed: int) -> Context:
        loaded, targets = self.loaded, list(self.targets.values())
        return Context(
            loaded.model,
            loaded.adapter,
            loaded.weights,
            batches=batches,
            targets=targets,
            seed=seed,
        )

    def _masks_file(self, name: str, title: str, seed: int) -> Path:
        run = "" if seed == self.seeds[0] else f"-seed{seed}"
        return self.work / f"{re.sub(_ODD, '-', name)}-{title}{run}.safetensors"

    def _is_pruned(self, name: str, seed: int) -> bool:
        return all(self._masks_file(name, title, seed).exists() for title in self.targets)

    def _keep(self, name: str, seed: int, made: Sequence[Masks], seconds: float) -> None:
        """Writes mask sets."""
        self.seconds[f"{name} {seed}"] = seconds
        self.state.save(self._pack)
        for title, masks in zip(self.targets, made, strict=True):
            masks.save(self._masks_file(name, title, seed), overwrite=True)

    def _prune_at_once(self, seed: int) -> None:
        """Mask sets of all compositions, from one pass over the data."""
        todo = {
            name: method
            for name, method in self._of_one_pass().items()
            if not self._is_pruned(name, seed)
        }
        needs = distinct(need for method in todo.values() for need in method.needs)
        statistics = None
        context = self._context((), seed)
        if needs:
            mark = hashlib.sha256(repr([need.name for need in needs]).encode()).hexdigest()[:8]
            path = self.work / f"data-pass-{seed}-{mark}.checkpoint"
            batches = self._batches(seed)
            resume = self.resume and path.exists()
            statistics = gather(
                needs, replace(context, batches=batches, checkpoint=path, resume=resume)
            )
        for name, method in todo.items():
            with self._or_left_out(name):
                start = time.perf_counter()
                made = method.masks(context, statistics if method.needs else None)
                self._keep(name, seed, made, time.perf_counter() - start)

    def _prune_alone(self, name: str, seed: int) -> None:
        """Mask sets of a method that runs the model as it goes."""
        if self._is_pruned(name, seed):
            return
        start = time.perf_counter()
        place = self.work / f"{self._masks_file(name, 'work', seed).stem}"
        place.mkdir(exist_ok=True)
        context = self._context(self._batches(seed), seed)
        made = self.methods[name].run(replace(context, workplace=place, resume=self.resume))
        self._keep(name, seed, made, time.perf_counter() - start)
        shutil.rmtree(place)

    def _measure(self, name: str, title: str, seed: int) -> None:
        """Measures one cell, unless it is known."""
        if (name, title, seed) in self.cells:
            return
        file = self._masks_file(name, title, seed)
        masks = Masks.load(file)
        first = self.cells.get((name, title, self.seeds[0]))
        start = time.perf_counter()
        if first is not None and _same(masks, Masks.load(self.work / Path(first.masks).name)):
            measured, kept = first.measured, first.masks  # as of methods that read no data
        else:
            with restored(self.loaded.weights):
                masks.apply(self.loaded.model, self.loaded.adapter)
                measured, kept = self._measured(), f"{MASKS}/{file.name}"
        counts = masks.counts()
        self.cells[name, title, seed] = Cell(
            name,
            title,
            seed,
            measured,
            counts.all.removed,
            counts.all.total,
            {modality: count.sparsity for modality, count in counts.by_modality.items()},
            self.seconds.get(f"{name} {seed}", 0.0),
            time.perf_counter() - start,
            kept,
        )
        self.state.save(self._pack)

    def _measured(self) -> TaskMetrics:
        found = self.task.measure(lambda batches: batches)
        if self.dense is not None and self._sizes(found) != self._sizes(self.dense):
            raise _FORM.error(
                f"{self.state.path} is damaged: its figures of the dense model are of other "
                f"samples than those of this run; {_FORM.remedy}"
            )
        return found

    def _sizes(self, measured: TaskMetrics) -> list[int]:
        """How many samples each figure of the score is of."""
        return [len(measured.by_sample[name]) for name in self.task.score]

    def _pack(self) -> tuple[Tensors, Content]:
        """The cells as JSON, the dense model first; their values by sample as tensors."""
        assert self.dense is not None  # it is measured before anything else
        tensors: Tensors = {}
        records = []
        for number, cell in enumerate((None, *self.cells.values())):
            measured = self.dense if cell is None else cell.measured
            for name, values in measured.by_sample.items():
                tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
                tensors[f"{number}|{name}"] = tensor
            record: Content = {} if cell is None else {
                field.name: getattr(cell, field.name) for field in fields(cell)
            }  # fmt: skip
            records.append({**record, "measured": dict(measured.metrics)})
        return tensors, {"cells": records, "seconds": self.seconds}

    def _unpack(self, tensors: Tensors, content: Content) -> None:
        """Inverse of `_pack`."""
        self.seconds = read_as(dict[str, float], content["seconds"], "seconds")
        self.seconds[DENSE]  # every run measures it first
        records = read_as(list[dict[str, Any]], content["cells"], "cells")
        if any(values.ndim != 1 for values in tensors.values()):
            raise ValueError("its figures are not lists of samples")
        for number, record in enumerate(records):
            by_sample = {
                key.partition("|")[2]: values.double().tolist()
                for key, values in tensors.items()
                if key.partition("|")[0] == str(number)
            }
            figures = {"metrics": record["measured"]}
            measured = replace(read_as(TaskMetrics, figures, "a cell"), by_sample=by_sample)
            if len({*self._sizes(measured), *self._sizes(self.dense or measured)}) > 1:
                raise ValueError(f"cell {number} has other samples than the dense model")
            if number == 0:
                self.dense = measured
                continue
            cell = replace(
                read_as(Cell, {**record, "measured": figures}, "a cell"), measured=measured
            )
            if cell.masks != f"{MASKS}/{Path(cell.masks).name}":
                raise ValueError(f"the masks of a cell are {cell.masks}, not in {MASKS}")
            self.cells[cell.key] = cell


def _same(masks: Masks, others: Masks) -> bool:
    """Whether two mask sets keep the same elements, with the same values."""
    if masks.new_values is not None or others.new_values is not None:
        return False
    return masks.compare(others)["all"].agreement == 1
