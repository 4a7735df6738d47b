"""Which weights compete with each other for a place, and how many of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlp_plugins.methods.context import Context
from vlp_plugins.models.request import Target, budget_of
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.scoring.allocation import (
    Allocation,
    GlobalAllocation,
    IdAllocation,
    ModalityAllocation,
)


@dataclass(frozen=True)
class Group:
    """Weights that are one problem.

    Attributes:
        names: canonical names, in the order of the adapter.
        keep: number of their elements that stay.
    """

    names: tuple[str, ...]
    keep: int


def groups_of(
    weights: WeightMap, target: Target, allocation: Allocation, *, published: bool
) -> list[Group]:
    """One group of all weights, or one per modality.

    Args:
        weights: of the model.
        target: sparsity, by modality if the allocation is modality-wise.
        allocation: global, or by modality.
        published: count as the published code does, `int((1 - sparsity) N)` kept, which rounding
            can make one less than N - int(sparsity N).

    Raises:
        SparsityError: if the target does not fit the modalities.
    """
    modalities = weights.by_modality()
    if isinstance(allocation, GlobalAllocation | IdAllocation):
        if isinstance(target, Mapping):
            raise SparsityError(
                f"{allocation.name} allocation takes one sparsity, not {dict(target)}; leave the "
                "allocation out, or say modality"
            )
        keep = _kept(target, weights.numel, published)
        if isinstance(allocation, GlobalAllocation):
            return [Group(tuple(weights), keep)]
        shares = allocation.kept(weights, keep)
        return [
            Group(tuple(weight.name for weight in members), shares[modality])
            for modality, members in modalities.items()
        ]
    budget = budget_of(target, list(modalities))
    return [
        Group(
            tuple(weight.name for weight in members),
            _kept(budget[modality], sum(weight.numel for weight in members), published),
        )
        for modality, members in modalities.items()
    ]


def check_allocation(allocation: Allocation, method: str) -> None:
    """Raises `UnsupportedError` unless sparsity is shared out globally or by modality."""
    if not isinstance(allocation, GlobalAllocation | ModalityAllocation | IdAllocation):
        raise UnsupportedError(
            f"method {method!r} shares out sparsity over all weights (global) or within "
            f"modalities (modality, id), not by allocation {allocation.name!r}"
        )


def check_floor(context: Context, method: str) -> None:
    """Raises `SparsityError` if tensors were promised a floor, which the solver cannot keep."""
    if context.floor:
        raise SparsityError(
            f"method {method!r} has no floor ({context.floor:g} was asked for): its solver decides "
            "by the curvature of the loss alone; leave the floor out"
        )


def _kept(sparsity: float, total: int, published: bool) -> int:
    return int((1 - sparsity) * total) if published else total - int(sparsity * total)
