"""How much a model loses when one modality, or one block of layers, is pruned alone."""

from __future__ import annotations

from vlp_plugins.sensitivity.curves import Curve, Point, Sensitivity
from vlp_plugins.sensitivity.groups import LEVELS, Group, groups_of
from vlp_plugins.sensitivity.prunability import Prunability, prunabilities, prunability_of
from vlp_plugins.sensitivity.ranks import RankCorrelation, rank_correlation
from vlp_plugins.sensitivity.relations import Relation, relations
from vlp_plugins.sensitivity.running import SPARSITIES, sensitivity

__all__ = [
    "LEVELS",
    "SPARSITIES",
    "Curve",
    "Group",
    "Point",
    "Prunability",
    "RankCorrelation",
    "Relation",
    "Sensitivity",
    "groups_of",
    "prunabilities",
    "prunability_of",
    "rank_correlation",
    "relations",
    "sensitivity",
]
