"""Accumulators of the size of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vlp_plugins.statistics.base import Key


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
