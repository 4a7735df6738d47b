"""What is pruned alone: a modality, a block of layers at one depth, or one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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
