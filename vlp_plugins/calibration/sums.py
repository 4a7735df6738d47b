"""Sums over batches, and over processes: counts, and accumulators of the size of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from vlp_plugins.calibration.statistic import Key
from vlp_plugins.runtime.distributed import rank_and_size


@dataclass(frozen=True, slots=True)
class Tally:
    """Batches and samples, those of batches with an even and with an odd index apart.

    Attributes:
        batches: number of even and of odd batches.
        samples: number of samples in them.
    """

    batches: tuple[int, int] = (0, 0)
    samples: tuple[int, int] = (0, 0)

    def plus(self, index: int, samples: int) -> Tally:
        """With one more batch.

        Args:
            index: of the batch.
            samples: its size.
        """
        return self + Tally(_at(index, 1), _at(index, samples))

    def __add__(self, other: Tally) -> Tally:
        return self._with(other, 1)

    def __sub__(self, other: Tally) -> Tally:
        return self._with(other, -1)

    def _with(self, other: Tally, sign: int) -> Tally:
        (a, b), (c, d) = self.batches, self.samples
        (e, f), (g, h) = other.batches, other.samples
        return Tally((a + sign * e, b + sign * f), (c + sign * g, d + sign * h))


def _at(index: int, value: int) -> tuple[int, int]:
    return (0, value) if index % 2 else (value, 0)


class LargeSums:
    """Sums that are changed in place: a copy for every batch would cost more than the addition.

    So they can be caught half changed, by Ctrl-C or an error. They say so, and only a checkpoint
    from before brings whole sums back then.

    Attributes:
        sums: by statistic and site float64 `[2, size]`; row 0 sums the even batches, row 1 the odd.
        whole: False from the begin of a change that did not come to its end.
    """

    def __init__(self, sums: Mapping[Key, torch.Tensor], device: torch.device) -> None:
        """Starts with sums of earlier batches.

        Args:
            sums: of a checkpoint, or nothing.
            device: where to add up; float64 sums of a device that has none live on the CPU.
        """
        self._device = torch.device("cpu") if device.type == "mps" else device
        self.sums = {key: value.to(self._device) for key, value in sums.items()}
        self.whole = True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Everything that must happen together with an addition."""
        self.whole = False
        yield
        self.whole = True

    @torch.inference_mode(False)  # or a caller in it gets sums that nobody may change
    def add(self, key: Key, value: torch.Tensor, half: int) -> None:
        """Adds a value of one batch; to be called inside `changing`.

        Args:
            key: statistic and site.
            value: float32 `[size]`.
            half: 0 or 1.
        """
        if key not in self.sums:
            self.sums[key] = torch.zeros(2, len(value), dtype=torch.float64, device=self._device)
        self.sums[key][half].add_(value.to(self._device))


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
