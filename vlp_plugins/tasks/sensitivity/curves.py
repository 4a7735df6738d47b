"""Loss and retrieval of a model with one group of weights pruned, and one number for each curve.

Prunability is the mean of (dense loss / loss of the pruned model) over all sparsities from 0 to
the highest that was measured, by the trapezoid rule. It is 1 if pruning never changes the loss and
tends to 0 if the least pruning destroys the model. It has no unit and no threshold, uses the whole
curve, and orders groups that a tolerance cannot tell apart because all of them stay below it.
Sparsity is a fraction of the group's own elements, so large and small groups are compared at equal
fractions, not at equal numbers of removed weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import UnknownNameError, UnsupportedError, suggest

Level = Literal["modality", "block", "weight"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that are pruned together while all others stay dense.

    Attributes:
        title: `vision`, `vision 3` or the weight's canonical name; unique within a level.
        level: `modality`, `block` (the weights of one modality at one depth) or `weight`.
        depth: of its weights; None of a modality.
        weights: canonical names.
    """

    title: str
    level: Level
    modality: str
    depth: int | None
    weights: tuple[str, ...]
    elements: int


def groups_of(
    weights: WeightMap,
    levels: Sequence[str] = ("modality", "block"),
    modalities: Iterable[str] | None = None,
) -> list[Group]:
    """The groups of every level, in order: all of the first level, then of the next.

    Only those of some modalities, or (None) of all.

    Raises:
        UnknownNameError: for a level or a modality that does not exist.
        UnsupportedError: if no level is named.
    """
    if not levels:
        raise UnsupportedError(f"no groups named; give some of {', '.join(LEVELS)}")
    known = list(weights.by_modality())
    wanted = known if modalities is None else list(modalities)
    for name in wanted:
        if name not in known:
            raise UnknownNameError(
                f"modality {name!r} does not exist in this model{suggest(name, known)}"
            )
    found: list[Group] = []
    for level in dict.fromkeys(levels):
        if level not in LEVELS:
            raise UnknownNameError(f"groups {level!r} do not exist{suggest(level, list(LEVELS))}")
        members: dict[tuple[str, int | None, str], list[Weight]] = {}
        for weight in weights.values():
            if weight.modality in wanted:
                members.setdefault(_KEYS[level](weight), []).append(weight)
        found += [_group(level, *key, chosen) for key, chosen in members.items()]
    return found


def _group(
    level: Level, modality: str, depth: int | None, title: str, members: Sequence[Weight]
) -> Group:
    names = tuple(weight.name for weight in members)
    return Group(title, level, modality, depth, names, sum(w.numel for w in members))


_KEYS: dict[str, Callable[[Weight], tuple[str, int | None, str]]] = {
    "modality": lambda w: (w.modality, None, w.modality),
    "block": lambda w: (w.modality, w.depth, f"{w.modality} {w.depth}"),
    "weight": lambda w: (w.modality, w.depth, w.name),
}


@dataclass(frozen=True, slots=True)
class Point:
    """The model at one sparsity of one group.

    Attributes:
        sparsity: fraction of the group's elements that was asked to go.
        removed: elements that went.
        losses: the pre-training loss on every batch; NaN or infinite where the model's is.
        image_to_text: R@1 in percent; None if it was not measured.
        text_to_image: R@1 in percent; None if it was not measured.
    """

    sparsity: float
    removed: int
    losses: tuple[float, ...]
    image_to_text: float | None = None
    text_to_image: float | None = None

    @property
    def loss(self) -> float:
        """Mean over the batches; NaN if it is not finite on any of them."""
        mean = sum(self.losses) / len(self.losses)
        return mean if math.isfinite(mean) else math.nan

    @property
    def recall(self) -> float | None:
        """Mean R@1 of both ways, in percent."""
        if self.image_to_text is None or self.text_to_image is None:
            return None
        return (self.image_to_text + self.text_to_image) / 2

    def rise(self, dense: Point) -> float:
        """By which fraction of the dense loss the loss is higher; infinite if it is not finite."""
        return self.loss / dense.loss - 1 if math.isfinite(self.loss) else math.inf

    def rise_error(self, dense: Point) -> float | None:
        """Standard error of `rise` over the batches, the dense loss being fixed.

        Both models saw the same batches, so the differences count, not the losses. None for a
        single batch, or a loss that is not finite.
        """
        count = len(self.losses)
        if count < 2 or not math.isfinite(self.loss):
            return None
        apart = [loss - before for loss, before in zip(self.losses, dense.losses, strict=True)]
        mean = sum(apart) / count
        variance = sum((value - mean) ** 2 for value in apart) / (count - 1)
        return math.sqrt(variance / count) / dense.loss


@dataclass(frozen=True, slots=True)
class Curve:
    """One group at rising sparsity; everything else of the model is dense."""

    group: Group
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How a model takes the pruning of each of its groups.

    Attributes:
        dense: the model as it was, at sparsity 0.
        structure: hash of the model's prunable structure (`WeightMap.structure`).
    """

    dense: Point
    curves: tuple[Curve, ...]
    structure: str
    adapter: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, level: str) -> list[Curve]:
        """The curves of one level."""
        return [curve for curve in self.curves if curve.group.level == level]

    @property
    def levels(self) -> Sequence[str]:
        """The levels that were measured, in order."""
        return list(dict.fromkeys(curve.group.level for curve in self.curves))


TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Prunability:
    """How much pruning a group takes.

    Attributes:
        loss: prunability by the loss.
        error: its standard error over the batches, by the jackknife; None for a single batch.
        tolerated: the highest sparsity at which the loss is at most a tolerance above the dense
            one, interpolated; the highest measured one if it never is.
        recall: the same mean of (R@1 / dense R@1); None if it was not measured, or dense is 0.
    """

    group: Group
    loss: float
    error: float | None
    tolerated: float
    recall: float | None


def prunability_of(curve: Curve, dense: Point, tolerance: float = TOLERANCE) -> Prunability:
    """The numbers of one curve, with the dense model measured on the same batches.

    The tolerance is the fraction of the dense loss that its rise may reach.

    Raises:
        UnsupportedError: if the dense loss is not positive: there is no ratio to it.
    """
    if not dense.loss > 0:
        raise UnsupportedError(
            f"the loss of the dense model is {dense.loss:g}; prunability compares ratios of losses "
            "and needs a positive one"
        )
    points = sorted(curve.points, key=lambda point: point.sparsity)
    sparsities = [point.sparsity for point in points]
    rises = [point.rise(dense) for point in points]
    recall = None
    if dense.recall and all(point.recall is not None for point in points):
        recall = mean_over(sparsities, [(point.recall or 0) / dense.recall for point in points])
    return Prunability(
        curve.group,
        _by_loss(points, dense),
        jackknife_error([_by_loss(some, d) for some, d in _leaving_one_out(points, dense)]),
        tolerated(sparsities, rises, tolerance),
        recall,
    )


def difference_of(one: Curve, other: Curve, dense: Point) -> tuple[float, float | None]:
    """By how much the first curve is more prunable than the second, and the standard error.

    Both were measured on the same batches: the error is that of the difference, by the jackknife.
    """
    difference = _by_loss(one.points, dense) - _by_loss(other.points, dense)
    partial = [
        _by_loss(mine, d) - _by_loss(theirs, d)
        for (mine, d), (theirs, _) in zip(
            _leaving_one_out(one.points, dense), _leaving_one_out(other.points, dense), strict=True
        )
    ]
    return difference, jackknife_error(partial)


def prunabilities(found: Sensitivity, tolerance: float = TOLERANCE) -> list[Prunability]:
    """The numbers of every curve."""
    return [prunability_of(curve, found.dense, tolerance) for curve in found.curves]


def mean_over(sparsities: Sequence[float], kept: Sequence[float]) -> float:
    """Mean of `kept` over rising sparsities from 0, where it is 1, to the last; trapezoid rule.

    Values that are not finite count as 0.
    """
    line = [(0.0, 1.0), *zip(sparsities, (k if math.isfinite(k) else 0.0 for k in kept),
                             strict=True)]  # fmt: skip
    area = sum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(line))
    return area / sparsities[-1]


def tolerated(sparsities: Sequence[float], rises: Sequence[float], tolerance: float) -> float:
    """The sparsity at which a curve first rises above a tolerance, on a line between points.

    Rises of the loss, which may be infinite, and the tolerance are fractions of the dense loss.
    """
    line = [(0.0, 0.0), *zip(sparsities, rises, strict=True)]
    for (left, below), (right, above) in pairwise(line):
        if not above <= tolerance:
            share = (tolerance - below) / (above - below) if math.isfinite(above) else 0.0
            return left + share * (right - left)
    return sparsities[-1]


def jackknife_error(partial: Sequence[float]) -> float | None:
    """Standard error of a statistic from its values with one sample left out in turn.

    None if there are fewer than two.
    """
    count = len(partial)
    if count < 2:
        return None
    mean = sum(partial) / count
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in partial))


def _by_loss(points: Sequence[Point], dense: Point) -> float:
    points = sorted(points, key=lambda point: point.sparsity)
    kept = [dense.loss / point.loss if point.loss > 0 else 0.0 for point in points]
    return mean_over([point.sparsity for point in points], kept)


def _leaving_one_out(points: Sequence[Point], dense: Point) -> list[tuple[list[Point], Point]]:
    """The points and the dense model as all batches but one see them, for each batch."""
    count = len(dense.losses)
    if count < 2:
        return []
    return [
        ([_without(point, batch) for point in points], _without(dense, batch))
        for batch in range(count)
    ]


def _without(point: Point, batch: int) -> Point:
    return replace(point, losses=(*point.losses[:batch], *point.losses[batch + 1 :]))
