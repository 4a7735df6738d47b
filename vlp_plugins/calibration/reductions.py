"""Sums over the processes that share a data pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed

from vlp_plugins.calibration.tally import Tally
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.statistics.base import Key


def sum_over_processes(
    sums: Mapping[Key, torch.Tensor], device: torch.device
) -> dict[Key, torch.Tensor]:
    """The sums of the accumulators of all processes, in sorted order.

    Accumulators are float64 sums of float32 values. A float64 has 29 bits more than a float32, so
    as long as the values of one element lie within a factor of 2^29 / n of each other for n
    batches, every sum is exact and no order of summation can change a bit: one process and several
    give the same masks. (Beyond that they agree to about 1e-16.)

    Args:
        sums: of this process, float64; processes may have met different sites.
        device: where to sum if the process group does not work on CPU.
    """
    if rank_and_size()[1] == 1:
        return {key: sums[key] for key in sorted(sums)}
    shapes = _shapes(sums)
    keys = sorted(shapes)
    if not keys:
        return {}
    parts = [sums.get(key, torch.zeros(shapes[key], dtype=torch.float64)) for key in keys]
    joined = torch.cat([part.flatten() for part in parts])
    joined = _all_reduce(joined, device).cpu()
    split = joined.split([part.numel() for part in parts])
    return {key: flat.view(shapes[key]).clone() for key, flat in zip(keys, split, strict=True)}


def sum_large(sums: dict[Key, torch.Tensor], device: torch.device) -> dict[Key, torch.Tensor]:
    """`sum_over_processes` tensor by tensor: nothing of the model's size exists twice.

    Args:
        sums: emptied meanwhile.
        device: see `sum_over_processes`.

    Returns:
        The sums on the CPU, in sorted order.
    """
    shapes = _shapes(sums)
    found = {}
    for key in sorted(shapes):
        part = sums.pop(key, None)
        if part is None:
            part = torch.zeros(shapes[key], dtype=torch.float64)
        found[key] = _all_reduce(part, device).cpu()
    return found


def sum_tally(tally: Tally, device: torch.device) -> Tally:
    """The counts of all processes together."""
    counts = _all_reduce(torch.tensor([*tally.batches, *tally.samples]), device).tolist()
    return Tally((counts[0], counts[1]), (counts[2], counts[3]))


def _shapes(sums: Mapping[Key, torch.Tensor]) -> dict[Key, tuple[int, ...]]:
    """Of the accumulators of all processes, which may have met different sites."""
    mine = {key: tuple(value.shape) for key, value in sums.items()}
    if rank_and_size()[1] == 1:
        return mine
    met: list[dict[Key, tuple[int, ...]]] = [{}] * rank_and_size()[1]
    distributed.all_gather_object(met, mine)
    return {key: shape for found in met for key, shape in found.items()}


def _all_reduce(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all processes, in place where the process group works on that device."""
    if rank_and_size()[1] == 1:
        return values
    values = values.to(device if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(values)
    return values
