"""How much memory this process holds, now and at its peak."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Bytes of this process that are in RAM; its peak where the system tells only that."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most bytes of this process that ever were in RAM.

    Linux counts in `ru_maxrss` what the parent held before it started this program; `VmHWM` is
    of this program alone.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes(device: torch.device) -> int | None:
    """The most bytes that tensors of this process ever held on a CUDA device; None on others."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


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
def peak_memory(device: torch.device | None = None, interval: float = 0.002) -> Iterator[PeakMeter]:
    """Measures the peak memory of a block.

    Args:
        device: a CUDA device measures its allocations; anything else measures RAM.
        interval: seconds between two samples of RAM.
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
    meter.start = meter.peak = resident_bytes()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            meter.peak = max(meter.peak, resident_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()
        meter.peak = max(meter.peak, resident_bytes())
