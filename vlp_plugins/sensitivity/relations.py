"""Does what is known of a group tell how prunable it is? Rank correlations over groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlp_plugins.sensitivity.groups import Group
from vlp_plugins.sensitivity.prunability import Prunability
from vlp_plugins.sensitivity.ranks import RankCorrelation, rank_correlation

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
    """The ID of every group: the mean over its weights, each counted once."""
    return {
        group: math.fsum(dimensions[name] for name in group.weights) / len(group.weights)
        for group in groups
    }


def relations(
    prunabilities: Sequence[Prunability], dimensions: Mapping[str, float]
) -> list[Relation]:
    """Rank correlations with prunability over the groups of each level but the modalities.

    Args:
        prunabilities: of groups of any levels.
        dimensions: ID by canonical name of the weights.
    """
    levels = dict.fromkeys(p.group.level for p in prunabilities if p.group.level != "modality")
    found = []
    for level in levels:
        members = [p for p in prunabilities if p.group.level == level]
        by_group = dimensions_of([p.group for p in members], dimensions)
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
