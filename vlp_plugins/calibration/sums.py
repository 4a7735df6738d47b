"""Sums over batches, and over processes: counts, and accumulators of the size of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from vlp_plugins.calibration.moments import Key
from vlp_plugins.runtime.distributed import all_gather, rank_and_size


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbers of batches and of samples.

    Attributes:
        batches: with an even and with an odd index.
        samples: in these.
    """

    batches: tuple[int, int] = (0, 0)
    samples: tuple[int, int] = (0, 0)

    def plus(self, index: int, samples: int) -> Tally:
        """With one more batch, of that index and size."""
        even, odd = (0, 1) if index % 2 else (1, 0)
        (a, b), (c, d) = self.batches, self.samples
        return Tally((a + even, b + odd), (c + even * samples, d + odd * samples))

    def __sub__(self, other: Tally) -> Tally:
        (a, b), (c, d) = self.batches, self.samples
        (e, f), (g, h) = other.batches, other.samples
        return Tally((a - e, b - f), (c - g, d - h))


class LargeSums:
    """Sums that are changed in place: a copy for every batch would cost more than the addition.

    So Ctrl-C or an error can interrupt a change. `whole` is then false, and only a checkpoint from
    before has sums that fit together.

    Attributes:
        sums: by statistic and site float64 `[2, size]`; row 0 sums the even batches, row 1 the odd.
            Or `[1, size]`, of all batches: half the memory.
        whole: False from the first addition of a change that did not reach its end.
    """

    def __init__(
        self, sums: Mapping[Key, torch.Tensor], device: torch.device, *, halves: bool = True
    ) -> None:
        """Starts with the sums of a checkpoint, or none; CPU replaces a device without float64."""
        self._rows = 2 if halves else 1
        self._device = torch.device("cpu") if device.type == "mps" else device
        self.sums = {key: value.to(self._device) for key, value in sums.items()}
        self.whole = True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Everything that must happen together with an addition."""
        yield
        self.whole = True

    @torch.inference_mode(False)  # or a caller in it gets sums that cannot be changed
    def add(self, key: Key, value: torch.Tensor, half: int) -> None:
        """Adds float32 `[size]` of one batch to half 0 or 1; to be called inside `changing`."""
        if key not in self.sums:
            size = (self._rows, len(value))
            self.sums[key] = torch.zeros(size, dtype=torch.float64, device=self._device)
        self.whole = False
        self.sums[key][half % self._rows].add_(value.to(self._device))


def sum_over_processes(
    sums: dict[Key, torch.Tensor], device: torch.device
) -> dict[Key, torch.Tensor]:
    """The sums of the accumulators of all processes, on the CPU and in sorted order.

    Accumulators are float64 sums of float32 values. A float64 has 29 bits more than a float32, so
    as long as the values of one element lie within a factor of 2^29 / n of each other for n
    batches, every sum is exact and no order of summation can change a bit: one process and several
    give the same masks. (Beyond that they agree to about 1e-16; Gram matrices of a
    walk by blocks, which are summed in float32, agree to its rounding.)

    Args:
        sums: of this process; processes may have other sites. Emptied tensor by tensor, so
            that nothing of the model's size exists twice. Sites may have one tensor.
        device: where to sum if the process group does not work on CPU.

    Returns:
        Sites that have one tensor in every process have one here.
    """
    first: dict[int, Key] = {}
    for key in sorted(sums):
        first.setdefault(id(sums[key]), key)
    used = Counter(map(id, sums.values()))
    own = {key: (first[id(v)], tuple(v.shape), v.dtype) for key, v in sums.items()}
    theirs = all_gather(own)
    shapes = {key: each[1:] for process in theirs for key, each in process.items()}
    together: dict[tuple[Key | None, ...], list[Key]] = {}
    for key in sorted(shapes):
        alike = tuple(process[key][0] if key in process else None for process in theirs)
        together.setdefault(alike, []).append(key)
    found: dict[Key, torch.Tensor] = {}
    for keys in together.values():
        parts = [sums.pop(key) for key in keys if key in sums]
        if parts:
            part = parts[0]
            used[id(part)] -= len(parts)
            if used[id(part)]:  # it is summed in place, and another process has several
                part = part.clone()
        else:
            shape, dtype = shapes[keys[0]]
            part = torch.zeros(shape, dtype=dtype)
        found |= dict.fromkeys(keys, _all_reduce(part, device).cpu())
    return {key: found[key] for key in sorted(found)}


def sum_tally(tally: Tally, device: torch.device) -> Tally:
    """The counts of all processes together."""
    counts = _all_reduce(torch.tensor([*tally.batches, *tally.samples]), device).tolist()
    return Tally((counts[0], counts[1]), (counts[2], counts[3]))


def _all_reduce(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all processes, in place where the process group works on that device."""
    if rank_and_size()[1] == 1:
        return values
    values = values.to(device if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(values)
    return values
