"""What is worth knowing about a run: time, memory, data, and whether the data was enough."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from vlp_plugins.calibration.processes import place
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.job.prepared import Prepared
from vlp_plugins.masks import Masks
from vlp_plugins.memory import peak_device_bytes, peak_resident_bytes
from vlp_plugins.report.page import Table
from vlp_plugins.statistics.store import Statistics


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


def memory_facts(device: torch.device) -> dict[str, str]:
    """Peak memory until now."""
    facts = {"peak memory of the process": f"{peak_resident_bytes() / 1e9:.2f} GB"}
    if (on_device := peak_device_bytes(device)) is not None:
        facts["peak memory of the GPU"] = f"{on_device / 1e9:.2f} GB"
    return facts


def data_facts(statistics: Statistics | None, source: CaptionSource | None) -> dict[str, str]:
    """What was read.

    Args:
        statistics: None for a method without data.
        source: where the pairs came from; None if the statistics come from a file.
    """
    if statistics is None:
        return {"calibration data": "none needed"}
    facts = {
        "calibration data": f"{sum(statistics.samples):,} samples in {statistics.batches:,} batches"
        + ("" if source is not None else ", read in an earlier run"),
        "fingerprint of the data": statistics.fingerprint,
    }
    if source is not None:
        facts["images that could not be used"] = f"{source.skipped:,} of {source.seen:,}"
    if (world := place()[1]) > 1:
        facts["processes"] = str(world)
    return facts


def agreement(
    job: Prepared, statistics: Statistics | None, masks: Mapping[str, Masks]
) -> list[Table]:
    """How alike the masks from either half of the batches are: was that enough data?

    No table for a method without data.
    """
    if statistics is None:
        return []
    rows = []
    if min(statistics.samples) > 0:
        halves = [job.masks(statistics, half=half) for half in (0, 1)]
        for title, one, other in zip(masks, *halves, strict=True):
            overlaps = one.compare(other)
            rows += [
                [title, name, f"{o.agreement:.3%}", f"{o.iou:.4f}"] for name, o in overlaps.items()
            ]
    note = (
        "Masks from the even and the odd batches alone, compared: the split-half agreement. The "
        "closer to 100 %, the less more data would change."
        if rows
        else "There was a single batch, so there are no two halves to compare. Give more batches."
    )
    header = ["sparsity", "modality", "equal elements", "kept by both / by either"]
    return [Table("Was that enough data?", header, rows, note)]
