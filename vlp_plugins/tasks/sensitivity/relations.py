"""Whether a measure of a group tells how prunable it is: rank correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlp_plugins.tasks.sensitivity.curves import Group, Prunability

FEWEST = 3
"""Fewer pairs than that have no rank correlation worth a number."""
FEWEST_FOR_INTERVAL = 5
_ARRANGEMENTS = 10_000
_ENTRIES = 2**22  # compared at a time
_CONSTANT = 1e-12  # what rounding leaves of a constant must not count as variation

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Strata = Sequence[object]


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's rank correlation.

    Attributes:
        count: pairs.
        rho: in [-1, 1]; None for fewer than 3 pairs, or if either side is constant.
        low: lower end of the 95% interval (percentiles of the bootstrap over pairs); None for
            fewer than 5 pairs.
        high: its upper end.
        p: two-sided p-value of a permutation test of "no relation": exact for up to 10,000
            arrangements, else from as many random ones.
    """

    count: int
    rho: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    strata: Strata | None = None,
    *,
    resamples: int = 2_000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rank correlation, its interval and its p-value.

    With strata, ranks are taken within each stratum and brought to one scale before they are
    pooled: what is left is the relation within strata, not between them. Permutations
    and resamples stay within strata, too.

    Args:
        x: one number per pair.
        y: one number per pair.
        strata: to which stratum each pair belongs; None: all to one. Those of a single pair are
            left out.
        resamples: of the bootstrap.
        seed: of both.
    """
    one, other = np.asarray(x, float), np.asarray(y, float)
    places = _places(len(one), strata)
    count = sum(map(len, places))
    a, b = _pooled(one, places), _pooled(other, places)
    rho = pearson(a, b)
    if count < FEWEST or math.isnan(rho):
        return RankCorrelation(count, None)
    random = np.random.default_rng(seed)
    p = _p_value(a, b, rho, [len(place) for place in places], random)
    low, high = None, None
    if count >= FEWEST_FOR_INTERVAL:
        low, high = _interval(one, other, places, resamples, random)
    return RankCorrelation(count, rho, low, high, p)


def pearson(a: Floats, b: Floats) -> float:
    """Linear correlation of two arrays; NaN if either is constant or empty."""
    if not len(a):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > _CONSTANT else math.nan


def _places(count: int, strata: Strata | None) -> list[Places]:
    """Indices of the pairs of every stratum that has two or more."""
    members: dict[object, list[int]] = {}
    for index, stratum in enumerate(strata if strata is not None else [0] * count):
        members.setdefault(stratum, []).append(index)
    return [np.array(each) for each in members.values() if len(each) > 1]


def _pooled(values: Floats, places: Sequence[Places]) -> Floats:
    """Ranks within every stratum around 0, divided by the stratum's size, one after the other."""
    parts = [_scaled_ranks(values[place][None])[0] for place in places]
    return np.concatenate(parts) if parts else np.empty(0)


def _p_value(
    a: Floats,
    b: Floats,
    rho: float,
    sizes: Sequence[int],
    random: np.random.Generator,
) -> float:
    starts = np.cumsum([0, *sizes[:-1]])
    if math.prod(math.factorial(size) for size in sizes) <= _ARRANGEMENTS:
        each = (permutations(range(s, s + n)) for s, n in zip(starts, sizes, strict=True))
        orders = np.array([[i for part in parts for i in part] for parts in product(*each)])
        return float(np.mean(_as_far(a, b, orders, rho)))
    orders = np.concatenate(
        [
            random.permuted(np.tile(np.arange(s, s + n), (_ARRANGEMENTS, 1)), axis=1)
            for s, n in zip(starts, sizes, strict=True)
        ],
        axis=1,
    )
    return (float(np.sum(_as_far(a, b, orders, rho))) + 1) / (_ARRANGEMENTS + 1)


def _as_far(a: Floats, b: Floats, orders: Places, rho: float) -> NDArray[np.bool_]:
    """Which orders of `b` correlate with `a` at least as strongly, either way."""
    a, b = a - a.mean(), b - b.mean()
    found = b[orders] @ a / math.sqrt(float((a * a).sum() * (b * b).sum()))
    close: NDArray[np.bool_] = np.abs(found) >= abs(rho) - 1e-12
    return close


def _interval(
    x: Floats,
    y: Floats,
    places: Sequence[Places],
    resamples: int,
    random: np.random.Generator,
) -> tuple[float | None, float | None]:
    drawn = [random.choice(place, (resamples, len(place))) for place in places]
    a, b = (np.concatenate([_scaled_ranks(values[d]) for d in drawn], axis=1) for values in (x, y))
    # Ranks of a stratum have mean 0, and so have those of all.
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    usable = scale > _CONSTANT  # one pair drawn again and again has no correlation
    if not usable.any():
        return None, None
    low, high = np.percentile((a * b).sum(1)[usable] / scale[usable], [2.5, 97.5])
    return float(low), float(high)


def _scaled_ranks(rows: Floats) -> Floats:
    """Ranks within every row around 0, divided by their number."""
    count = rows.shape[1]
    found = np.empty_like(rows)
    step = max(1, _ENTRIES // count**2)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        less = (part[:, None, :] < part[:, :, None]).sum(2)
        alike = (part[:, None, :] == part[:, :, None]).sum(2)
        found[start : start + step] = less + (alike + 1) / 2
    return (found - (count + 1) / 2) / count


ALL = "all"
WITHIN = "within modalities"
Measure = Literal["loss", "recall"]


@dataclass(frozen=True, slots=True)
class Relation:
    """How something ranks the groups of a level, compared with their prunability.

    Attributes:
        by: `ID`, or `elements`: how large a group is, for comparison.
        measure: prunability by the `loss` or by `recall`.
        level: of the groups.
        scope: `all`, `within modalities` (what modalities have in common is taken out; see
            `rank_correlation`), or the name of a modality.
        found: the correlation; negative: the higher, the less prunable.
    """

    by: str
    measure: Measure
    level: str
    scope: str
    found: RankCorrelation


def dimensions_of(groups: Sequence[Group], dimensions: Mapping[str, float]) -> dict[Group, float]:
    """The ID of every group that has one: the mean over its weights, each counted once."""
    known = {
        group: [dimensions[name] for name in group.weights if name in dimensions]
        for group in groups
    }
    return {group: math.fsum(each) / len(each) for group, each in known.items() if each}


def relations(
    prunabilities: Sequence[Prunability], dimensions: Mapping[str, float]
) -> list[Relation]:
    """Rank correlations with prunability over the groups of each level but the modalities.

    `dimensions` has the ID by canonical name of the weights.
    """
    levels = dict.fromkeys(p.group.level for p in prunabilities if p.group.level != "modality")
    found = []
    for level in levels:
        members = [p for p in prunabilities if p.group.level == level]
        by_group = dimensions_of([p.group for p in members], dimensions)
        members = [p for p in members if p.group in by_group]
        for measure in ("loss", "recall"):
            if any(getattr(p, measure) is None for p in members):
                continue
            for scope, chosen, strata in _scopes(members):
                for by in ("ID", "elements"):
                    values = [by_group[p.group] if by == "ID" else p.group.elements for p in chosen]
                    amounts = [getattr(p, measure) for p in chosen]
                    result = rank_correlation(values, amounts, strata)
                    found.append(Relation(by, measure, level, scope, result))
    return found


def _scopes(
    members: Sequence[Prunability],
) -> list[tuple[str, list[Prunability], list[str] | None]]:
    """Name, members and strata of every set that a correlation is taken over."""
    modalities = list(dict.fromkeys(p.group.modality for p in members))
    scopes: list[tuple[str, list[Prunability], list[str] | None]] = [(ALL, list(members), None)]
    if len(modalities) > 1:
        scopes.append((WITHIN, list(members), [p.group.modality for p in members]))
        scopes += [(m, [p for p in members if p.group.modality == m], None) for m in modalities]
    return scopes
