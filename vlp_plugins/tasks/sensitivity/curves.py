"""Loss and retrieval of a model with one group of weights pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
        modality: of its weights.
        depth: of its weights; None of a modality.
        weights: canonical names.
        elements: number of elements.
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

    Args:
        weights: of the model.
        levels: of `LEVELS`.
        modalities: those that are looked at; None: all.

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
        curves: one per group.
        structure: hash of the model's prunable structure (`WeightMap.structure`).
        adapter: name of the adapter.
        settings: how it was measured.
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
