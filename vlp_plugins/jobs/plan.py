"""What a run will do and cost, before any data is read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from vlp_plugins.calibration.moments import LossStatistic
from vlp_plugins.calibration.outputs import Padding
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.data.processors import Processor
from vlp_plugins.dimension.measure import default_settings
from vlp_plugins.dimension.plan import IdPlan, plan
from vlp_plugins.dimension.twonn import Estimator, check_number
from vlp_plugins.jobs.facts import bytes_of_statistics, keeps_halves
from vlp_plugins.jobs.preparation import Loaded, ModelSource, Prepared
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.masks.manifest import Count
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import packed_size
from vlp_plugins.methods.composition import Composition, composed
from vlp_plugins.methods.guided import BeforeMeasuring, Guided, IdGuided, Measuring
from vlp_plugins.methods.iterative import Iterative
from vlp_plugins.methods.method import Context, Cost, Method, Procedure
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.request import Target, budget_of, is_published
from vlp_plugins.models.saving import Shards
from vlp_plugins.report.page import check_can_render
from vlp_plugins.runtime.errors import DataError, UnsupportedError, VlpError
from vlp_plugins.runtime.memory import (
    bytes_of,
    peak_device_bytes,
    peak_resident_bytes,
    resident_bytes,
    text_of,
)
from vlp_plugins.runtime.model_state import default_device, dtype_of
from vlp_plugins.scoring.allocation import (
    Allocation,
    EvenAllocation,
    GlobalAllocation,
    ModalityAllocation,
    Pattern,
    overall,
)
from vlp_plugins.scoring.budgets import GroupAllocation
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.wanda import Wanda


@dataclass(frozen=True)
class PlannedDimensions:
    """What measuring intrinsic dimensions will take.

    Attributes:
        seconds_per_batch: of a dummy batch, forward only and with the outputs looked at.
        neighbour_seconds: of the search for neighbours, as matrix products.
    """

    plan: IdPlan
    seconds_per_batch: float
    neighbour_seconds: float

    @property
    def forward_seconds(self) -> float:
        """Of the forward passes, without reading images."""
        return len(self.plan.passes) * self.plan.batches * self.seconds_per_batch

    @property
    def seconds(self) -> float:
        """Of the whole work, without reading images."""
        return self.forward_seconds + self.neighbour_seconds


@dataclass(frozen=True)
class Timing:
    """How long pruning takes, without loading the model and reading images.

    Attributes:
        batches: that run through the model in all; 0 for a method without data, None if their
            number is unknown.
        seconds_per_batch: the fastest of those that were timed; None for a method without data,
            and for one whose batches cannot be timed without running it.
        other_seconds: in addition to those batches, of making masks, solving and reading the disk.
    """

    batches: int | None
    seconds_per_batch: float | None
    other_seconds: float

    @property
    def seconds(self) -> float | None:
        """In all; None if unknown."""
        if self.batches == 0:
            return self.other_seconds
        if self.batches is None or self.seconds_per_batch is None:
            return None
        return self.batches * self.seconds_per_batch + self.other_seconds


@dataclass(frozen=True)
class Plan:
    """The answer of `vlp plan`; bytes and seconds.

    Attributes:
        counts: for every target by modality and under `all` what the run will remove and keep,
            exact; without modalities if it depends on data how they share the sparsity.
        peak_bytes: expected peak of the whole process in RAM.
        device_peak_bytes: expected peak of tensors on the GPU; None without one.
        model_bytes: parameters of the model, each shared one counted once.
        statistics_bytes: accumulators; 0 for a method that gathers none.
        masks_bytes: masks of all sparsities, with new values if the method makes them.
        dimensions: intrinsic dimensions that the method needs first; None for none.
    """

    counts: Sequence[Mapping[str, Count]]
    passes: int
    peak_bytes: int
    device_peak_bytes: int | None
    model_bytes: int
    statistics_bytes: int
    masks_bytes: int
    timing: Timing
    cost: Cost | None = None
    dimensions: PlannedDimensions | None = None

    @property
    def seconds(self) -> float | None:
        """Of the timing, and of measuring dimensions first; None if unknown."""
        first = 0.0 if self.dimensions is None else self.dimensions.seconds
        return None if self.timing.seconds is None else first + self.timing.seconds


def _with_length(job: Prepared) -> Prepared:
    """The job with its number of batches in the recipe, where the index of its data has it."""
    data = job.recipe.data
    if not job.method.reads_data or data.source is None:
        return job
    asked = data.batches is not None
    if asked and not Path(data.source).expanduser().exists():
        return job  # a plan needs no data if it knows how many batches there will be
    try:
        batches = job.batches()
    except VlpError:
        # The number asked for will do; the cost of a composition can be given per batch.
        if asked or isinstance(job.method, Composition):
            return job
        raise
    if batches.source.length is None:
        return job
    counted = replace(data, batches=len(batches))
    return replace(job, recipe=replace(job.recipe, data=counted))


_PIXELS = 384
"""Side of the dummy images where the processor resizes them."""
_SIDE = 1024
"""Of the matrices whose product is timed."""
_BATCHES = 2
"""The first is slower; and there are masks of either half of the data."""
_CAPTION = "a photo of two people who sit at a table in front of a window "


@dataclass(frozen=True)
class _DummyBatches:
    """Batches of blank images and captions of usual length; no file is read."""

    model: nn.Module
    adapter: Adapter
    processor: Processor
    size: int

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(_BATCHES):
            shape = (_side(self.model, self.processor),) * 2
            images = [Image.new("RGB", shape, (i % 256, 127, 64)) for i in range(self.size)]
            yield self.adapter.collate(self.processor, images, [_CAPTION] * self.size)


def _side(model: nn.Module, processor: Processor) -> int:
    """Of images that the processor takes to the model's size, or leaves as they are."""
    images = getattr(processor, "image_processor", processor)
    if getattr(images, "do_resize", True) or getattr(images, "do_center_crop", False):
        return _PIXELS
    config = getattr(model, "config", None)
    places = (config, getattr(config, "vision_config", None), getattr(config, "vision", None))
    sizes = (getattr(place, "image_size", None) for place in places)
    return next((size for size in sizes if isinstance(size, int)), _PIXELS)


def _plan(
    job: Prepared,
    masks: Sequence[Masks],
    peak: int,
    *,
    passes: int,
    timing: Timing,
    statistics: Statistics | None = None,
    cost: Cost | None = None,
) -> Plan:
    """The plan of a run that takes `peak` bytes before its results are written.

    One threshold for all tensors removes int(sparsity x N) of N elements in all, but how it divides
    them among modalities depends on scores. Any other allocation fixes what each modality loses.
    """
    counts = []
    for each in masks:
        found = each.counts()
        known = {} if _divided_by_data(job.method) else found.by_modality
        counts.append({**known, "all": found.all})
    if job.recipe.save_model and Shards.of(job.model, job.recipe.model) is None:
        # The dense weights are kept while the pruned ones are written.
        peak = max(peak, resident_bytes() + job.weights.stored_bytes)
    mask_file = sum(packed_size(weight.numel) for weight in job.weights.values())
    return Plan(
        counts=counts,
        passes=passes,
        # The checksum and the copy of a file of masks are made of it.
        peak_bytes=max(peak, resident_bytes() + 2 * mask_file),
        device_peak_bytes=peak_device_bytes(job.device),
        model_bytes=sum(p.numel() * p.element_size() for p in job.model.parameters()),
        statistics_bytes=0 if statistics is None else bytes_of_statistics(statistics),
        masks_bytes=len(job.targets) * mask_file + job.new_values_bytes,
        timing=timing,
        cost=cost,
    )


def _plan_by_shapes(job: Prepared) -> Plan:
    """What the shapes of the weights decide."""
    method = job.method.method if isinstance(job.method, IdGuided) else job.method
    statistics, other, cost = 0, 0, None
    if isinstance(method, Composition) and job.by_blocks:
        cost = method.cost(job.context())
        other = cost.ram_bytes
    elif isinstance(method, Composition):
        statistics = method.statistics_bytes(job.weights, halves=keeps_halves(job, method))
        if any(isinstance(need, LossStatistic) for need in method.needs):
            # The gradient of a weight; of all where a batch may be left out for one of them.
            sizes = [weight.numel for weight in job.weights.values()]
            other = 4 * (sum(sizes) if job.recipe.skip_nonfinite else max(sizes))
    elif isinstance(method, Procedure):
        with suppress(VlpError):  # of one that has to run the model to know
            cost = _cost_of(job, method)
            other = cost.ram_bytes
    asked = dtype_of(None if job.recipe.dtype == "auto" else job.recipe.dtype)
    dtype: Any = asked or getattr(getattr(job.model, "config", None), "dtype", None)
    size = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    model = size * sum(parameter.numel() for parameter in job.model.parameters())
    mask_file = sum(packed_size(weight.numel) for weight in job.weights.values())
    copies = size * job.weights.numel if job.recipe.save_model else 0
    held = model + copies
    # Whether the values of the model would be views of its files, see `runtime.mapped`.
    on_cpu = default_device(job.recipe.device).type == "cpu"
    mapped = on_cpu and sys.platform == "linux" and job.recipe.dtype == "auto"
    if cost is not None and job.by_blocks and mapped:
        held = 0
        note = f"of the {text_of(model)} of the model only what is at work is read into memory"
        cost = replace(cost, notes=(*cost.notes, f"{note}, from safetensors files"))
    passes = 1 if cost is None else cost.passes
    return Plan(
        counts=[_counts_by_shape(job, target) for target in job.targets],
        passes=passes if job.method.reads_data else 0,
        peak_bytes=resident_bytes() + held + statistics + other + 2 * mask_file,
        device_peak_bytes=None,
        model_bytes=model,
        statistics_bytes=statistics,
        masks_bytes=len(job.targets) * mask_file + job.new_values_bytes,
        timing=Timing(None, None, 0.0),
        cost=cost,
    )


def _cost_of(job: Prepared, method: Procedure) -> Cost:
    """On the disk of the run: that of the folder nearest to the results that is there already."""
    out = Path(job.recipe.out or ".").absolute()
    return method.cost(job.context(workplace=next(f for f in out.parents if f.is_dir())))


def _counts_by_shape(job: Prepared, target: Target) -> dict[str, Count]:
    """What a target removes by modality, as far as no scores decide it, and in all."""
    allocation, groups = job.method.allocation, job.weights.by_modality()
    sizes = {name: sum(each.numel for each in group) for name, group in groups.items()}
    known = not isinstance(job.method, Guided)  # what is measured divides what is removed
    if isinstance(allocation, Pattern):
        gone = allocation.of - allocation.keep
        removed = {name: size // allocation.of * gone for name, size in sizes.items()}
    elif isinstance(allocation, EvenAllocation):
        budget = budget_of(target, list(groups))
        removed = {name: sum(allocation.removed(each, budget[name]) for each in group)
                   for name, group in groups.items()}  # fmt: skip
    elif isinstance(allocation, ModalityAllocation) or isinstance(target, Mapping):
        budget = budget_of(target, list(groups))
        removed = {name: int(budget[name] * size) for name, size in sizes.items()}
        known = isinstance(allocation, ModalityAllocation)
    else:
        removed = {"all": int(overall(target, allocation.name) * job.weights.numel)}
        known = False
    counts = {name: Count(size - removed[name], size) for name, size in sizes.items() if known}
    total = job.weights.numel
    return {**counts, "all": Count(total - sum(removed.values()), total)}


def _reads_data(allocation: Allocation) -> bool:
    return allocation.score is not None and bool(allocation.score.needs)


def _divided_by_data(method: Method) -> bool:
    if not isinstance(method.allocation, GlobalAllocation):
        return isinstance(method.allocation, GroupAllocation) or _reads_data(method.allocation)
    if isinstance(method, Composition):
        return bool((method.allocation_score or method.score).needs)
    return True


def _plan_composition(job: Prepared, batches: Iterable[Batch] | None) -> Plan:
    """Gathers statistics of dummy batches and makes masks of them, as the run will."""
    method = composed(job.method)
    statistics = None
    seconds = None
    if method.needs and batches is not None:
        context = replace(job.context(), halves=keeps_halves(job, method))
        statistics, seconds = _gathered(context, method, batches)
    start = time.perf_counter()
    masks = job.masks(statistics)
    peak = peak_resident_bytes()
    if statistics is not None and statistics.has_halves:
        halves = [job.masks(statistics, half=half) for half in (0, 1)]  # the run compares them
        peak = peak_resident_bytes()
        del halves
    other = time.perf_counter() - start
    reads = bool(method.needs) and job.recipe.statistics is None
    return _plan(
        job,
        masks,
        peak,
        passes=1 if method.needs else 0,
        timing=Timing(job.recipe.data.batches if reads else 0, seconds, other),
        statistics=statistics,
    )


def _plan_blocks(job: Prepared, batches: Iterable[Batch] | None) -> Plan:
    """Asks the method for its cost and times walks over the blocks with dummy batches."""
    method, context = job.method, job.context()
    assert isinstance(method, Composition)
    dummies = [] if batches is None else list(batches)
    cost = method.cost(replace(context, batches=dummies))
    timing = timing_by_blocks(method, context, dummies)
    # A timed walk takes the gradients of all blocks at once; a real one may have to do it again.
    again = cost.gradient_batches - len(context.targets) * (context.limit or 0)
    if again > 0 and dummies:
        more = again * _seconds_per_gradient(context, dummies)
        timing = replace(timing, other_seconds=timing.other_seconds + more)
    return _plan(
        job,
        _by_magnitude(method, context),
        peak_resident_bytes() + cost.ram_bytes,
        passes=cost.passes,
        timing=timing,
        cost=cost,
    )


def timing_by_blocks(method: Composition, context: Context, batches: Sequence[Batch]) -> Timing:
    """Times a walk over the blocks with one batch, and with two: the difference is one batch's.

    Args:
        method: walks by blocks.
        context: of the run; its limit says how many batches there will be.
        batches: two.

    Raises:
        VlpError: if the method or the model cannot walk so.
    """
    one = replace(context, targets=context.targets[:1], limit=None)

    def seconds(count: int) -> float:
        return _seconds_of(lambda: method.run(replace(one, batches=batches[:count])))

    _, first, both = seconds(1), seconds(1), seconds(2)  # the very first is slower
    each = max(0.0, both - first)
    number = context.limit and context.limit * len(context.targets)
    return Timing(number, each, len(context.targets) * max(0.0, first - each))


def _gathered(
    context: Context, method: Composition, batches: Iterable[Batch]
) -> tuple[Statistics | None, float]:
    """The statistics of a few batches, and the seconds of the fastest."""
    ends = [time.perf_counter()]

    def ended(*_: object) -> None:
        ends.append(time.perf_counter())

    statistics = method.gather(replace(context, batches=batches, limit=None, progress=ended))
    return statistics, min(later - earlier for earlier, later in pairwise(ends))


def _plan_procedure(job: Prepared, method: Procedure, batches: Iterable[Batch] | None) -> Plan:
    """Asks the method for its cost and times a batch and a choice of masks."""
    cost = _cost_of(job, method)
    timing = timing_of(method, cost, job.context(), batches)
    peak = peak_resident_bytes() + cost.ram_bytes
    masks = _by_magnitude(method, job.context())
    passes = cost.passes if method.reads_data else 0
    return _plan(job, masks, peak, passes=passes, timing=timing, cost=cost)


def timing_of(
    method: Procedure, cost: Cost, context: Context, batches: Iterable[Batch] | None
) -> Timing:
    """Times what the cost counts, once, with two batches: the first is slower.

    Raises:
        VlpError: if the model has no loss, or not what the method measures.
    """
    seconds = None
    if batches is not None and isinstance(method, Iterative):
        seconds = _gathered(context, method.composition, batches)[1]
    elif batches is not None and cost.gradient_batches:
        seconds = _seconds_per_gradient(context, batches)
    elif batches is not None and cost.forward_batches:
        seconds = _gathered(context, Composition("forward", Wanda()), batches)[1]
    other = cost.seconds
    if cost.choices:
        one = replace(context, targets=context.targets[:1])
        other += cost.choices * _seconds_of(lambda: _by_magnitude(method, one))
    count = cost.gradient_batches + cost.forward_batches
    # A plug-in that reads data may not say what it does with it.
    known = count or cost.seconds or not method.reads_data
    return Timing(count if known else None, seconds, other)


def _by_magnitude(method: Method, context: Context) -> list[Masks]:
    """Masks by magnitude in the method's allocation: their counts are the method's.

    An allocation that reads data itself has the same count in all.
    """
    allocation = method.allocation
    if _reads_data(allocation):
        allocation = BeforeMeasuring() if allocation.takes_budgets else GlobalAllocation()
    counting = Composition("counts", Magnitude(), allocation)
    plain = replace(context, published=False, owners=None, seed=0, walk=None, tokens=None)
    return counting.run(plain)


def _seconds_per_gradient(context: Context, batches: Iterable[Batch]) -> float:
    """Seconds of the forward and backward pass of a batch, the fastest of those given."""
    # Blank images may be too much for an untrained model.
    probe = replace(context, skip_nonfinite=True).loss_probe()
    times = []
    with probe.attached():
        for index, batch in enumerate(batches):
            start = time.perf_counter()
            probe.measure(batch, index)
            times.append(time.perf_counter() - start)
    return min(times)


def _planned_dimensions(
    job: Loaded | Prepared,
    batch: Batch,
    samples: int,
    *,
    estimator: Estimator | None = None,
    padding: Padding | None = None,
    dtype: str | None = None,
    memory_budget: str | None = None,
    variant: str = "default",
) -> PlannedDimensions:
    """Runs a dummy batch and calculates the rest; None takes what the variant has."""
    published = is_published(variant)
    default_estimator, default_padding = default_settings(published=published)
    check_number(samples, estimator or default_estimator, what="samples")

    def planned() -> IdPlan:
        return plan(
            job.model,
            job.adapter,
            job.weights,
            batch,
            samples,
            padding=padding or default_padding,
            dtype=dtype_of(dtype),
            memory_budget=None if memory_budget is None else bytes_of(memory_budget),
            published=published,
        )

    found = planned()  # the first forward pass is slower than the others
    per_batch = _seconds_of(planned)
    products = 2.0 * samples**2 * sum(site.ambient for each in found.passes for site in each.layers)
    matrix = torch.ones(_SIDE, _SIDE, device=job.device)

    def product() -> None:
        _ = float((matrix @ matrix)[0, 0])  # a GPU has done it when the number is there

    product()
    per_product = _seconds_of(product) / (2.0 * _SIDE**3)
    return PlannedDimensions(found, per_batch, products * per_product)


def plan_dimensions(
    source: ModelSource, data: DataRecipe, options: Mapping[str, Any]
) -> PlannedDimensions:
    """What `vlp id` will take; no image is read, but the index of data of unknown length is.

    Raises:
        DataError: if the number of samples is unknown.
        StatisticsError: if they are too few.
        UnsupportedError: if a single layer does not fit into the budget.
    """
    loaded = Loaded.of(source, **data.of_processor)
    samples = _samples(loaded, data)
    size = min(data.batch_size, samples)
    return _planned_dimensions(
        loaded,
        next(iter(_DummyBatches(loaded.model, loaded.adapter, loaded.processor, size))),
        samples,
        **options,
    )


def _samples(loaded: Loaded, data: DataRecipe) -> int:
    if data.source is not None:
        batches = loaded.batches(data)
        if batches.source.length is not None:
            return min(batches.source.length, len(batches) * data.batch_size)
    if data.batches is None:
        raise DataError(
            "how many samples will there be? Give --batches, or --data that knows its length"
        )
    return data.batches * data.batch_size


def _seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _plan_guided(job: Prepared, method: Guided, batches: _DummyBatches) -> Plan:
    """What it takes to measure, by dummy batches, and then to prune."""
    inner = _plan_job(
        replace(job, method=method.method.with_allocation(method.allocation)), batches
    )
    allocation, count = method.method.allocation, job.recipe.data.batches
    by_dimensions = isinstance(method, IdGuided)
    if count is None:
        what = "dimensions for" if by_dimensions else "for allocation"
        name = method.name if by_dimensions else allocation.name
        raise DataError(
            f"the number of batches is unknown, and with it what measuring {what} {name!r} takes; "
            "give their number with --batches"
        )
    counts = inner.counts
    if not by_dimensions or not isinstance(allocation, ModalityAllocation):
        counts = [{"all": each["all"]} for each in counts]  # what is measured divides the rest
    if isinstance(method, Measuring):
        forwards = allocation.forwards(job.weights, count)
        each = _gathered(job.context(), Composition("forward", Wanda()), batches)[1]
        cost = inner.cost or Cost(ram_bytes=inner.statistics_bytes)
        other = inner.timing.other_seconds + forwards * each
        return replace(
            inner,
            counts=counts,
            passes=inner.passes + 1,
            timing=replace(inner.timing, other_seconds=other),
            cost=replace(cost, notes=(*cost.notes, method.note(forwards))),
        )
    dimensions = _planned_dimensions(
        job,
        next(iter(batches)),
        count * batches.size,
        memory_budget=job.recipe.memory_budget,
        variant=job.recipe.variant,
    )
    passes = dimensions.plan.passes
    return replace(
        inner,
        counts=counts,
        passes=inner.passes + len(passes),
        peak_bytes=max(inner.peak_bytes, resident_bytes() + max(p.peak_bytes for p in passes)),
        dimensions=dimensions,
    )


def plan_run(job: Prepared) -> Plan:
    """Finds out what a run costs with two dummy batches, and writes nothing.

    No image is read. The batches have blank images and captions of usual length. The peak is that
    of this process, so it is meant for a fresh one that loads the model and plans, as `vlp plan`
    does; how an allocator fragments its memory cannot be calculated, only repeated.

    Of a model on the meta device, whose weights are not there, counts and bytes follow from the
    shapes, and nothing is timed; only then do methods that read data need no processor.

    Raises:
        DataError: if the method has to know how many batches there will be, and that is unknown, or
            reads data and there is no processor.
        VlpError: if the method cannot do what is asked, as far as it knows before it runs.
    """
    if job.device.type == "meta":
        return _plan_by_shapes(job)
    batches = None
    if job.method.reads_data:  # or would, without statistics of an earlier run
        size = job.recipe.data.batch_size if job.recipe.statistics is None else 1
        batches = _DummyBatches(job.model, job.adapter, job.processor(), size)
    with suppress(UnsupportedError):
        check_can_render()  # its packages are part of what the run will hold
    return _plan_job(_with_length(job), batches)


def _plan_job(job: Prepared, batches: _DummyBatches | None) -> Plan:
    """The plan by what kind of method it is; see `plan_run`."""
    if isinstance(job.method, Guided) and batches is not None:
        return _plan_guided(job, job.method, batches)
    if isinstance(job.method, Procedure):
        return _plan_procedure(job, job.method, batches)
    if job.by_blocks:
        return _plan_blocks(job, batches)
    return _plan_composition(job, batches)
