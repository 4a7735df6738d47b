"""The peak memory of a block of code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vlp_plugins.runtime.memory import resident_bytes


class PeakMeter:
    """Peak bytes of a block: RAM, sampled, or the memory of a CUDA device, exact."""

    def __init__(self) -> None:
        self.start = 0
        self.peak = 0

    @property
    def extra(self) -> int:
        """Bytes above those at the start of the block."""
        return self.peak - self.start


@contextmanager
def peak_memory(
    device: torch.device | None = None,
    interval: float = 0.002,
    measure: Callable[[], int] = resident_bytes,
) -> Iterator[PeakMeter]:
    """Measures the peak memory of a block.

    Args:
        device: a CUDA device measures its allocations; anything else measures RAM.
        interval: seconds between two samples of RAM.
        measure: of the RAM, bytes.
    """
    meter = PeakMeter()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        meter.start = torch.cuda.memory_allocated(device)
        try:
            yield meter
        finally:
            meter.peak = torch.cuda.max_memory_allocated(device)
        return
    meter.start = meter.peak = measure()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            meter.peak = max(meter.peak, measure())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()
        meter.peak = max(meter.peak, measure())
