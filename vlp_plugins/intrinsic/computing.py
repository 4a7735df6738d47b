"""Dimensions of the layers whose points are there, shared out among processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

from vlp_plugins.calibration.statistic import Site
from vlp_plugins.intrinsic.estimate import Estimator
from vlp_plugins.intrinsic.points import Points
from vlp_plugins.intrinsic.sites import Met, Sites
from vlp_plugins.intrinsic.state import Found
from vlp_plugins.intrinsic.twonn import estimate
from vlp_plugins.runtime.distributed import all_gather, failing_together, rank_and_size


def compute(
    chosen: Sequence[Site],
    points: dict[Site, Points],
    sites: Sites,
    estimator: Estimator,
    device: torch.device,
    *,
    complete: bool,
) -> dict[Site, Found]:
    """The dimension of each of some layers; all processes return the same.

    Args:
        chosen: the layers, the same in all processes.
        points: of this process; emptied meanwhile. A layer that its batches did not reach is
            absent.
        sites: what is known of the layers.
        estimator: how.
        device: of the points.
        complete: each process has all samples (one process, or a sharded model); else those of its
            batches, and the processes take turns in being sent all points of a layer.

    Raises:
        VlpError: if a dimension cannot be estimated; names the layer.
    """
    rank, processes = rank_and_size()
    found: dict[Site, Found] = {}
    for first in range(0, len(chosen), processes):
        group = chosen[first : first + processes]
        mine: torch.Tensor | None = None
        for process, site in enumerate(group):
            own = points.pop(site, None)
            if not complete:
                together = _together(own, process, device)
            else:
                together = None if own is None else own.values
            if process == rank:
                mine = together
            del own, together
        with failing_together():
            result = None if mine is None else _found(mine, sites[group[rank]], estimator)
        mine = None
        found |= {
            site: value for site, value in zip(group, all_gather(result), strict=False) if value
        }
    return found


def _found(points: torch.Tensor, met: Met, estimator: Estimator) -> Found:
    found = estimate(points, estimator, what=f"points of {met}")
    return Found(found, points.shape[1], len(points))


def _together(own: Points | None, receiver: int, device: torch.device) -> torch.Tensor | None:
    """The points of all processes in the order of their batches, in one of them; None elsewhere."""
    rank, _ = rank_and_size()
    shares = all_gather(None if own is None else (own.widths, own.batches, own.dtype))
    known = [share for share in shares if share is not None]
    calls = max(len(widths) for widths, _, _ in known)
    padded = [widths + (0,) * (calls - len(widths)) for widths, _, _ in known]
    widths = [max(column) for column in zip(*padded, strict=True)]
    batches = sorted(
        (batch, size, who, where)
        for who, share in enumerate(shares)
        for where, (batch, size) in enumerate(share[1] if share else ())
    )
    values = None
    if rank == receiver:
        samples = sum(size for _, size, _, _ in batches)
        values = torch.empty(samples, sum(widths), dtype=known[0][2], device=device)
    start = 0
    for _, size, who, where in batches:
        if who == rank and own is not None:
            rows = own.of_batch(where, widths)
            if values is None:
                _send(rows, receiver)
            else:
                values[start : start + size] = rows
        elif values is not None:
            _receive(values[start : start + size], who)
        start += size
    return values


def _send(rows: torch.Tensor, receiver: int) -> None:
    distributed.send(rows.to(_link(rows)).view(torch.uint8), dst=receiver)


def _receive(rows: torch.Tensor, sender: int) -> None:
    """Fills contiguous rows."""
    device = _link(rows)
    got = rows if rows.device == device else torch.empty_like(rows, device=device)
    distributed.recv(got.view(torch.uint8), src=sender)
    if got is not rows:
        rows.copy_(got)


def _link(rows: torch.Tensor) -> torch.device:
    """Where the process group takes tensors; as bytes, because not every dtype may travel."""
    return rows.device if distributed.get_backend() == "nccl" else torch.device("cpu")
