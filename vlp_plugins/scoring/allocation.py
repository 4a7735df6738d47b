"""Allocations: how many elements each tensor keeps."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlp_plugins.models.discovery import registry
from vlp_plugins.models.request import Target, budget_of, check_sparsity
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import (
    SparsityError,
    UnknownNameError,
    UnsupportedError,
    shown,
    suggest,
)
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import PatternSelection, RowSelection, Scored, Selection
from vlp_plugins.scoring.threshold import Cut

if TYPE_CHECKING:
    from vlp_plugins.methods.method import Context

_BISECTIONS = 200


def shares(
    total: int, proportions: Sequence[float], least: Sequence[int], most: Sequence[int]
) -> list[int]:
    """Whole numbers that sum to `total`, as near to the proportions as the bounds allow.

    Each is `level * proportion` (above 0), no less than its least and no more than its most, with
    one level for all. Fractions are rounded down; what is missing then goes to the largest of them,
    among equals to the first.

    Raises:
        ValueError: if the total is below the sum of `least` or above that of `most`.
    """
    low_bounds, high_bounds = np.array(least, dtype=np.int64), np.array(most, dtype=np.int64)
    if not low_bounds.sum() <= total <= high_bounds.sum():
        raise ValueError(f"{total} is not between {low_bounds.sum()} and {high_bounds.sum()}")
    each = np.array(proportions, dtype=np.float64)

    def filled(level: float) -> np.ndarray:
        return np.clip(level * each, low_bounds, high_bounds)

    low, high = 0.0, float((high_bounds / each).max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if filled(middle).sum() > total:
            high = middle
        else:
            low = middle
    exact = filled(low)
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    while (missing := total - int(whole.sum())) > 0:
        room = order[whole[order] < high_bounds[order]][:missing]
        whole[room] += 1
    return whole.tolist()


def proportional(
    keep: int,
    proportions: Mapping[str, float],
    least: Mapping[str, int],
    sizes: Mapping[str, int],
    floor: float,
) -> dict[str, int]:
    """How many elements each keeps, in proportion and within its bounds; `keep` together."""
    if keep < sum(least.values()):
        raise SparsityError(
            f"{keep} of {sum(sizes.values())} elements shall stay, and a floor of {floor:g} keeps "
            f"at least {sum(least.values())}; lower the sparsity or the floor"
        )
    bounds = list(least.values()), list(sizes.values())
    return dict(zip(sizes, shares(keep, list(proportions.values()), *bounds), strict=True))


def under_floor(
    scored: Scored, removals: Sequence[int], floor: float
) -> list[dict[str, Selection]]:
    """Global cuts that remove so many elements, while every tensor keeps its floor.

    Raises:
        SparsityError: if both cannot be had.
    """
    if floor == 0:
        return [dict(cuts) for cuts in scored.cuts(removals)]
    caps = most_removed(scored, floor)
    return [_under_caps(scored, removal, caps, floor) for removal in removals]


def check_floor(scored: Scored, selections: Mapping[str, Selection], floor: float) -> None:
    """Makes sure of a floor where the counts are fixed otherwise (rows, patterns).

    Raises:
        SparsityError: naming the first tensor that would keep less.
    """
    for name, cap in most_removed(scored, floor).items() if floor else ():
        if selections[name].remove > cap:
            numel = scored.weights[name].numel
            raise SparsityError(
                f"{name!r} would lose {selections[name].remove} of {numel} elements, and a floor "
                f"of {floor:g} lets it lose {cap}; lower the sparsity or the floor"
            )


def most_removed(scored: Scored, floor: float) -> dict[str, int]:
    """How many elements each tensor may lose.

    Raises:
        SparsityError: see `least_kept`.
    """
    least = least_kept(scored.weights, floor, published=scored.published)
    return {name: weight.numel - least[name] for name, weight in scored.weights.items()}


def least_kept(
    weights: Mapping[str, Weight], floor: float, *, published: bool = False
) -> dict[str, int]:
    """How many elements each tensor keeps; `SparsityError` for a floor that is no fraction."""
    if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 <= floor < 1:
        raise SparsityError(f"a floor is the least fraction kept, in [0, 1), not {floor!r}")
    if published and floor:
        raise SparsityError(
            "the published methods have no floor; leave out the floor or variant='published'"
        )
    # Rounded up; the margin absorbs the error of 1 - floor.
    return {name: math.ceil(floor * w.numel - 1e-9) for name, w in weights.items()}


def _under_caps(
    scored: Scored, removal: int, caps: Mapping[str, int], floor: float
) -> dict[str, Selection]:
    """Global cuts in which no tensor loses more than its cap; the others make up for it."""
    if removal > sum(caps.values()):
        total = sum(weight.numel for weight in scored.weights.values())
        raise SparsityError(
            f"{removal} of {total} elements shall go, and a floor of {floor:g} lets at most "
            f"{sum(caps.values())} go; lower the sparsity or the floor"
        )
    capped: dict[str, int] = {}
    cuts: dict[str, Cut] = {}
    while True:
        free = [name for name in scored.weights if name not in capped]
        if free:
            cuts = scored.subset(free).cuts([removal - sum(capped.values())])[0]
        over = {name: caps[name] for name in free if cuts[name].remove > caps[name]}
        if not over:
            break
        capped.update(over)
    ranked = scored.ranking()
    for name, count in capped.items():
        cuts[name] = ranked.cuts_of(ranked.scores(name), [count])[0]
    return {name: cuts[name] for name in scored.weights}


class Allocation(ABC):
    """Decides how many elements each tensor keeps. A composition takes any instance.

    Attributes:
        name: what `allocation_by_name`, reports and mask files call it.
        takes_budgets: whether a target may be a budget per modality.
        internal: fields that are no parameters of the name.
        compares: whether what one tensor keeps depends on others, so that it takes all of them.
        score: what `select` reads, whatever score ranks within a tensor; None: that of the method.
    """

    name: ClassVar[str]
    takes_budgets: ClassVar[bool] = True
    internal: ClassVar[tuple[str, ...]] = ("even", "factors", "found")
    compares: ClassVar[bool] = True
    score: ClassVar[Scorer | None] = None

    @property
    def measured(self) -> bool:
        """Whether it knows of the model what `select` needs; if not, `measure` finds it out."""
        return True

    def measure(self, context: Context) -> Allocation:
        """The same allocation, with what it had to run the model for, without factors.

        It is called in all processes at once, before anything else of a run. Model and random
        state are as they were afterwards; the result does not depend on the number of processes.

        Args:
            context: of the run: model, adapter, weights, batches and how they are read.

        Raises:
            VlpError: if the model cannot be measured.
        """
        return self

    def forwards(self, weights: Mapping[str, Weight], batches: int) -> int:
        """How many forward passes `measure` takes, one batch each; for a plan."""
        return 0

    def within(self, own: Allocation) -> Allocation:
        """The allocation as it takes the place of a method's own one.

        An allocation that says how much whole blocks keep divides that inside a block as the
        method does, by tensor or by row.
        """
        return self

    @abstractmethod
    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        """For every target, the selection of every tensor, on `scored.ranking()`'s scores.

        Args:
            scored: weights and the score that the allocation reads.
            targets: sparsities.
            floor: least fraction that each tensor keeps; prevents layer collapse.

        Raises:
            SparsityError: if a target is outside [0, 1), names an unknown modality or cannot be
                met under the floor.
        """

    def with_factors(self, factors: Factors) -> Allocation:
        """The allocation where every weight has a factor of its importance.

        The scores that `select` reads are multiplied by the factors already: an allocation that
        compares tensors by them stays as it is.

        Raises:
            UnsupportedError: if factors cannot change anything.
        """
        return self

    def record(self) -> dict[str, Any]:
        """For the manifest of masks and the identity of a run that can be resumed."""
        return {"allocation": self.name}


def overall(target: Target, allocation: str) -> float:
    """A target that is one sparsity.

    Raises:
        SparsityError: if it is a budget per modality.
    """
    if isinstance(target, Mapping):
        raise SparsityError(
            f"{allocation} allocation takes one sparsity, not {dict(target)}; use "
            "allocation='modality' or 'layer'"
        )
    return check_sparsity(target)


class GlobalAllocation(Allocation):
    """One threshold for all tensors: removed = int(sparsity x N)."""

    name: ClassVar[str] = "global"
    takes_budgets: ClassVar[bool] = False

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        total = sum(weight.numel for weight in scored.weights.values())
        removals = [int(overall(target, self.name) * total) for target in targets]
        return under_floor(scored, removals, floor)


class ModalityAllocation(Allocation):
    """One threshold per modality, each removing int(sparsity x N_modality): MULTIFLOW's prior."""

    name: ClassVar[str] = "modality"

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        groups = modalities_of(scored)
        budgets = [budget_of(target, list(groups)) for target in targets]
        removals = {}
        for modality, names in groups.items():
            total = sum(scored.weights[name].numel for name in names)
            removals[modality] = [int(budget[modality] * total) for budget in budgets]
        return within_modalities(scored, removals, floor)


def modalities_of(scored: Scored) -> dict[str, list[str]]:
    """Names of the weights of every modality, in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for weight in scored.weights.values():
        groups.setdefault(weight.modality, []).append(weight.name)
    return groups


def budgets_of(scored: Scored, target: Target) -> list[tuple[list[str], float]]:
    """Names of weights that have one budget, and their sparsity: all, or those of a modality."""
    modalities = modalities_of(scored)
    budget = budget_of(target, list(modalities))
    if isinstance(target, Mapping):
        return [(names, budget[modality]) for modality, names in modalities.items()]
    return [(list(scored.weights), next(iter(budget.values())))]


def within_modalities(
    scored: Scored, removals: dict[str, list[int]], floor: float
) -> list[dict[str, Selection]]:
    """One threshold per modality and target.

    Args:
        scored: weights and their scores.
        removals: by modality how many elements go, one count per target.
        floor: see `under_floor`.
    """
    results: list[dict[str, Selection]] = [{} for _ in next(iter(removals.values()))]
    for modality, names in modalities_of(scored).items():
        parts = under_floor(scored.subset(names), removals[modality], floor)
        for result, part in zip(results, parts, strict=True):
            result.update(part)
    return [{name: result[name] for name in scored.weights} for result in results]


@dataclass(frozen=True)
class Pattern(Allocation):
    """`keep` of every `of` consecutive elements of a row stay.

    Example:
        pattern = vlp.Pattern(keep=2, of=4)
        masks = vlp.prune(model, data, method="wanda", allocation=pattern)
    """

    keep: int
    of: int
    takes_budgets: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise SparsityError(f"a pattern keeps 1 to {self.of} of {self.of}, not {self.keep}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """`keep=2,of=4`, as `allocation_by_name` reads it."""
        return f"keep={self.keep},of={self.of}"

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern makes, whatever the scores."""
        return 1 - self.keep / self.of

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        for target in targets:
            if abs(overall(target, self.name) - self.sparsity) > 1e-9:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} makes sparsity {self.sparsity:g}, "
                    f"not {target}; leave the sparsity out"
                )
        selections: dict[str, Selection] = {}
        for name, weight in scored.weights.items():
            _, columns = weight.rows_and_columns
            if columns % self.of:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} does not divide the {columns} inputs of "
                    f"{name!r}; exclude that layer or choose another pattern"
                )
            selections[name] = PatternSelection(self.keep, self.of, weight.numel)
        check_floor(scored, selections, floor)
        return [selections for _ in targets]

    def with_factors(self, factors: Factors) -> Allocation:
        raise UnsupportedError(
            f"pattern {self.name} keeps the same fraction of every tensor, so a factor per tensor "
            "changes nothing; give another allocation, such as global or modality"
        )


class EvenAllocation(Allocation):
    """Every tensor loses the same fraction."""

    compares: ClassVar[bool] = False

    @abstractmethod
    def removed(self, weight: Weight, sparsity: float) -> int:
        """How many elements a tensor loses."""

    @abstractmethod
    def selections(
        self, scored: Scored, name: str, removals: Sequence[int], floor: float
    ) -> Sequence[Selection]:
        """Of one tensor, for every count of removed elements; `SparsityError` below the floor."""

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        return self.selected(scored, [self.counts(scored, target) for target in targets], floor)

    def counts(self, scored: Scored, target: Target) -> dict[str, int]:
        """How many elements every tensor loses."""
        budget = budget_of(target, list(modalities_of(scored)))
        return {
            name: self.removed(weight, budget[weight.modality])
            for name, weight in scored.weights.items()
        }

    def selected(
        self, scored: Scored, counts: Sequence[Mapping[str, int]], floor: float
    ) -> list[dict[str, Selection]]:
        """Selections that remove so many elements of every tensor, one dict per target."""
        results: list[dict[str, Selection]] = [{} for _ in counts]
        for name in scored.weights:
            removals = [count[name] for count in counts]
            found = self.selections(scored, name, removals, floor)
            for result, selection in zip(results, found, strict=True):
                result[name] = selection
        return results

    def with_factors(self, factors: Factors) -> Allocation:
        return ByFactor(self, factors)


class LayerAllocation(EvenAllocation):
    """Every tensor loses the same fraction: int(sparsity x n) of its n elements."""

    name: ClassVar[str] = "layer"

    def removed(self, weight: Weight, sparsity: float) -> int:
        return int(sparsity * weight.numel)

    def selections(
        self, scored: Scored, name: str, removals: Sequence[int], floor: float
    ) -> Sequence[Selection]:
        return [found[name] for found in under_floor(scored.subset([name]), removals, floor)]


class RowAllocation(EvenAllocation):
    """Every output neuron loses int(sparsity x in_features) inputs: Wanda's comparison group."""

    name: ClassVar[str] = "row"

    def removed(self, weight: Weight, sparsity: float) -> int:
        rows, columns = weight.rows_and_columns
        return rows * int(sparsity * columns)

    def selections(
        self, scored: Scored, name: str, removals: Sequence[int], floor: float
    ) -> Sequence[Selection]:
        rows, _ = scored.weights[name].rows_and_columns
        found = [RowSelection(count // rows, rows, count % rows) for count in removals]
        for selection in found:
            check_floor(scored.subset([name]), {name: selection}, floor)
        return found


@dataclass(frozen=True)
class ByFactor(Allocation):
    """Even densities times a factor per tensor.

    An even allocation reads no scores, so that multiplying them would change nothing. Here what a
    tensor keeps of its elements is proportional to its factor, up to all of them; together the
    tensors (with budgets per modality, those of each modality) keep exactly as many as the even
    allocation leaves. Equal factors leave everything as it is.

    Attributes:
        even: the allocation without factors.
        factors: by canonical name.
    """

    even: EvenAllocation
    factors: Factors

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the even allocation; the name of the method says that there are factors."""
        return self.even.name

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        self.factors.check(scored.weights)
        counts = []
        for target in targets:
            even = self.even.counts(scored, target)
            count: dict[str, int] = {}
            for names, _ in budgets_of(scored, target):
                count |= self._removed(scored.subset(names), even, floor)
            counts.append(count)
        return self.even.selected(scored, counts, floor)

    def with_factors(self, factors: Factors) -> Allocation:
        raise UnsupportedError(f"allocation {self.name!r} has factors already")

    def _removed(self, scored: Scored, even: Mapping[str, int], floor: float) -> dict[str, int]:
        weights = scored.weights
        sizes = {name: weight.numel for name, weight in weights.items()}
        kept = {name: size - even[name] for name, size in sizes.items()}
        proportions = {name: count * self.factors[name] for name, count in kept.items()}
        least = least_kept(weights, floor, published=scored.published)
        found = proportional(sum(kept.values()), proportions, least, sizes, floor)
        return {name: size - found[name] for name, size in sizes.items()}


@dataclass(frozen=True)
class IdAllocation(Allocation):
    """Density of a modality proportional to its mean factor, up to 1; then one threshold each.

    The mean is over the elements of the modality, each with the factor of its weight: a modality
    gets what its layers would get together if the density of each were proportional to its own
    factor. In all exactly int(sparsity x N) elements go. Wang et al. ("Exploring Intrinsic
    Dimension for Vision-Language Model Pruning", ICML 2024) conclude that modalities of higher
    dimension should be pruned less, and give no formula; this one is ours.

    Example:
        profile = measure_id(model, batches)
        prune(model, batches, sparsity=0.75, allocation="id", id_profile=profile)

    Attributes:
        factors: the intrinsic dimension by canonical name; None until it is known.
    """

    factors: Factors | None = None

    name: ClassVar[str] = "id"
    takes_budgets: ClassVar[bool] = False

    @property
    def measured(self) -> bool:
        return self.factors is not None

    def with_factors(self, factors: Factors) -> Allocation:
        return IdAllocation(factors)

    def record(self) -> dict[str, Any]:
        known = {} if self.factors is None else self.factors.record()
        return {**super().record(), **known}

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        total = sum(weight.numel for weight in scored.weights.values())
        keeps = [total - int(overall(target, self.name) * total) for target in targets]
        least_kept(scored.weights, floor, published=scored.published)  # says what is wrong
        found = [self.kept(scored.weights, keep, floor) for keep in keeps]
        removals = {}
        for modality, names in modalities_of(scored).items():
            size = sum(scored.weights[name].numel for name in names)
            removals[modality] = [size - kept[modality] for kept in found]
        return within_modalities(scored, removals, floor)

    def kept(self, weights: Mapping[str, Weight], keep: int, floor: float = 0.0) -> dict[str, int]:
        """How many elements each modality keeps.

        Args:
            weights: of the model, by canonical name.
            keep: how many of all elements stay.
            floor: least fraction that each tensor keeps.

        Raises:
            UnsupportedError: if nothing was measured.
            StatisticsError: if a weight has no factor.
            SparsityError: if the floor keeps more.
        """
        if self.factors is None:
            raise UnsupportedError(
                "allocation 'id' needs the intrinsic dimensions of the model; give id_profile, or "
                "prune by name (allocation='id') with batches to measure them"
            )
        self.factors.check(weights)
        kept = least_kept(weights, floor)
        sizes: dict[str, int] = {}
        least: dict[str, int] = {}
        proportions: dict[str, float] = {}
        for name, weight in weights.items():
            group = weight.modality
            sizes[group] = sizes.get(group, 0) + weight.numel
            least[group] = least.get(group, 0) + kept[name]
            share = weight.numel * self.factors[name]
            proportions[group] = proportions.get(group, 0.0) + share
        return proportional(keep, proportions, least, sizes, floor)


def allocation_by_name(name: str) -> Allocation:
    """A registered one, `owl` or `owl(M=3)`, or a pattern such as `keep=2,of=4`.

    Raises:
        SparsityError: if there is none of that name.
        UnknownNameError: if it has no such parameter.
        UnsupportedError: if it cannot be made with these parameters.
    """
    if match := re.fullmatch(r"keep=(\d+),\s*of=(\d+)", name):
        return Pattern(int(match[1]), int(match[2]))
    known = registry()
    try:
        known.find(name.partition("(")[0].strip(), "allocations")
    except UnknownNameError as error:
        hint = suggest(name, known.names("allocations"))
        raise SparsityError(f"unknown allocation {shown(name)}{hint}") from error
    return known.make("allocations", name, Allocation)  # type: ignore[type-abstract]
