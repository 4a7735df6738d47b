"""What a run will do and cost, said before any data is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from PIL import Image
from torch import nn

from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.calibration import calibrate
from vlp_plugins.data.processors import Processor
from vlp_plugins.errors import UnsupportedError
from vlp_plugins.masks import Masks
from vlp_plugins.memory import peak_device_bytes, peak_resident_bytes, resident_bytes
from vlp_plugins.methods.base import Composition
from vlp_plugins.pruning import make_masks
from vlp_plugins.report.page import check_can_render
from vlp_plugins.statistics.store import Statistics
from vlp_plugins.targets import Target
from vlp_plugins.weights import WeightMap

_BATCHES = 2  # the first is slower; and there are masks of either half of the data
_CAPTION = "a photo of two people who sit at a table in front of a window "


@dataclass(frozen=True)
class Plan:
    """The answer of `vlp plan`; bytes and seconds.

    Attributes:
        weights: the prunable weights.
        masks: for every sparsity, masks with the counts that the run will have. They are made
            from a made-up batch: exact in their counts wherever the allocation reads no data (all
            built-in methods), meaningless in their bits for methods that read data.
        passes: passes over the data.
        peak_bytes: expected peak of the whole process in RAM.
        device_peak_bytes: expected peak of tensors on the GPU; None without one.
        model_bytes: parameters of the model, each shared one counted once.
        statistics_bytes: accumulators.
        masks_bytes: packed masks of all sparsities.
        seconds_per_batch: of the made-up batch; None for a method without data.
    """

    weights: WeightMap
    masks: Sequence[Masks]
    passes: int
    peak_bytes: int
    device_peak_bytes: int | None
    model_bytes: int
    statistics_bytes: int
    masks_bytes: int
    seconds_per_batch: float | None


def plan_run(
    model: nn.Module,
    adapter: Adapter,
    method: Composition,
    targets: Sequence[Target],
    *,
    processor: Processor | None = None,
    batch_size: int = 32,
    image_size: int = 384,
    floor: float = 0.0,
    published: bool = False,
    save_model: bool = False,
) -> Plan:
    """Finds out what a run costs by doing it with two made-up batches, and writing nothing.

    No file is read. The batches have blank images and captions of usual length. The peak is that
    of this process, so it is meant for a fresh one that loads the model and plans, as `vlp plan`
    does; how an allocator fragments its memory cannot be calculated, only repeated.

    Args:
        model: loaded, on its device.
        adapter: claims the model.
        method: what shall be run.
        targets: sparsities.
        processor: makes batches; needed by methods that read data.
        batch_size: of the run.
        image_size: side of the made-up images in pixels; the processor resizes them.
        floor: see `prune`.
        published: see `prune`.
        save_model: whether pruned models will be written.

    Raises:
        ValueError: if the method reads data and there is no processor.
    """
    weights = WeightMap.of(model, adapter)
    statistics = None
    seconds = None
    with suppress(UnsupportedError):
        check_can_render()  # its packages are part of what the run will hold
    if method.needs:
        if processor is None:
            raise ValueError(f"method {method.name!r} reads data: a processor is needed")
        batches = (_made_up(adapter, processor, batch_size, image_size) for _ in range(_BATCHES))
        ends = [time.perf_counter()]
        statistics = calibrate(
            model,
            adapter,
            weights,
            batches,
            method.needs,
            published=published,
            progress=lambda *_: ends.append(time.perf_counter()),
        )
        seconds = min(later - earlier for earlier, later in pairwise(ends))
    cut = partial(
        make_masks, weights, method, targets, statistics, floor=floor, published=published
    )
    masks = cut()
    peak = peak_resident_bytes()
    if method.needs:
        halves = [cut(half=half) for half in (0, 1)]  # the run compares them
        peak = peak_resident_bytes()
        del halves
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = [sum(bits.numel() for bits in each.packed.values()) for each in masks]
    if save_model:  # the dense weights are kept while the pruned ones are written
        dense = sum(w.numel * w.parameter.element_size() for w in weights.values())
        peak = max(peak, resident_bytes() + dense)
    return Plan(
        weights=weights,
        masks=masks,
        passes=1 if method.needs else 0,
        peak_bytes=max(peak, resident_bytes() + 2 * max(packed)),  # files are made in memory
        device_peak_bytes=peak_device_bytes(_device(model)),
        model_bytes=model_bytes,
        statistics_bytes=_bytes_of(statistics),
        masks_bytes=sum(packed),
        seconds_per_batch=seconds,
    )


def _made_up(adapter: Adapter, processor: Processor, size: int, pixels: int) -> Batch:
    images = [Image.new("RGB", (pixels, pixels), (i % 256, 127, 64)) for i in range(size)]
    return adapter.collate(processor, images, [_CAPTION] * size)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _bytes_of(statistics: Statistics | None) -> int:
    if statistics is None:
        return 0
    return sum(sums.numel() * sums.element_size() for sums in statistics.sums.values())
