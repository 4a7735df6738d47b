"""What a run will do and cost, said before any data is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from vlp_plugins.adapter import Adapter, Batch
from vlp_plugins.allocation import Target
from vlp_plugins.calibration import calibrate
from vlp_plugins.data.processors import Processor
from vlp_plugins.errors import UnsupportedError
from vlp_plugins.masks import Masks
from vlp_plugins.memory import peak_device_bytes, peak_resident_bytes, resident_bytes
from vlp_plugins.methods.base import Composition
from vlp_plugins.pruning import make_masks
from vlp_plugins.report.page import check_can_render
from vlp_plugins.weights import WeightMap

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
    """Finds out what a run costs by running one made-up batch and cutting one set of masks.

    No file is read. The probe batch has blank images and captions of usual length. The peak is
    that of this process, which does what the run will do, and what only the run will hold is added
    to it: so it is meant for a fresh process that loads the model and plans, as `vlp plan` does.

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
        batch = _made_up(adapter, processor, batch_size, image_size)
        begin = time.perf_counter()
        statistics = calibrate(model, adapter, weights, [batch], method.needs, published=published)
        seconds = time.perf_counter() - begin
    masks = make_masks(weights, method, targets, statistics, floor=floor, published=published)
    packed = [sum(bits.numel() for bits in each.packed.values()) for each in masks]
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    later = [2 * max(packed)]  # a mask file is put together in memory
    if method.needs:
        later.append(2 * sum(packed))  # masks of either half of the data
    if save_model:
        later.append(model_bytes)  # the dense weights are kept while the pruned ones are written
    return Plan(
        weights=weights,
        masks=masks,
        passes=1 if method.needs else 0,
        peak_bytes=max(peak_resident_bytes(), resident_bytes() + max(later)),
        device_peak_bytes=peak_device_bytes(_device(model)),
        model_bytes=model_bytes,
        statistics_bytes=0 if statistics is None
        else sum(t.numel() * t.element_size() for t in statistics.sums.values()),
        masks_bytes=sum(packed),
        seconds_per_batch=seconds,
    )  # fmt: skip


def _made_up(adapter: Adapter, processor: Processor, size: int, pixels: int) -> Batch:
    images = [Image.new("RGB", (pixels, pixels), (i % 256, 127, 64)) for i in range(size)]
    return adapter.collate(processor, images, [_CAPTION] * size)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
