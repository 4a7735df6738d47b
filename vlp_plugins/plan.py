"""What a run will do and cost, said before any data is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.allocation import Target
from vlp_plugins.calibration import calibrate
from vlp_plugins.data.processors import Processor
from vlp_plugins.masks import Masks
from vlp_plugins.memory import peak_memory
from vlp_plugins.methods.base import Composition
from vlp_plugins.pruning import make_masks
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
        peak_bytes: expected peak of the whole process (of the GPU, on a GPU).
        model_bytes: parameters of the model, each shared one counted once.
        statistics_bytes: accumulators.
        masks_bytes: packed masks of all sparsities.
        seconds_per_batch: of the made-up batch; None for a method without data.
    """

    weights: WeightMap
    masks: Sequence[Masks]
    passes: int
    peak_bytes: int
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
) -> Plan:
    """Finds out what a run costs by running one made-up batch and cutting one set of masks.

    No file is read. The probe batch has blank images and long captions, so that memory is that of
    the longest batches.

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
    """
    weights = WeightMap.of(model, adapter)
    device = next(model.parameters()).device
    statistics = None
    seconds = None
    with peak_memory(device) as meter:
        if method.needs:
            if processor is None:
                raise ValueError(f"method {method.name!r} reads data: a processor is needed")
            batch = adapter.collate(
                processor,
                [Image.new("RGB", (image_size, image_size), (i % 256, 127, 64))
                 for i in range(batch_size)],
                [_CAPTION] * batch_size,
            )  # fmt: skip
            begin = time.perf_counter()
            statistics = calibrate(
                model, adapter, weights, [batch], method.needs, published=published
            )
            seconds = time.perf_counter() - begin
        masks = make_masks(weights, method, targets, statistics, floor=floor, published=published)
    sums = sum(t.numel() * 8 for t in statistics.sums.values()) if statistics is not None else 0
    return Plan(
        weights=weights,
        masks=masks,
        passes=1 if method.needs else 0,
        # Writing a mask file holds the bits of one set a second time.
        peak_bytes=meter.peak + max(_packed_bytes(m) for m in masks),
        model_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        statistics_bytes=sums,
        masks_bytes=sum(_packed_bytes(m) for m in masks),
        seconds_per_batch=seconds,
    )


def _packed_bytes(masks: Masks) -> int:
    return sum(bits.numel() for bits in masks.packed.values())
