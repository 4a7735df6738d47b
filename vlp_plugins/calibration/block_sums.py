"""Sums of statistics over the batches of a block, and which batches are left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from vlp_plugins.calibration.moments import Key, sums_of
from vlp_plugins.calibration.paused import PausedForward
from vlp_plugins.calibration.probes import ActivationProbe, check_measured
from vlp_plugins.calibration.selections import TokenSelection
from vlp_plugins.masks.packed import Pruned
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError

logger = logging.getLogger("vlp_plugins.calibration")


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over all batches for the weights of one visit.

    Attributes:
        sums: by statistic name and site, `[size]`.
        samples: that they are of.
        left_out: indices of the batches that were left out so far.
    """

    sums: Mapping[Key, torch.Tensor]
    samples: int
    left_out: frozenset[int] = frozenset()
    _divided: set[int] = field(default_factory=set)

    def mean(
        self, statistic: str, weight: str, *, owners: Literal["all", "first"] = "all"
    ) -> torch.Tensor:
        """A statistic of one weight, summed over its sites and divided by the samples; `[size]`.

        Weights that read the same inputs may get the same tensor, which is not to be changed.

        Raises:
            StatisticsError: if nothing was measured for it.
        """
        found = list(sums_of(self.sums, statistic, weight, owners).values())
        if not found:
            raise StatisticsError(
                f"no {statistic!r} was measured of weight {weight!r} at "
                f"{'its first owner' if owners == 'first' else 'any module that uses it'}"
            )
        if len(found) > 1:
            return torch.stack(found).sum(0) / self.samples
        total = found[0]
        if self._is_summed_elsewhere(statistic, total, owners):
            return total / self.samples
        if id(total) not in self._divided:  # in place: a Gram matrix is not held twice
            self._divided.add(id(total))
            total.div_(self.samples)
        return total

    def _is_summed_elsewhere(
        self, statistic: str, total: torch.Tensor, owners: Literal["all", "first"]
    ) -> bool:
        """Whether another weight adds it to that of other sites."""
        weights = {key[1].weight for key, each in self.sums.items() if each is total}
        return any(len(sums_of(self.sums, statistic, name, owners)) > 1 for name in weights)


@dataclass
class Sums:
    """One walk.

    Attributes:
        probe: measures the inputs of weights.
        dtypes: of the sums of each statistic.
        tokens: which tokens count; None: all real ones.
        skip_nonfinite: whether batches are left out.
        decided: by canonical name.
        sums: of this process, of weights that are not decided yet; one tensor for sites that read
            the same inputs in every batch.
        left_out: batches of this process that were left out, and the samples in each.
    """

    probe: ActivationProbe
    dtypes: Mapping[str, torch.dtype]
    tokens: TokenSelection | None
    skip_nonfinite: bool
    decided: dict[str, Pruned] = field(default_factory=dict)
    sums: dict[Key, torch.Tensor] = field(default_factory=dict)
    left_out: dict[int, int] = field(default_factory=dict)

    def leave_out(self, forward: PausedForward) -> None:
        """Ends a forward, whose batch counts no longer."""
        self.left_out[forward.index] = forward.samples
        forward.stop()

    def take(self, forward: PausedForward) -> None:
        """Adds what the probe has measured of a batch to the sums, or leaves the batch out.

        Raises:
            NonFiniteError: if an input holds NaN or infinity and the batch is not to be left out.
        """
        found = self.probe.taken()
        try:
            check_measured(found, forward.index)
        except NonFiniteError as error:
            if not self.skip_nonfinite:
                raise
            logger.warning("left batch %d out: %s", forward.index, error)
            self.leave_out(forward)
            return
        calls = Counter(key for key, _, _ in found)
        together: dict[object, tuple[torch.Tensor, list[Key]]] = {}
        for number, (key, _, value) in enumerate(found):
            # Calls of one site are added one after the other, in their order.
            same = id(value) if calls[key] == 1 else (number,)
            together.setdefault(same, (value, []))[1].append(key)
        for value, keys in together.values():
            self._add(value, keys)

    def _add(self, value: torch.Tensor, keys: list[Key]) -> None:
        """Adds what was measured once to the sums of all sites that read it."""
        groups: dict[int, list[Key]] = {}
        for key in keys:
            groups.setdefault(id(self.sums.get(key)), []).append(key)
        for group in groups.values():
            total = self.sums.get(group[0])
            if total is None:
                total = value.to(self.dtypes[group[0][0]], copy=True)
            else:
                if any(each is total for key, each in self.sums.items() if key not in group):
                    total = total.clone()  # of sites that read the same until now
                total.add_(value)
            self.sums |= dict.fromkeys(group, total)

    def taken(self, names: Collection[str]) -> dict[Key, torch.Tensor]:
        """The sums of some weights, which are no longer kept here."""
        found = {key: self.sums.pop(key) for key in sorted(self.sums) if key[1].weight in names}
        # What is added to later on is not the caller's to change.
        stay = {id(total) for total in self.sums.values()}
        copies = {id(t): t.clone() for t in found.values() if id(t) in stay}
        return {key: copies.get(id(total), total) for key, total in found.items()}
