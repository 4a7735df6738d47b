"""Sparsity shared out within the scopes of a `config_list`, each with its own bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_plugins.hosts.nni.scopes import Demand, Scope
from vlp_plugins.models.request import Target
from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.scoring.allocation import (
    Allocation,
    GlobalAllocation,
    LayerAllocation,
    ModalityAllocation,
    under_floor,
)
from vlp_plugins.scoring.selection import Scored, Selection


@dataclass(frozen=True)
class PerScope(Allocation):
    """Another allocation inside every scope; the sparsities are those of the scopes.

    What is in no scope stays whole. One pass over the data serves all scopes.

    Attributes:
        inner: shares out within a scope.
        parts: scopes, and what each of them shall lose.
    """

    inner: Allocation
    parts: tuple[tuple[Scope, Demand], ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the allocation inside."""
        return self.inner.name

    def record(self) -> dict[str, Any]:
        """That of the inner allocation, and what NNI asked for by scope."""
        return {**self.inner.record(), "scopes": record_of(self.parts)}

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        found: dict[str, Selection] = {}
        for scope, demand in self.parts:
            found |= self._selected(scored.subset(scope.weights), demand)
        if rest := [name for name in scored.weights if name not in found]:
            found |= LayerAllocation().select(scored.subset(rest), [0.0])[0]
        return [{name: found[name] for name in scored.weights} for _ in targets]

    def _selected(self, scored: Scored, demand: Demand) -> Mapping[str, Selection]:
        if demand.even:
            return LayerAllocation().select(scored, [demand.most])[0]
        if not demand.least:
            return self.inner.select(scored, [demand.ratio], floor=demand.floor)[0]
        found: dict[str, Selection] = {}
        for names in self._compared(scored):
            found |= _with_least(scored.subset(names), demand)
        return found

    def _compared(self, scored: Scored) -> list[list[str]]:
        """The weights that the inner allocation compares with each other."""
        if isinstance(self.inner, GlobalAllocation):
            return [list(scored.weights)]
        if isinstance(self.inner, LayerAllocation):
            return [[name] for name in scored.weights]
        if isinstance(self.inner, ModalityAllocation):
            groups: dict[str, list[str]] = {}
            for weight in scored.weights.values():
                groups.setdefault(weight.modality, []).append(weight.name)
            return list(groups.values())
        raise SparsityError(
            f"min_sparse_ratio cannot be kept by allocation {self.inner.name!r}; leave it out, or "
            "give allocation='global', 'modality' or 'layer'"
        )


def record_of(parts: Sequence[tuple[Scope, Demand]]) -> dict[str, Any]:
    """What manifests say about scopes."""
    return {
        scope.label: {
            "sparse_ratio": demand.ratio,
            "weights": len(scope.weights),
            **({"max_sparse_ratio": demand.most} if demand.most < 1 else {}),
            **({"min_sparse_ratio": demand.least} if demand.least else {}),
        }
        for scope, demand in parts
    }


def _with_least(scored: Scored, demand: Demand) -> dict[str, Selection]:
    """One threshold over the weights, but every weight loses its least fraction.

    What would lose less is fixed at that, and the others make up for it. Together they lose
    int(ratio x N): at least as many as all the least counts, which are rounded down.
    """
    sizes = {name: weight.numel for name, weight in scored.weights.items()}
    least = {name: int(demand.least * size) for name, size in sizes.items()}
    removal = int(demand.ratio * sum(sizes.values()))
    fixed: dict[str, int] = {}
    found: dict[str, Selection] = {}
    while free := [name for name in sizes if name not in fixed]:
        left = removal - sum(fixed.values())
        found = dict(under_floor(scored.subset(free), [left], demand.floor)[0])
        under = {name: least[name] for name in free if found[name].remove < least[name]}
        if not under:
            break
        fixed |= under
    ranked = scored.ranking()
    for name, count in fixed.items():
        found[name] = ranked.cuts_of(ranked.scores(name), [count])[0]
    return {name: found[name] for name in sizes}
