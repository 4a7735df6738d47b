"""Budgets of groups of tensors: how much every block keeps, divided evenly inside of it."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlp_plugins.calibration.batches import check_batches, number_of_batches
from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.distributed import all_gather, batch_shard
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.scoring.allocation import (
    Allocation,
    EvenAllocation,
    LayerAllocation,
    budgets_of,
    least_kept,
    proportional,
    shares,
)
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import Scored, Selection

if TYPE_CHECKING:
    from vlp_plugins.methods.method import Context
    from vlp_plugins.models.adapter import Batch

_BY_TENSOR = LayerAllocation()
Group = tuple[str, int]
"""A block, by modality and depth; a tensor is one by its name."""


@dataclass(frozen=True)
class Groups:
    """The groups that a budget is divided among.

    Attributes:
        importances: not negative; larger keeps more.
        sizes: numbers of elements.
        least: what each keeps at least.
    """

    importances: Sequence[float]
    sizes: Sequence[int]
    least: Sequence[int]


@dataclass(frozen=True)
class GroupAllocation(Allocation):
    """Gives every group of tensors a budget; inside a group all tensors lose the same fraction.

    Exactly int(sparsity x N) of all N elements go; with budgets per modality of those of each.

    Attributes:
        even: how a tensor's part is removed: from the tensor, or from each of its rows. A method
            that compares rows brings that along.
        factors: multiply the importance of a group, by the mean over its elements; None: nothing.
    """

    even: EvenAllocation = _BY_TENSOR
    factors: Factors | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.even, EvenAllocation):
            raise UnsupportedError(
                f"allocation {self.name!r}: even={self.even!r}; give LayerAllocation() or "
                "RowAllocation(), or leave it out"
            )

    def within(self, own: Allocation) -> Allocation:
        return replace(self, even=own) if isinstance(own, EvenAllocation) else self

    def with_factors(self, factors: Factors) -> Allocation:
        if self.factors is not None:
            raise UnsupportedError(f"allocation {self.name!r} has factors already")
        return replace(self, factors=factors)

    def group_of(self, weight: Weight) -> Group:
        """The group of a weight: by default its transformer layer."""
        return weight.modality, weight.depth

    def groups_of(self, weights: Mapping[str, Weight]) -> dict[Group, list[str]]:
        """The names of the weights of every group."""
        groups: dict[Group, list[str]] = {}
        for name, weight in weights.items():
            groups.setdefault(self.group_of(weight), []).append(name)
        return groups

    @abstractmethod
    def importances(self, scored: Scored) -> dict[Group, float]:
        """What decides about the budget of every group; not negative, larger keeps more."""

    @abstractmethod
    def sparsities(self, groups: Groups, sparsity: float) -> list[float]:
        """The published rule: sparsity of every group."""

    @abstractmethod
    def kept(self, groups: Groups, keep: int, sparsity: float) -> list[int]:
        """How many elements every group keeps.

        Args:
            groups: that keep at least no more than `keep` together.
            keep: what they keep together.
            sparsity: that was asked for.
        """

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        importances = self.importances(replace(scored, scorer=scored.unscaled))
        if self.factors is not None:
            importances = self._times_factors(importances, scored.weights, self.factors)
        counts = []
        for target in targets:
            count: dict[str, int] = {}
            for names, sparsity in budgets_of(scored, target):
                count |= self._removed(scored.subset(names), importances, sparsity, floor)
            counts.append({name: count[name] for name in scored.weights})
        return self.even.selected(scored, counts, floor)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "even": self.even.name}

    def _times_factors(
        self,
        importances: Mapping[Group, float],
        weights: Mapping[str, Weight],
        factors: Factors,
    ) -> dict[Group, float]:
        factors.check(weights)
        greatest = max(factors[name] for name in weights)  # equal factors shall change nothing
        sums = dict.fromkeys(importances, (0.0, 0))
        for name, weight in weights.items():
            total, size = sums[self.group_of(weight)]
            share = weight.numel * (factors[name] / greatest)
            sums[self.group_of(weight)] = total + share, size + weight.numel
        return {group: importances[group] * total / size for group, (total, size) in sums.items()}

    def _removed(
        self, scored: Scored, importances: Mapping[Group, float], sparsity: float, floor: float
    ) -> dict[str, int]:
        weights = scored.weights
        groups = self.groups_of(weights)
        least = least_kept(weights, floor, published=scored.published)
        divided = Groups(
            [importances[group] for group in groups],
            [sum(weights[name].numel for name in names) for names in groups.values()],
            [sum(least[name] for name in names) for names in groups.values()],
        )
        if scored.published:
            found = self.sparsities(divided, sparsity)
            return {
                name: self.even.removed(weights[name], ratio)
                for names, ratio in zip(groups.values(), found, strict=True)
                for name in names
            }
        total = sum(divided.sizes)
        keep = total - int(sparsity * total)
        if keep < sum(least.values()):
            numel = {name: weight.numel for name, weight in weights.items()}
            proportional(keep, numel, least, numel, floor)  # says what is wrong
        removed: dict[str, int] = {}
        for names, stay in zip(groups.values(), self.kept(divided, keep, sparsity), strict=True):
            numel = {name: weights[name].numel for name in names}
            bounds = {name: least[name] for name in names}
            each = proportional(stay, numel, bounds, numel, floor)
            removed |= {name: size - each[name] for name, size in numel.items()}
        return removed


@dataclass(frozen=True)
class BudgetAllocation(GroupAllocation):
    """Budgets by what was measured of the model: the rule of ECoFLaP and TAMP.

    Every group keeps what a sparsity `margin` above the target leaves it; what is left is divided
    in proportion to the importance of the groups and (by default, quirk budget-D1) their sizes.

    Attributes:
        margin: how far above the target the sparsity of a group may be.
        found: what `measure` found; None: nothing was measured yet.
    """

    margin: float = 0.1
    found: Mapping[str, Any] | None = None

    score: ClassVar[Scorer | None] = Magnitude()  # none is read, and it needs no data

    def __post_init__(self) -> None:
        super().__post_init__()
        margin = self.margin
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= 1:
            raise UnsupportedError(
                f"allocation {self.name!r}: margin={margin!r}; give a number from 0 (the same "
                "sparsity everywhere) to 1"
            )

    @property
    def measured(self) -> bool:
        return self.found is not None

    def known(self, weights: Mapping[str, Weight]) -> Mapping[str, Any]:
        """What was measured of every weight.

        Raises:
            UnsupportedError: if nothing was, or not of one of these.
        """
        if self.found is None:
            raise UnsupportedError(
                f"allocation {self.name!r} runs the model before it can allocate; prune with it "
                "(allocation=..., with batches), which does"
            )
        if missing := next((name for name in weights if name not in self.found), None):
            raise UnsupportedError(
                f"allocation {self.name!r} was measured in a model without weight {missing!r}; "
                "measure it in this one"
            )
        return self.found

    def record(self) -> dict[str, Any]:
        own = {**super().record(), "margin": self.margin}
        if self.found is None:
            return own
        text = json.dumps(sorted(self.found.items()))
        return {**own, "measured": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def sparsities(self, groups: Groups, sparsity: float) -> list[float]:
        most = sparsity + self.margin
        return published_budgets(groups.importances, groups.sizes, sparsity, most)

    def kept(self, groups: Groups, keep: int, sparsity: float) -> list[int]:
        density = 1 - min(1.0, sparsity + self.margin)
        base = [
            max(low, int(size * density))
            for low, size in zip(groups.least, groups.sizes, strict=True)
        ]
        if sum(base) > keep:
            base = list(groups.least)  # the floor leaves no room for the margin
        room = [size - low for size, low in zip(groups.sizes, base, strict=True)]
        highest = max(groups.importances)
        weighted = [
            size * (max(value / highest, 1e-9) if highest else 1.0)
            for size, value in zip(groups.sizes, groups.importances, strict=True)
        ]
        extra = shares(keep - sum(base), weighted, [0] * len(room), room)
        return [low + more for low, more in zip(base, extra, strict=True)]


def published_budgets(
    scores: Sequence[float], sizes: Sequence[int], sparsity: float, most: float
) -> list[float]:
    """The published rule of ECoFLaP and TAMP, in float32: sparsity of every group.

    Equal scores keep equal numbers of elements, so that small groups end nearly dense (quirk
    budget-D1); what was dealt out too much is added once more (quirk budget-D2).

    Args:
        scores: of the groups, not negative.
        sizes: numbers of elements.
        sparsity: of all together.
        most: of a single group; above 1 counts as 1.
    """
    c = np.array(scores, dtype=np.float32)
    n = np.array(sizes, dtype=np.float32)
    most = min(1.0, most)
    keep_in_all = int(sum(size * (1 - sparsity) for size in sizes))
    keep = np.ceil(n * np.float32(1 - most)).astype(np.float32)
    while keep.sum() < keep_in_all:
        rest = np.float32(keep_in_all - keep.sum())
        total = c.sum()
        added = np.ceil(c / total * rest) if total > 0 else np.zeros_like(c)
        if not added.any():
            for place in range(len(n)):
                step = min(float(n[place] - keep[place]), float(keep_in_all - keep.sum()))
                keep[place] += max(step, 0.0)
            break
        keep += added
        c[keep >= n] = 0
        keep = np.minimum(keep, n)
    largest = int(keep.argmax())
    keep[largest] = min(keep[largest] + max(keep.sum() - keep_in_all, 0), n[largest])
    return (1 - keep / n).tolist()


def batches_of_this_process(context: Context, limit: int | None) -> Iterator[tuple[int, Batch]]:
    """The batches that this process measures, with their indices.

    Args:
        context: of the run.
        limit: number of batches to read; None reads all.

    Raises:
        DataError: if there are none.
    """
    check_batches(context.batches, limit)
    rank, world = batch_shard(sharded=context.weights.sharded)
    total = number_of_batches(context.batches, limit)
    index = -1
    for index, batch in enumerate(islice(context.batches, limit)):
        if index % world == rank:
            yield index, batch
        if context.progress is not None:
            context.progress(index + 1, total)
    if index < 0:
        raise DataError("the calibration data is empty: no batch was read; check its path")


def sum_in_order(values: Mapping[int, Sequence[float]]) -> list[float]:
    """The sums of what all processes measured of each batch, the same for any number of them."""
    found = {index: each for part in all_gather(dict(values)) for index, each in part.items()}
    return [math.fsum(column) for column in zip(*(found[i] for i in sorted(found)), strict=True)]
