"""What a run will do and cost, said before any data is read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.data.processors import Processor
from vlp_plugins.dimension.measure import default_settings
from vlp_plugins.dimension.plan import IdPlan, plan
from vlp_plugins.dimension.twonn import check_number
from vlp_plugins.jobs.facts import bytes_of_statistics
from vlp_plugins.jobs.preparation import Prepared
from vlp_plugins.masks.manifest import Count
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import packed_size
from vlp_plugins.methods.composition import Composition, composed
from vlp_plugins.methods.id_guided import IdGuided
from vlp_plugins.methods.method import Cost, Method, Procedure
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.report.page import check_can_render
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.memory import (
    bytes_of,
    peak_device_bytes,
    peak_resident_bytes,
    resident_bytes,
)
from vlp_plugins.runtime.model_state import autocast_of
from vlp_plugins.scoring.allocation import GlobalAllocation, ModalityAllocation
from vlp_plugins.scoring.magnitude import Magnitude


@dataclass(frozen=True)
class Measuring:
    """What measuring intrinsic dimensions will take.

    Attributes:
        plan: passes and bytes.
        seconds_per_batch: of a made-up batch, forward only and with the outputs looked at.
    """

    plan: IdPlan
    seconds_per_batch: float

    @property
    def seconds(self) -> float:
        """Of the forward passes; the search for neighbours comes on top."""
        return len(self.plan.passes) * self.plan.batches * self.seconds_per_batch


@dataclass(frozen=True)
class Plan:
    """The answer of `vlp plan`; bytes and seconds.

    Attributes:
        weights: the prunable weights.
        counts: for every target by modality and under `all` what the run will remove and keep,
            exact; without modalities if it depends on data how they share the sparsity.
        passes: passes over the data.
        peak_bytes: expected peak of the whole process in RAM.
        device_peak_bytes: expected peak of tensors on the GPU; None without one.
        model_bytes: parameters of the model, each shared one counted once.
        statistics_bytes: accumulators; 0 for a method that gathers none.
        masks_bytes: packed masks of all sparsities.
        seconds_per_batch: of a made-up batch; None for a method without data, and for one whose
            batches cannot be timed without running it.
        cost: of a method that runs the model as it goes.
        measuring: of the intrinsic dimensions that the method needs first; None for none.
    """

    weights: WeightMap
    counts: Sequence[Mapping[str, Count]]
    passes: int
    peak_bytes: int
    device_peak_bytes: int | None
    model_bytes: int
    statistics_bytes: int
    masks_bytes: int
    seconds_per_batch: float | None
    cost: Cost | None = None
    measuring: Measuring | None = None

    @property
    def seconds(self) -> float | None:
        """Of the whole work of a method that takes gradients as it goes; None for others."""
        if self.cost is None or self.seconds_per_batch is None:
            return None
        return self.cost.gradient_batches * self.seconds_per_batch + self.cost.seconds


def with_length(job: Prepared) -> Prepared:
    """The job with the number of its batches in the recipe, where the index of its data tells it.

    No image is read. A composition reads its data once, so what it costs is told per batch.

    Raises:
        DataError: if the data that is named is not there.
    """
    data = job.recipe.data
    if job.is_composition or data.source is None or data.batches is not None:
        return job
    batches = job.batches()
    if batches.source.length is None:
        return job
    counted = replace(data, batches=len(batches))
    return replace(job, recipe=replace(job.recipe, data=counted))


def bytes_of_model(job: Prepared) -> int:
    """Bytes of the parameters, each shared one counted once."""
    return sum(p.numel() * p.element_size() for p in job.model.parameters())


def device_of(job: Prepared) -> torch.device:
    """Where the model is."""
    return next(job.model.parameters()).device


def peak_with_writing(job: Prepared, peak: int, mask_file: int) -> int:
    """The peak of the process once the results are written, too.

    Args:
        job: what shall be run.
        peak: bytes at the worst moment before.
        mask_file: bytes of the largest file of masks; its checksum and its copy are made of it.
    """
    if job.recipe.save_model:  # the dense weights are kept while the pruned ones are written
        dense = job.weights.stored_bytes
        peak = max(peak, resident_bytes() + dense)
    return max(peak, resident_bytes() + 2 * mask_file)


BATCHES = 2
"""The first is slower; and there are masks of either half of the data."""
_CAPTION = "a photo of two people who sit at a table in front of a window "


@dataclass(frozen=True)
class MadeUp:
    """Batches of blank images and captions of usual length; no file is read.

    Attributes:
        adapter: collates them.
        processor: of the model.
        size: pairs in a batch.
        pixels: side of the images; the processor resizes them.
    """

    adapter: Adapter
    processor: Processor
    size: int
    pixels: int

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(BATCHES):
            shape = (self.pixels, self.pixels)
            images = [Image.new("RGB", shape, (i % 256, 127, 64)) for i in range(self.size)]
            yield self.adapter.collate(self.processor, images, [_CAPTION] * self.size)


def known_counts(method: Method, masks: Sequence[Masks]) -> list[dict[str, Count]]:
    """The counts that do not depend on data, from masks that were made without it.

    One threshold for all tensors removes int(sparsity x N) of N elements in all, but shares them
    out among modalities by scores. Any other allocation fixes what each modality loses.

    Args:
        method: what will be run.
        masks: with the counts that its allocation makes, whatever the scores.
    """
    found = []
    for each in masks:
        counts = each.counts()
        shared = {} if _shares_by_data(method) else counts.by_modality
        found.append({**shared, "all": counts.all})
    return found


def counting_masks(job: Prepared) -> list[Masks]:
    """Masks by magnitude in the allocation of a method: their counts are the method's."""
    counts = Composition("counts", Magnitude(), job.method.allocation)
    return counts.run(replace(job.context(), published=False, owners=None, seed=0))


def bytes_of_masks(job: Prepared) -> list[int]:
    """Bytes of the packed masks of every target."""
    return [sum(packed_size(w.numel) for w in job.weights.values()) for _ in job.targets]


def _shares_by_data(method: Method) -> bool:
    if not isinstance(method.allocation, GlobalAllocation):
        return False
    if isinstance(method, Composition):
        return bool((method.allocation_score or method.score).needs)
    return True


def plan_composition(job: Prepared, batches: Iterable[Batch] | None) -> Plan:
    """Gathers statistics of made-up batches and makes masks of them, as the run will.

    Args:
        job: what shall be run.
        batches: made-up ones; None for a method without data.
    """
    method = composed(job.method)
    needs = method.needs
    statistics = None
    seconds = None
    with suppress(UnsupportedError):
        check_can_render()  # its packages are part of what the run will hold
    if needs and batches is not None:
        ends = [time.perf_counter()]
        context = job.context(batches, progress=lambda *_: ends.append(time.perf_counter()))
        statistics = method.gather(replace(context, limit=None))
        seconds = min(later - earlier for earlier, later in pairwise(ends))
    masks = job.masks(statistics)
    peak = peak_resident_bytes()
    if statistics is not None:
        halves = [job.masks(statistics, half=half) for half in (0, 1)]  # the run compares them
        peak = peak_resident_bytes()
        del halves
    sizes = bytes_of_masks(job)
    return Plan(
        weights=job.weights,
        counts=known_counts(job.method, masks),
        passes=1 if needs else 0,
        peak_bytes=peak_with_writing(job, peak, max(sizes)),
        device_peak_bytes=peak_device_bytes(device_of(job)),
        model_bytes=bytes_of_model(job),
        statistics_bytes=0 if statistics is None else bytes_of_statistics(statistics),
        masks_bytes=sum(sizes),
        seconds_per_batch=seconds,
    )


def plan_procedure(job: Prepared, method: Procedure, batches: Iterable[Batch] | None) -> Plan:
    """Asks the method for its cost and times the forward and backward pass of a batch.

    Args:
        job: what shall be run.
        method: its method.
        batches: made-up ones; None for a method without data.

    Raises:
        VlpError: if the method cannot do what is asked, as far as it knows before it runs.
    """
    cost = method.cost(job.context(workplace=_existing(Path(job.recipe.out or "."))))
    with suppress(UnsupportedError):
        check_can_render()  # its packages are part of what the run will hold
    seconds = None
    if batches is not None and cost.gradient_batches:
        seconds = seconds_per_gradient(job, batches)
    peak = peak_resident_bytes() + cost.ram_bytes
    sizes = bytes_of_masks(job)
    return Plan(
        weights=job.weights,
        counts=known_counts(method, counting_masks(job)),
        passes=cost.passes if method.reads_data else 0,
        peak_bytes=peak_with_writing(job, peak, max(sizes)),
        device_peak_bytes=peak_device_bytes(device_of(job)),
        model_bytes=bytes_of_model(job),
        statistics_bytes=0,
        masks_bytes=sum(sizes),
        seconds_per_batch=seconds,
        cost=cost,
    )


def _existing(out: Path) -> Path:
    """The folder nearest to the results that is there already: it has the disk of the run."""
    return next(folder for folder in out.absolute().parents if folder.is_dir())


def seconds_per_gradient(job: Prepared, batches: Iterable[Batch]) -> float:
    """Seconds of the forward and backward pass of a batch, the fastest of those given."""
    probe = LossProbe(
        job.model,
        job.adapter,
        job.weights,
        published=job.published,
        autocast=autocast_of(job.recipe.autocast),
        skip_nonfinite=True,  # blank images may be too much for an untrained model
    )
    times = []
    with probe.attached():
        for index, batch in enumerate(batches):
            start = time.perf_counter()
            probe.measure(batch, index)
            times.append(time.perf_counter() - start)
    return min(times)


def plan_guided(job: Prepared, method: IdGuided, batches: MadeUp, inner: Plan) -> Plan:
    """Adds what it takes to measure, by one made-up batch, to the plan of the method guided.

    Args:
        job: what shall be run.
        method: its method.
        batches: made-up ones.
        inner: plan of the method without dimensions.

    Raises:
        DataError: if nobody can say how many batches there will be.
        StatisticsError: if there will be too few samples.
        UnsupportedError: if a layer does not fit into the memory budget.
    """
    count = job.recipe.data.batches
    if count is None:
        raise DataError(
            f"nobody can say how many batches there will be, so nobody can say what measuring "
            f"dimensions for {method.name!r} takes; give their number with --batches"
        )
    budget = job.recipe.memory_budget
    estimator, padding = default_settings(published=job.published)
    check_number(count * batches.size, estimator, what="samples")
    batch = next(iter(batches))
    start = time.perf_counter()
    measuring = plan(
        job.model,
        job.adapter,
        job.weights,
        batch,
        count * batches.size,
        padding=padding,
        memory_budget=None if budget is None else bytes_of(budget),
        published=job.published,
    )
    seconds = time.perf_counter() - start
    peak = resident_bytes() + max(each.peak_bytes for each in measuring.passes)
    counts = inner.counts
    if not isinstance(method.method.allocation, ModalityAllocation):
        counts = [{"all": each["all"]} for each in counts]  # dimensions share out the rest
    return replace(
        inner,
        counts=counts,
        passes=inner.passes + len(measuring.passes),
        peak_bytes=max(inner.peak_bytes, peak),
        measuring=Measuring(measuring, seconds),
    )


def plan_run(
    job: Prepared,
    *,
    processor: Processor | None = None,
    batch_size: int = 32,
    image_size: int = 384,
) -> Plan:
    """Finds out what a run costs with two made-up batches, and writes nothing.

    No image is read. The batches have blank images and captions of usual length. The peak is that
    of this process, so it is meant for a fresh one that loads the model and plans, as `vlp plan`
    does; how an allocator fragments its memory cannot be calculated, only repeated.

    Args:
        job: what shall be run.
        processor: makes batches; needed by methods that read data.
        batch_size: of the run.
        image_size: side of the made-up images in pixels; the processor resizes them.

    Raises:
        ValueError: if the method reads data and there is no processor.
        DataError: if the method has to know how many batches there will be, and nobody says so.
    """
    if job.method.reads_data and processor is None:
        raise ValueError(f"method {job.method.name!r} reads data: a processor is needed")
    batches = None if processor is None else MadeUp(job.adapter, processor, batch_size, image_size)
    return _plan(with_length(job), batches)


def _plan(job: Prepared, batches: MadeUp | None) -> Plan:
    if isinstance(job.method, IdGuided) and batches is not None:
        inner = replace(job, method=job.method.method.with_allocation(job.method.allocation))
        return plan_guided(job, job.method, batches, _plan(inner, batches))
    if isinstance(job.method, Procedure):
        return plan_procedure(job, job.method, batches)
    return plan_composition(job, batches)
